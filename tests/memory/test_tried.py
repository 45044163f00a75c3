"""A second start does not try again what went through, and tries whatever may be another."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from recipe import rehearsal
from recipe.finetune import finetune
from recipe.memory import probe, tried
from recipe.memory.watch import MemoryWatch
from recipe.settings import RunFailed, load_settings
from recipe.training.trainer import TokenWeightedTrainer
from tests.conftest import ROWS
from tests.training.test_resume import WEIGHTS, metrics

AGAIN = r"rehearsed longest micro-batch \(2 rows, (\d+) tokens; it went through on (\S+), and "
ANEW = r"rehearsed longest micro-batch \(2 rows, (\d+) tokens\), "


@pytest.fixture
def steps(monkeypatch):
    """Those that were tried."""
    made, step = [], TokenWeightedTrainer.rehearse_step

    def counted(self, rows, forward=None):
        made.append(len(rows))
        return step(self, rows, forward)

    monkeypatch.setattr(TokenWeightedTrainer, "rehearse_step", counted)
    return made


@pytest.fixture
def start(write_config, tmp_path, capsys):
    """A run in a folder of its own; what it said, and the folder."""
    config = write_config(
        lora={"lora_dropout": 0.1},
        data={"rows": "0:9"},
        training={"per_device_train_batch_size": 2, "num_train_epochs": 1},
    )

    def run(*overrides):
        watch = MemoryWatch()
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        folder = finetune(
            load_settings(str(config), [f"training.output_dir={folder}", *overrides]),
            rehearse=partial(rehearsal.rehearse, memory=watch, known=tmp_path / "known"),
            memory=watch,
        )
        return capsys.readouterr().out, folder

    run.config = config
    return run


@pytest.fixture(autouse=True)
def memory_enough(monkeypatch):
    """The peak is that of a process which has run other tests before."""
    monkeypatch.setattr(tried, "free_memory", lambda device: 2**50)


def written(tmp_path):
    return sorted((tmp_path / "known").glob("*"))


def test_a_second_start_is_the_same_run_without_the_trial(start, steps, tmp_path):
    first, one = start()
    assert steps == [2]
    second, other = start()
    assert steps == [2]
    tokens = re.search(ANEW, first)[1]
    assert re.search(AGAIN, second).groups() == (tokens, json_date(tmp_path))
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert metrics(one) == metrics(other)
    told = [json.loads((run / "manifest.json").read_text())["memory"] for run in (one, other)]
    assert told[0]["items"] == told[1]["items"]
    assert told[1]["items"]["saved activations"]["measured"] > 0
    # The rest is rehearsed as ever.
    assert "checkpoint saved and reopened, generation · " in second


def json_date(tmp_path) -> str:
    (file,) = written(tmp_path)
    return json.loads(file.read_text())["date"]


def test_a_run_that_goes_on_is_tried(start, steps, capsys, monkeypatch, tmp_path):
    """Its longest micro-batch may lie behind it."""
    saving = "training.save_strategy=steps", "training.save_steps=2"
    start(*saving)
    _, run = start(*saving)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-5")
    watch = MemoryWatch()
    resumed = f"training.resume_from_checkpoint={run}"
    finetune(
        load_settings(str(run / "settings.yaml"), [resumed]),
        rehearse=partial(rehearsal.rehearse, memory=watch, known=tmp_path / "known"),
        memory=watch,
    )
    assert f"resumed   from {run}/checkpoint-4" in capsys.readouterr().out
    assert len(steps) == 2


@pytest.mark.parametrize(
    "override",
    [
        "training.gradient_checkpointing=true",
        "training.per_device_train_batch_size=3",
        "training.seed=7",  # its micro-batches are others
        "data.rows=0:8",
        "lora.r=8",
        "model.dtype=bfloat16",
    ],
)
def test_another_setting_is_tried(start, steps, override):
    start()
    said, _ = start(override)
    assert len(steps) == 2
    assert re.search(r"micro-batch \(\d rows, \d+ tokens\), ", said)


@pytest.mark.parametrize("override", ["hub.private=true", "judging.rows=3"])
def test_what_changes_no_step_is_not_tried(start, steps, override):
    start()
    said, _ = start(override)
    assert re.search(AGAIN, said)
    assert steps == [2]


def test_other_rows_in_the_same_file_are_tried(start, steps, write_rows):
    start()
    write_rows([{**row, "output": row["output"] + " Yes"} for row in ROWS])
    start()
    assert len(steps) == 2


def test_another_base_under_the_same_name_is_tried(start, steps, tiny_checkpoint, tmp_path):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    start(f"model.name_or_path={base}")
    weights = load_file(base / "model.safetensors")
    changed = {name: one * 1.5 for name, one in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    start(f"model.name_or_path={base}")
    assert len(steps) == 2


def test_another_config_with_the_same_weights_is_tried(start, steps, tiny_checkpoint, tmp_path):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    start(f"model.name_or_path={base}")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    start(f"model.name_or_path={base}")
    assert len(steps) == 2


def another_code(patch, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/step.py").write_text("changed")
    (tmp_path / "code/.#step.py").symlink_to("nothing")  # as an editor leaves it
    patch.setattr(tried.recipe, "__file__", str(tmp_path / "code/__init__.py"))


ANOTHER = {
    "version": lambda patch, _: patch.setattr(tried, "version", lambda name: f"{name} 0.0"),
    "code": another_code,
    "malloc": lambda patch, _: patch.setenv("MALLOC_ARENA_MAX", "1"),
    "launcher": lambda patch, _: patch.setenv("ACCELERATE_USE_CPU", "true"),
    "threads": lambda patch, _: patch.setattr(torch, "get_num_threads", lambda: 61),
    "node": lambda patch, _: patch.setattr(tried.platform, "node", lambda: "another"),
    "memory": lambda patch, _: patch.setattr(
        tried.psutil, "virtual_memory", lambda: SimpleNamespace(total=1)
    ),
    "engine": lambda patch, _: patch.setattr(
        rehearsal, "asked_engine", lambda: SimpleNamespace(name="zero2")
    ),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_another_machine_or_version_is_tried(start, steps, monkeypatch, tmp_path, what):
    start()
    with monkeypatch.context() as patch:
        ANOTHER[what](patch, tmp_path)
        start()
    assert len(steps) == 2


def test_each_start_of_a_launcher_is_the_same(start, steps, monkeypatch):
    for number in "12":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", number)
        start()
    assert steps == [2]


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_try_each_time(processes, tmp_path):
    run = SimpleNamespace(
        arguments=SimpleNamespace(device=torch.device("cpu"), world_size=processes),
        data=SimpleNamespace(tokens_sha256="rows"),
        base_sha256="base",
        model=SimpleNamespace(config=LlamaConfig()),
        settings=load_settings("starter.yaml"),
    )
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0))
    assert (rehearsal._trial(trainer, run, tmp_path) is None) == (processes > 1)


def test_it_is_tried_where_less_memory_is_free_than_it_took(start, steps, monkeypatch, tmp_path):
    start()
    (file,) = written(tmp_path)
    peak = json.loads(file.read_text())["peak"]
    monkeypatch.setattr(tried, "held", lambda device: 1000)
    for free, tries in ((peak - 1000, 1), (peak - 1001, 2), (None, 3)):
        monkeypatch.setattr(tried, "free_memory", lambda device, free=free: free)
        start()
        assert len(steps) == tries


def test_what_failed_is_tried_again(start, steps, monkeypatch, tmp_path):
    def lack(self):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(TokenWeightedTrainer, "compute_loss_context_manager", lack)
        with pytest.raises(RunFailed, match="out of memory"):
            start()
    assert not written(tmp_path)
    start()
    assert len(steps) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"date": "2026-01-01", "tokens": 3, "saved": "1", "taken": 1}'],
)
def test_a_damaged_note_is_none(start, steps, tmp_path, text):
    start()
    (file,) = written(tmp_path)
    file.write_text(text)
    start()
    assert len(steps) == 2
    assert json.loads(file.read_text())["tokens"] > 0


def test_a_folder_that_cannot_be_written_costs_no_run(start, steps, tmp_path):
    (tmp_path / "known").write_text("a file")
    start()
    _, run = start()
    assert len(steps) == 2
    assert (run / WEIGHTS).is_file()


def test_the_note_holds_what_was_seen(tmp_path):
    trial = tried.Trial(tmp_path / "new", "cpu", "name")
    assert trial.before() is None
    block = torch.ones((probe.peak_memory("cpu")["resident"] - probe.resident() + 2**26) // 4)
    before = probe.resident()
    trial.note(5, 7)
    found = trial.before()
    assert (found.tokens, found.saved) == (5, 7)
    assert found.peak >= max(before - 2**20, block.nbytes)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["name.json"]


def test_a_note_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    tried.Trial(tmp_path, "cpu", "name").note(5, 7)
    assert not list(tmp_path.iterdir())
