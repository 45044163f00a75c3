"""compare.py on runs that are out of the ordinary: each really trained, on the tiny model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe import comparison, train
from recipe.compare import main as compare
from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.settings import RunFailed, UserError, load_settings
from tests.conftest import ROWS

EPOCHS = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}


def content_of(run: Path, *arguments: str) -> dict:
    said = run_command(lambda: compare(["--run", str(run), "--rows", "4", *arguments]))
    assert said in (0, 3)  # 3: of two untrained layers it may well say that they are broken
    return json.loads((run / "report.json").read_text())


def trained(config: Path) -> Path:
    return finetune(load_settings(str(config)))


def test_a_run_that_kept_its_best_epoch(write_config, write_rows):
    """The adapter is that of the second epoch, and the last checkpoint is not the run's end."""
    same = [{**row, "output": "Blue, red."} for row in ROWS[:8]]  # soon learned by heart
    kept = {"load_best_model_at_end": True, "learning_rate": 0.03, "lr_scheduler_type": "constant"}
    run = trained(
        write_config(
            data={
                "path": str(write_rows([*same, *ROWS[8:]], "same.json")),
                "rows": "0:8",
                "held_out": "8:12",
            },
            training={**EPOCHS, **kept, "num_train_epochs": 3},
        )
    )
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = [one["eval_loss"] for one in records if "eval_loss" in one][1:4]  # by the run itself
    assert measured[1] == min(measured)
    content = content_of(run, "--no-answers")
    marks = [(one["epoch"], one["is_adapter"]) for one in content["epochs"]]
    assert marks == [(0, False), (1, False), (2, True), (3, False)]
    found = [math.log(one["unseen"]) for one in content["epochs"][1:]]
    assert found == pytest.approx(measured, rel=1e-6)
    tuned = content["parts"]["unseen"]["tuned"]["perplexity"]["value"]
    assert content["epochs"][2]["unseen"] == pytest.approx(tuned, rel=1e-12)


def test_checkpoints_on_a_changed_base_are_not_taken_for_epochs(write_config):
    """PiSSA's checkpoints fit the base it made, its adapter the one that everybody has."""
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa", "target_modules": ["q_proj"]}
    run = trained(
        write_config(
            lora=lora,
            data={"rows": "0:8", "held_out": "8:12"},
            training=EPOCHS | {"learning_rate": 0.01},
        )
    )
    assert len(list(run.glob("checkpoint-*"))) == 2
    content = content_of(run, "--no-answers")
    assert content["epochs"] == []
    assert (
        content["parts"]["seen"]["tuned"]["perplexity"]["value"]
        < (content["parts"]["seen"]["base"]["perplexity"]["value"])
    )


def test_a_damaged_checkpoint_is_left_out_and_named(write_config):
    run = trained(write_config(data={"rows": "0:8", "held_out": "8:12"}, training=EPOCHS))
    first = min(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    weights = first / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    content = content_of(run, "--no-answers")
    assert [one["epoch"] for one in content["epochs"]] == [0, 2]
    notes = [note for note in content["verdict"]["notes"] if first.name in note]
    assert len(notes) == 1
    assert "left out" in notes[0]
    assert weights.name in notes[0]


def test_rows_that_were_truncated_are_measured_and_not_answered(write_config, write_rows):
    """What is left of their last answer is a part, and perhaps none of it."""
    long = {"instruction": "Name colours.", "input": "", "output": "Blue, red and green. " * 12}
    rows = write_rows([*ROWS[:6], long, *ROWS[6:]], "long.json")
    run = trained(
        write_config(
            data={
                "path": str(rows),
                "rows": "0:8",
                "held_out": "8:13",
                "max_length": 110,
                "too_long": "truncate",
            }
        )
    )
    content = content_of(run, "--seen", "5,6", "max_new_tokens=4")
    assert content["parts"]["seen"]["rows"] == 2
    assert [one["index"] for one in content["answers"] if one["part"] == "seen"] == [5]
    assert any("1 rows were not answered" in note for note in content["verdict"]["notes"])


def test_a_conversation_is_answered_at_its_last_turn(write_config, write_rows, tiny_checkpoint):
    """Behind all turns before it, as stock code renders and answers them."""

    def talk(n: int) -> dict:
        said = [("user", f"I have {n} cats."), ("assistant", f"{n} cats."), ("user", "How many?"),
                ("assistant", f"It is {n}.")]  # fmt: skip
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    rows = write_rows([talk(n) for n in range(12)], "talks.json")
    run = trained(
        write_config(
            data={"path": str(rows), "rows": "0:8", "held_out": "8:12", "template": "chat"}
        )
    )
    content = content_of(run, "max_new_tokens=6")
    one = next(one for one in content["answers"] if one["index"] == 11)
    assert one["reference"] == "It is 11."
    assert one["prompt"].index("I have 11 cats.") < one["prompt"].index("How many?")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer.apply_chat_template(
        talk(11)["messages"][:-1], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_checkpoint) for _ in range(2))
    tuned = PeftModel.from_pretrained(tuned, str(run / "adapter"))
    for name, model in (("base", base), ("tuned", tuned)):
        with torch.no_grad():
            new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert one[name]["text"] == text


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (RunFailed("out of memory."), "warning   out of memory."),
        (UserError.single("--run", "is gone."), "warning   --run: is gone."),
        (ZeroDivisionError("by zero"), "warning   ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), "warning   the comparison was stopped"),
    ],
)
def test_a_comparison_that_fails_fails_no_training(write_config, monkeypatch, capsys, raised, said):
    def fails(folder, asked):
        raise raised

    monkeypatch.setattr(comparison, "compare_run", fails)
    config = write_config(
        data={"rows": "0:8", "held_out": "8:12"}, judging={"report": True, "rows": 3}
    )
    arguments = ["--config", str(config), "--no-rehearsal"]
    assert run_command(lambda: train.main(arguments)) == 0
    shown = capsys.readouterr().out
    run = config.parent / "run"
    assert said in shown
    assert (
        f"The adapter is in {run}/adapter; to compare: python recipe/compare.py --rows 3" in shown
    )
    assert (Path(run) / "adapter/adapter_model.safetensors").is_file()


def test_a_run_that_moved(write_config, tmp_path):
    """Everything is found beside it, and the report goes where it is."""
    run = trained(write_config(data={"rows": "0:8", "held_out": "8:12"}))
    moved = tmp_path / "elsewhere" / "run"
    shutil.move(run, moved)
    assert content_of(moved, "--no-answers")["parts"]["unseen"]["rows"] == 4
    assert not run.exists()
