"""compare.py as a user types it, on a tiny model that was really trained."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe import compare
from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.settings import load_settings
from tests.conftest import ROWS

REPOSITORY = Path(__file__).parents[2]


def compared(*arguments: str) -> int:
    return run_command(lambda: compare.main(list(arguments)))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    more = [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"It is {n}."}
        for n in range(20)
    ]
    file.write_text(json.dumps(ROWS + more))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_checkpoint, rows_file):
    """Two epochs on rows 0:20, with a checkpoint an epoch; 20:32 held out."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-001"
    config = folder.parent / "tiny.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(tiny_checkpoint), "dtype": "float32"},
                "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
                "data": {"path": str(rows_file), "rows": "0:20", "held_out": "20:32"},
                "training": {
                    "output_dir": str(folder),
                    "use_cpu": True,
                    "num_train_epochs": 2,
                    "per_device_train_batch_size": 4,
                    "learning_rate": 0.02,
                    "logging_steps": 1,
                    "save_strategy": "epoch",
                },
            }
        )
    )
    return finetune(load_settings(str(config)))


@pytest.fixture(scope="module")
def content(run):
    # Exit 3: an untrained model of two layers is stuck in repetition once it is tuned.
    assert compared("--run", str(run), "--rows", "6", "max_new_tokens=8") == 3
    return json.loads((run / "report.json").read_text())


def stock_perplexity(run: Path, checkpoint: Path, weights: Path | None, indices: list[int]):
    """Stock transformers and peft in float64, a row at a time, and the rows' text by hand."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    if weights is not None:
        model = PeftModel.from_pretrained(model, str(weights), autocast_adapter_dtype=False)
        model = model.double()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    source = json.loads(Path(load_settings(str(run / "settings.yaml")).data.path).read_text())
    total, count = 0.0, 0
    for index in indices:
        row = source[index]
        head = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. "
            if row["input"]
            else "Below is an instruction that describes a task. "
        )
        text = f"{head}Write a response that appropriately completes the request.\n\n"
        text += f"### Instruction:\n{row['instruction']}\n\n"
        text += f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = tokenizer(text + "### Response:\n")["input_ids"]
        whole = [*tokenizer(text + "### Response:\n" + row["output"])["input_ids"]]
        whole.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        with torch.no_grad():
            loss = model(torch.tensor([whole]), labels=torch.tensor([labels])).loss
        total += float(loss) * (len(whole) - len(prompt))
        count += len(whole) - len(prompt)
    return math.exp(total / count)


def test_perplexities_are_those_of_stock_code(run, content, tiny_checkpoint):
    for part in ("seen", "unseen"):
        indices = [one["index"] for one in content["answers"] if one["part"] == part]
        assert len(indices) == content["parts"][part]["rows"] == 6
        for model, weights in (("base", None), ("tuned", run / "adapter")):
            expected = stock_perplexity(run, tiny_checkpoint, weights, indices)
            found = content["parts"][part][model]["perplexity"]["value"]
            assert found == pytest.approx(expected, rel=1e-6)


def test_an_epoch_is_its_checkpoint(run, content, tiny_checkpoint):
    names = [(one["name"], one["epoch"], one["is_adapter"]) for one in content["epochs"]]
    assert names == [("base", 0, False), ("checkpoint-5", 1, False), ("checkpoint-10", 2, True)]
    indices = [one["index"] for one in content["answers"] if one["part"] == "unseen"]
    expected = stock_perplexity(run, tiny_checkpoint, run / "checkpoint-5", indices)
    assert content["epochs"][1]["unseen"] == pytest.approx(expected, rel=1e-6)
    tuned = content["parts"]["unseen"]["tuned"]["perplexity"]["value"]
    assert content["epochs"][2]["unseen"] == pytest.approx(tuned, rel=1e-12)


def test_answers_are_those_of_stock_generate(run, content, tiny_checkpoint, rows_file):
    """And base and tuned are not mixed up."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint), str(run / "adapter")
    )
    one = next(one for one in content["answers"] if one["part"] == "unseen")
    row = json.loads(rows_file.read_text())[one["index"]]
    assert (one["prompt"], one["reference"]) == (row["instruction"], row["output"])
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for name, model in (("base", base), ("tuned", tuned)):
        new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert one[name]["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert one[name]["tokens"] == len(new)


def test_page_and_json_say_the_same(run, content):
    page = (run / "report.html").read_text()
    assert content["verdict"]["label"] in page
    for one in content["answers"]:
        kind = {"seen": "Seen", "unseen": "Held-out"}[one["part"]]
        assert f"{kind} row {one['index']}<" in page
    assert {"seen", "unseen", "neutral"} == set(content["parts"])
    assert content["parts"]["neutral"]["tokens"] > 1000
    assert [record["step"] for record in content["loss"]] == list(range(1, 11))
    assert content["own_prompt"] is not None


def test_named_rows(run, capsys):
    arguments = ["--run", str(run), "--seen", "3,1", "--unseen", "30,21,25", "max_new_tokens=4"]
    assert compared(*arguments) in (0, 3)
    content = json.loads((run / "report.json").read_text())
    places = [(one["part"], one["index"]) for one in content["answers"]]
    assert places == [("seen", 3), ("seen", 1), ("unseen", 30), ("unseen", 21), ("unseen", 25)]
    assert f"{content['verdict']['label'].upper()}. " in capsys.readouterr().out


def test_without_answers(run):
    assert compared("--run", str(run), "--no-answers", "--rows", "3") == 0
    content = json.loads((run / "report.json").read_text())
    assert content["answers"] == []
    assert set(content["parts"]["seen"]["tuned"]) == {"perplexity"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seen", "25"], "--seen: row 25 was not trained on"),
        (["--unseen", "5"], "--unseen: "),
        (["--unseen", "20:99"], "--unseen: data.held_out: asks for 20:99, but"),
        (["--unseen", "x"], "expected rows such as 0:4 or 0,7,12, found 'x'"),
        (["--unseen", "4:"], "expected rows such as 0:4"),
        (["--seen", "4:2"], "expected rows such as 0:4"),
        (["--rows", "0"], "--rows: 0 is below 1"),
        (["--port", "1"], "--port: needs --live"),
        (["--open"], "--open: needs --live"),
        (["--seen", "0:999999999999999"], "--seen: row 20 was not trained on"),
        (["--unseen", "0:999999999999999"], "--unseen: data.held_out: asks for"),
        (["max_new_tokens=256"], "max_new_tokens: 256 leave no room for a prompt"),
        (["num_beams=2", "num_return_sequences=2"], "num_return_sequences: is not for comparing"),
        (["--no-answers", "max_new_tokens=4"], "max_new_tokens=4: has no effect"),
        (["--live", "--rows", "3"], "--rows: has no effect with --live"),
        (["temperature=2"], "temperature"),
    ],
)
def test_mistakes(run, capsys, arguments, said):
    before = (run / "report.json").read_bytes() if (run / "report.json").exists() else None
    assert compared("--run", str(run), *arguments) == 2
    assert said in capsys.readouterr().err
    after = (run / "report.json").read_bytes() if (run / "report.json").exists() else None
    assert after == before


