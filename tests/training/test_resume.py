"""Stopped and resumed is the same run, to the last bit; anything else is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from recipe.data.batch import LAYOUT
from recipe.finetune import finetune
from recipe.sealed import damage
from recipe.settings import RunFailed, UserError, load_settings
from recipe.training import run_folder
from recipe.training import trainer as trainer_module
from recipe.training.loss import TokenLoss
from recipe.training.run_log import RunLog

NF4 = (
    "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, "
    "bnb_4bit_use_double_quant: true}"
)
WEIGHTS = "adapter/adapter_model.safetensors"
TIMES = {"epoch_seconds", "trained_tokens_per_second", "peak_memory_bytes"}


class StopAt(TrainerCallback):
    """Ends the run as a crash would, in the middle of the step after ``step``."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def run(config, *overrides, watchers=()):
    return finetune(load_settings(str(config), overrides), watchers=watchers)


def metrics(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in r.items() if k not in TIMES and not k.endswith(("runtime", "per_second"))}
        for r in records
    ]


@pytest.fixture
def config(write_config):
    """12 rows, 4 held out, 2 × 2 rows a step: 2 steps an epoch, 3 epochs."""
    return write_config(
        lora={"lora_dropout": 0.1},
        data={"rows": "0:8", "held_out": "8:12"},
        training={
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 1,
        },
    )


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        (1, []),
        (2, []),
        (5, []),
        (2, ["training.save_strategy=epoch"]),
        (3, ["training.logging_steps=500", "training.eval_strategy=no", "data.held_out=null"]),
        (4, ["training.logging_steps=3", "training.save_steps=2"]),
        (1, ["training.logging_strategy=epoch", "training.max_steps=5"]),
        (3, ["training.eval_strategy=steps", "training.eval_steps=2", "training.save_steps=2"]),
        (2, [NF4, "training.optim=adamw_bnb_8bit", "training.gradient_checkpointing=true"]),
        (2, ["model.quantization={load_in_8bit: true}", "training.optim=adamw_bnb_8bit"]),
    ],
)
def test_resumed_is_uninterrupted(write_config, config, tmp_path, step, overrides):
    whole = run(config, *overrides, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, *overrides, f"training.output_dir={stopped}", watchers=[StopAt(step)])
    assert not (stopped / "adapter").exists()
    if (stopped / "metrics.jsonl").exists():  # as a kill in the middle of a write leaves it
        with (stopped / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 3, "lo')
    resumed = run(
        config,
        *overrides,
        f"training.resume_from_checkpoint={stopped}",
        f"training.output_dir={stopped}",
    )
    assert resumed == stopped
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


class StopBetween(TrainerCallback):
    """Ends the run between the last step of an epoch and its evaluation."""

    def on_epoch_end(self, args, state, control, **_):
        if state.global_step == 4:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    "overrides", [[], ["training.save_strategy=epoch"], ["training.eval_strategy=steps"]]
)
def test_no_evaluation_is_skipped(config, tmp_path, overrides):
    if overrides == ["training.eval_strategy=steps"]:
        overrides += ["training.eval_steps=2", "training.save_steps=2"]
        overrides += ["training.load_best_model_at_end=true"]
    whole = run(config, *overrides, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, *overrides, watchers=[StopBetween()])
    resumed = run(config, *overrides, f"training.resume_from_checkpoint={stopped}")
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


class StopAtTheEnd(TrainerCallback):
    """Ends the run between the last step and the adapter."""

    def on_train_end(self, args, state, control, **_):
        raise RuntimeError("power cut")


@pytest.mark.parametrize("overrides", [["training.max_steps=3"], []])
def test_a_run_that_stopped_behind_its_last_step_takes_no_more(config, tmp_path, overrides):
    whole = run(config, *overrides, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, *overrides, watchers=[StopAtTheEnd()])
    resumed = run(config, *overrides, f"training.resume_from_checkpoint={stopped}")
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)
    assert {p.name for p in resumed.iterdir()} == {p.name for p in whole.iterdir()}


