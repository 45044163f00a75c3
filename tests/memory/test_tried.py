"""A second start does not try again what went through, and tries whatever may be another."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_run_that_goes_on_has_tried_it(start, tmp_path):
    def name(*overrides):
        return tried.circumstances(load_settings(str(start.config), overrides), "rows", "base")

    resumed = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    assert name(resumed) == name() != name("lora.r=8")
    other = tried.circumstances(load_settings(str(start.config)), "rows", "other base")
    assert other != name()


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


@pytest.mark.parametrize("what", ["version", "code", "environment", "threads", "node", "limit"])
def test_another_machine_or_version_is_tried(start, steps, monkeypatch, tmp_path, what):
    start()
    if what == "version":
        monkeypatch.setattr(tried, "version", lambda name: f"{name} of another day")
    elif what == "code":
        (tmp_path / "code").mkdir()
        (tmp_path / "code/step.py").write_text("changed")
        monkeypatch.setattr(tried.recipe, "__file__", str(tmp_path / "code/__init__.py"))
    elif what == "environment":
        monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    elif what == "node":
        monkeypatch.setattr(tried.platform, "node", lambda: "another")
    else:
        (tmp_path / "memory.max").write_text("1000000\n")
        monkeypatch.setattr(tried, "_LIMIT_OF_CONTAINER", tmp_path / "memory.max")
    start()
    assert len(steps) == 2


def test_it_is_tried_where_less_memory_is_free_than_it_took(start, steps, monkeypatch, tmp_path):
    start()
    (file,) = written(tmp_path)
    taken = json.loads(file.read_text())["taken"]
    for free, tries in ((taken, 1), (taken - 1, 2), (None, 3)):
        monkeypatch.setattr(tried, "free_memory", lambda device, free=free: free)
        start()
        assert len(steps) == tries
    assert probe.free_memory("cpu") > 2**26
    assert probe.free_memory("mps") is None


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
    """Taken is how far the peak rises, which is nothing below a peak of before."""
    trial = tried.Trial(tmp_path, "cpu", "name")
    peak = probe.peak_memory("cpu")["resident"] + 2**26
    block = torch.ones((peak - probe.resident()) // 4)
    trial.note(5, 7)
    found = trial.before()
    assert (found.tokens, found.saved) == (5, 7)
    assert found.taken >= block.nbytes - 2**22