def test_a_folder_that_is_no_run(tmp_path, run, capsys):
    assert compared("--run", str(tmp_path)) == 2
    assert "is no run" in capsys.readouterr().err
    assert compared("--run", str(run / "adapter")) == 2


def test_rows_that_are_others_than_it_was_trained_on(run, rows_file, capsys):
    """Which rows were seen could not be told any more."""
    text = rows_file.read_text()
    rows_file.write_text(text.replace("It is 3.", "It is three."))
    try:
        assert compared("--run", str(run)) == 2
    finally:
        rows_file.write_text(text)
    assert "others than" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(run, capsys, monkeypatch):
    before = (run / "report.json").read_bytes()
    real = Path.write_text

    def full(self, *args, **named):
        if "report.html" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, *args, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert compared("--run", str(run), "--no-answers", "--rows", "2") == 3
    assert "report.html could not be written: No space left" in capsys.readouterr().err
    assert (run / "report.json").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_at_the_end_of_training(write_config, tmp_path):
    config = write_config(
        data={"rows": "0:8", "held_out": "8:12"},
        judging={"report": True, "rows": 2, "max_new_tokens": 4},
    )
    command = [sys.executable, "recipe/train.py", "--config", str(config), "--no-rehearsal"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run/report.json").read_text())
    assert {one["part"]: 0 for one in content["answers"]} == {"seen": 0, "unseen": 0}
    assert "max_new_tokens=4" in content["generation"]
    assert f"report    {tmp_path / 'run/report.html'}" in done.stdout
    command = "python recipe/compare.py --rows 2 max_new_tokens=4 --run"
    assert content["commands"][1] == f"{command} {tmp_path / 'run'}"