def flip_a_byte(checkpoint):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_byte, "optimizer.pt: changed since"),
        (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt: missing"),
        (lambda c: (c / "rng_state.pth").write_bytes(b""), "rng_state.pth: changed"),
        (lambda c: (c / "sha256.json").unlink(), "nothing proves"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(config, tmp_path, capsys, harm, message):
    whole = run(config, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    harm(stopped / "checkpoint-2")
    with pytest.raises(UserError, match=f"{message}.*Name {stopped}/checkpoint-1, which is whole"):
        run(config, f"training.resume_from_checkpoint={stopped / 'checkpoint-2'}")
    capsys.readouterr()
    resumed = run(config, f"training.resume_from_checkpoint={stopped}")
    said = capsys.readouterr().out
    assert f"left out  {stopped}/checkpoint-2" in said
    assert message in said
    assert f"resumed   from {stopped}/checkpoint-1\n" in said
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)
    # It was in the way of the new one.
    assert damage(stopped / "checkpoint-2") == []


def test_nothing_whole_is_refused(config, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        flip_a_byte(checkpoint)
    with pytest.raises(UserError, match="Start anew") as raised:
        run(config, f"training.resume_from_checkpoint={tmp_path / 'run'}")
    assert len(raised.value.problems) == 2


def test_a_run_that_saved_nothing_is_started_anew(config, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(0)])
    with pytest.raises(UserError, match=r"before it saved a checkpoint.*--config .*settings\.yaml"):
        run(config, f"training.resume_from_checkpoint={tmp_path / 'run'}")


def test_what_a_kill_left_behind_is_taken_away(config, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    for left in (".checkpoint-3.partial", ".checkpoint-2.replaced", ".adapter.partial-123"):
        (tmp_path / "run" / left).mkdir()
    (tmp_path / "run/.metrics.jsonl.partial").write_text("{")
    run(config, f"training.resume_from_checkpoint={tmp_path / 'run'}")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_checkpoint_appears_whole(config, tmp_path, monkeypatch):
    """A full disk in the middle of one leaves the older ones and no part of it."""
    torch_save, calls = torch.save, []

    def fail_at_the_second(value, file, *args, **named):
        calls.append(file)
        if "checkpoint-2" in str(file) and "rng_state" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2")
        torch_save(value, file, *args, **named)

    monkeypatch.setattr(torch, "save", fail_at_the_second)
    with pytest.raises(RunFailed) as raised:
        run(config)
    assert "could not be written to" in str(raised.value)
    assert f"training.resume_from_checkpoint={tmp_path / 'run'}" in str(raised.value)
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
    assert damage(tmp_path / "run/checkpoint-1") == []


def test_older_checkpoints_go_when_the_new_one_is_whole(config, tmp_path, monkeypatch):
    def see(**named):
        there = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
        seen.append((there, [damage(tmp_path / "run" / name) for name in there]))
        rotate(**named)

    seen, rotate = [], trainer_module.rotate_checkpoints
    monkeypatch.setattr(trainer_module, "rotate_checkpoints", see)
    run(config, "training.save_total_limit=1")
    assert [len(there) for there, _ in seen] == [1, 2, 2, 2, 2, 2]
    assert all(problems == [[]] * len(problems) for _, problems in seen)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_another_run_is_not_continued(config, tmp_path, write_rows):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(1)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    with pytest.raises(UserError) as raised:
        run(config, resume, "lora.r=8", "training.seed=7")
    lora, seed = map(str, raised.value.problems)
    assert lora.startswith("lora.r: is 8, but")
    assert seed.startswith("training.seed: is 7, but")
    with pytest.raises(UserError, match=r"is continued\. Leave it out"):
        run(config, resume, f"training.output_dir={tmp_path / 'other'}")
    # Where the adapter goes in the end is no other run: only the next difference is told.
    with pytest.raises(UserError) as raised:
        run(config, resume, "hub.repo_id=me/mine", "training.seed=7")
    assert [problem.where for problem in raised.value.problems] == ["training.seed"]
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(UserError, match=r"1 processes, but .* began with 2"):
        run(config, resume)
    manifest.write_text(manifest.read_text().replace('"processes": 2', '"processes": 1'))
    file = write_rows()
    file.write_text(file.read_text().replace("Apple", "Pear"))
    with pytest.raises(UserError, match="its rows changed"):
        run(config, resume)


def test_other_settings_are_allowed_when_they_are_meant(config, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    longer = ["training.num_train_epochs=4", "training.save_steps=4"]
    with pytest.raises(UserError, match="add --allow-changed"):
        run(config, resume, *longer)
    held = [
        "training.learning_rate=0.5",
        "lora.r=8",
        "training.optim=sgd",
        "training.weight_decay=0.3",
        "training.seed=5",
    ]
    with pytest.raises(UserError) as raised:
        finetune(load_settings(str(config), [resume, *longer, *held]), allow_changed=True)
    assert {str(p).split(":")[0] for p in raised.value.problems} == {
        one.split("=")[0] for one in held
    }
    capsys.readouterr()
    folder = finetune(load_settings(str(config), [resume, *longer]), allow_changed=True)
    assert "changed   training.num_train_epochs is 4, was 3\n" in capsys.readouterr().out
    assert metrics(folder)[-1]["step"] == 8
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [
        *("checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-8")
    ]
    assert yaml.safe_load((folder / "settings.yaml").read_text())["training"]["save_steps"] == 4


def test_an_older_checkpoint_becomes_the_newest(config, tmp_path, capsys):
    whole = run(config, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(3)])
    resume = f"training.resume_from_checkpoint={stopped / 'checkpoint-1'}"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, resume, watchers=[StopAt(1)])
    assert f"set aside {stopped}/superseded-checkpoint-3: its steps" in capsys.readouterr().out
    assert sorted(p.name for p in stopped.glob("checkpoint-*")) == ["checkpoint-1"]
    resumed = run(config, f"training.resume_from_checkpoint={stopped}")
    assert f"resumed   from {stopped}/checkpoint-1\n" in capsys.readouterr().out
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


def test_changes_are_the_runs_own_once_they_are_saved(config, tmp_path, write_rows):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    stopped = tmp_path / "run"
    before = (stopped / "settings.yaml").read_text(), (stopped / "manifest.json").read_text()
    rows = write_rows()
    rows.write_text(rows.read_text().replace("Apple", "Pear"))
    resume = f"training.resume_from_checkpoint={stopped}"
    asked = load_settings(str(config), [resume, "training.num_train_epochs=4"])

    def fail(*_):
        raise RunFailed("out of memory")

    with pytest.raises(RunFailed):
        finetune(asked, allow_changed=True, rehearse=fail)
    assert before == (
        (stopped / "settings.yaml").read_text(),
        (stopped / "manifest.json").read_text(),
    )
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(asked, allow_changed=True, watchers=[StopAt(3)])
    changed = json.loads((stopped / "manifest.json").read_text())["changed"]
    assert [(one["after_step"], len(one["what"])) for one in changed] == [(2, 2)]
    run(stopped / "settings.yaml", resume)  # as it is now
    assert metrics(stopped)[-1]["step"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.per_device_train_batch_size=4"], r"per_device_train_batch_size: is 4.*back\.$"),
        (["training.num_train_epochs=1"], "the run ends with step 2, and .*is behind step 2"),
        (["data.held_out=8:11"], r"data.held_out: is '8:11'.*back\.$"),
    ],
)
def test_what_would_move_or_end_the_run_is_not_allowed(config, tmp_path, overrides, message):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    with pytest.raises(UserError, match=message):
        finetune(load_settings(str(config), [resume, *overrides]), allow_changed=True)


def test_the_same_rows_a_step_in_other_micro_batches_are_allowed(config, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(3)])
    halved = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    folder = finetune(load_settings(str(config), [resume, *halved]), allow_changed=True)
    assert metrics(folder)[-1]["step"] == 6


def test_two_processes_do_not_write_one_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0)

    class Resume(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            if state.global_step == 2:
                with pytest.raises(UserError, match="another process writes"):
                    run(config, f"training.resume_from_checkpoint={tmp_path / 'run'}")
                tried.append(state.global_step)

    tried = []
    run(config, watchers=[Resume()])
    assert tried == [2]


def test_other_rows_are_allowed_when_they_are_meant(config, tmp_path, write_rows):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(1)])
    file = write_rows()
    file.write_text(file.read_text().replace("Apple", "Pear").replace("river", "lake"))
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    finetune(load_settings(str(config), [resume]), allow_changed=True)


def test_a_run_that_computed_otherwise_is_not_continued(config, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(1)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    manifest = tmp_path / "run/manifest.json"
    kept = manifest.read_text()
    for began, message in (
        (
            '"share_openings": false',
            r"data.share_openings: comes to True, but to False .* to false",
        ),
        ('"share_openings": true', None),
        ('"other": 1', None),
    ):
        changed = kept.replace('"share_openings": true', began)
        if message is None:
            changed = changed.replace(f'"layout": {LAYOUT}', '"another": 1')
            message = "^training.resume_from_checkpoint: .* a version that drew other dropout masks"
        assert changed != kept
        manifest.write_text(changed)
        with pytest.raises(UserError, match=message) as raised:
            run(config, resume)
        assert len(raised.value.problems) == 1
    finetune(load_settings(str(config), [resume]), allow_changed=True)
    (told,) = json.loads(manifest.read_text())["changed"]
    assert told["what"] == [
        "micro-batches hold other tokens than those of the version that it began with"
    ]
    assert json.loads(manifest.read_text())["data"]["layout"] == LAYOUT


def test_a_resumed_run_accounts_for_all_its_tokens(config, capsys):
    """3 epochs of 6 rows, each with one token that predicts nothing."""
    run(config)
    (expected,) = account_of(capsys)
    folder = Path(load_settings(str(config)).training["output_dir"])
    shutil.rmtree(folder)
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    assert account_of(capsys) == []
    run(config, f"training.resume_from_checkpoint={folder}")
    assert account_of(capsys) == [expected]
    data = json.loads((folder / "manifest.json").read_text())["data"]
    rows = 3 * data["rows"]
    assert f" of {3 * data['tokens']:,} tokens not computed: " in expected
    assert f" {rows} at the ends of rows" in expected


def test_counts_of_all_processes_are_taken_up_once(tmp_path):
    made, args = RunLog(TokenLoss(), peak_memory=dict), SimpleNamespace(device=torch.device("cpu"))
    made.computed_tokens, made.shared_tokens, made.ending_tokens = 70, 20, 10
    made.file = tmp_path / "metrics.jsonl"
    made.file.touch()
    state = made.state(args, TrainerState(epoch=1.0))
    for main_process, counts in ((True, [70, 20, 10]), (False, [0, 0, 0])):
        log = RunLog(TokenLoss(), peak_memory=dict)
        log.file = made.file
        log.resume(state, main_process=main_process)
        assert list(log.token_counts(args.device).values()) == counts
        assert log.tokens == sum(counts)


def account_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "not computed" in line]


@pytest.mark.parametrize("overrides", [[], ["lora.init_lora_weights=pissa"]])
def test_a_run_does_not_go_on_with_other_weights(config, tmp_path, tiny_checkpoint, overrides):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    overrides = [*overrides, f"model.name_or_path={base}"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, *overrides, watchers=[StopAt(1)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    kept = (base / "model.safetensors").read_bytes()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] *= 1 + 2**-20
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights are others than .* began with"):
        run(config, *overrides, resume)
    (base / "model.safetensors").write_bytes(kept)
    assert run(config, *overrides, resume) == tmp_path / "run"


def test_a_finished_run_is_not_resumed(config):
    folder = run(config)
    with pytest.raises(UserError, match="is finished"):
        run(config, f"training.resume_from_checkpoint={folder}")


def test_nothing_to_resume_is_told(config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint and no run"):
        run(config, f"training.resume_from_checkpoint={tmp_path}")


def test_the_best_checkpoint_is_the_adapter(config, tmp_path):
    """Two rows learned by heart: the held-out loss is best somewhere before the end."""
    folder = run(
        config,
        "training.save_strategy=epoch",
        "training.gradient_accumulation_steps=1",
        "training.num_train_epochs=20",
        "data.rows=0:2",
        "training.learning_rate=0.03",
        "training.load_best_model_at_end=true",
    )
    records = [r for r in metrics(folder) if "eval_loss" in r]
    best = min(records[1:-1], key=lambda r: r["eval_loss"])
    assert best["step"] < records[-2]["step"]
    kept = folder / f"checkpoint-{best['step']}/adapter_model.safetensors"
    assert (folder / WEIGHTS).read_bytes() == kept.read_bytes()
    assert records[-1]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
