"""A run is continued from a checkpoint without running what stands in it."""

import io
import json
import shutil
import zipfile

import pytest
import torch
import yaml
from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.settings import load_settings
from recipe.training.checkpoints import find_checkpoint
from tests.conftest import ROWS
from tests.untrusted.payload import edit, pickled, reseal, zipped


class StopBehindTheFirstStep(TrainerCallback):
    """Ends the run when its first checkpoint is there."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_checkpoint):
    """A run that was stopped after one of its two steps, and its config."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "rows.json").write_text(json.dumps(ROWS[:8]))
    config = {
        "model": {"name_or_path": str(tiny_checkpoint), "dtype": "float32"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"path": str(folder / "rows.json")},
        "training": {
            "use_cpu": True,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    where = f"training.output_dir={folder / 'run'}"
    settings = load_settings(str(folder / "config.yaml"), [where])
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(settings, watchers=[StopBehindTheFirstStep()])
    return folder


@pytest.fixture
def run(stopped, tmp_path, nothing_runs):
    return shutil.copytree(stopped / "run", tmp_path / "run")


@pytest.fixture
def checkpoint(run):
    return run / "checkpoint-1"


@pytest.fixture
def resume(stopped, run):
    def resume():
        keys = ("output_dir", "resume_from_checkpoint")
        where = [f"training.{key}={run}" for key in keys]
        return finetune(load_settings(str(stopped / "config.yaml"), where))

    return resume


def files(folder):
    return {
        path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))
    }


def test_an_unchanged_one_is_resumed_and_its_training_args_are_not_read(checkpoint, marker, resume):
    pickled(checkpoint, marker, "training_args.bin")
    reseal(checkpoint)
    assert find_checkpoint(str(checkpoint)).folder == checkpoint
    assert (resume() / "adapter/adapter_model.safetensors").is_file()


PICKLES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth")


@pytest.mark.parametrize("name", PICKLES)
def test_a_payload_is_named_and_nothing_is_written(run, checkpoint, marker, resume, refused, name):
    zipped(checkpoint, marker, name)
    reseal(checkpoint)
    before = files(run)
    assert f"{name}: would run posix.mkdir when it is read" in refused(resume)
    assert files(run) == before


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_torch_did_not_write_is_refused(checkpoint, marker, refused, name):
    pickled(checkpoint, marker, name)
    reseal(checkpoint)
    assert f"{name}: not readable as" in refused(find_checkpoint, str(checkpoint))


def rewritten(name, state, change):
    """What ``torch.save`` makes of ``state``, with ``change`` applied to each of its entries."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(name, "w") as evil:
        for entry in plain.namelist():
            content = change(entry, plain.read(entry))
            if content is not None:
                evil.writestr(entry, content)


def hidden(name, marker):
    """A pickle that makes the name of what it calls on the way."""
    call = b"\x80\x02X\x05\x00\x00\x00posixX\x05\x00\x00\x00mkdir\x93"
    path = str(marker).encode()
    call += b"X" + len(path).to_bytes(4, "little") + path + b"\x85R."
    rewritten(name, {}, lambda entry, held: call if entry.endswith("data.pkl") else held)


def test_the_hidden_call_is_live(tmp_path, marker):
    hidden(tmp_path / "x.pt", marker)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()


def test_a_call_that_names_no_global_is_refused(checkpoint, marker, refused):
    hidden(checkpoint / "optimizer.pt", marker)
    reseal(checkpoint)
    assert "optimizer.pt: not readable as" in refused(find_checkpoint, str(checkpoint))


def test_tensors_that_are_not_in_the_file_are_missed(checkpoint, refused):
    def without_tensors(entry, held):
        return None if entry.endswith("data/0") else held

    rewritten(checkpoint / "optimizer.pt", {"x": torch.ones(3)}, without_tensors)
    reseal(checkpoint)
    assert "optimizer.pt: not readable as" in refused(find_checkpoint, str(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",  # the Trainer takes it before the adapter
        "model.safetensors",  # and this
        "adapter_model.bin",
        "optimizer.bin",
        "custom_checkpoint_0.pkl",
        "rng_state_x.pth",
        "other/adapter_model.bin",  # another adapter to the Trainer
        "other/adapter_model.safetensors",
        "global_step1/mp_rank_00_model_states.pt",  # DeepSpeed's, which it reads without a check
    ],
)
def test_a_file_that_no_run_writes_is_refused(checkpoint, marker, refused, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    zipped(checkpoint, marker, name)
    reseal(checkpoint)
    assert f"{name}: no file of a checkpoint" in refused(find_checkpoint, str(checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "run_log.json",
    ],
)
def test_a_file_that_every_run_writes_is_missed(checkpoint, refused, name):
    """Without its optimizer, the Trainer would begin with a new one and say nothing."""
    (checkpoint / name).unlink()
    reseal(checkpoint)
    assert f"{name}: missing" in refused(find_checkpoint, str(checkpoint))


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"evil": 1}', b'{"global_step": "1"}']
)
def test_a_state_of_another_kind_is_refused(checkpoint, refused, content):
    (checkpoint / "trainer_state.json").write_bytes(content)
    reseal(checkpoint)
    refused(find_checkpoint, str(checkpoint))


@pytest.mark.parametrize("best", ["{elsewhere}", "/", 7, ["x"]])
def test_the_best_checkpoint_is_one_of_the_run(checkpoint, tmp_path, refused, best):
    (tmp_path / "elsewhere/checkpoint-1").mkdir(parents=True)
    if isinstance(best, str):
        best = best.format(elsewhere=tmp_path / "elsewhere/checkpoint-1")
    edit(checkpoint / "trainer_state.json", best_model_checkpoint=best)
    reseal(checkpoint)
    assert "trainer_state.json: " in refused(find_checkpoint, str(checkpoint))


@pytest.mark.parametrize("best", ["checkpoint-0", "\0"])
def test_the_best_checkpoint_is_missed_where_it_is_needed(checkpoint, refused, best):
    edit(checkpoint / "trainer_state.json", best_model_checkpoint=best)
    reseal(checkpoint)
    find_checkpoint(str(checkpoint))
    assert "is not there" in refused(find_checkpoint, str(checkpoint), best_needed=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.yaml", b"name: !!python/object/apply:os.mkdir ['MARK']"),
        ("settings.yaml", b"- 1"),
        ("settings.yaml", b"\xff"),
        ("settings.yaml", b"[" * 100_000),
        ("manifest.json", b"[]"),
        ("manifest.json", b"{}"),
        ("manifest.json", b'{"data": 3}'),
        ("manifest.json", b"[" * 100_000),
    ],
)
def test_a_run_that_does_not_say_how_it_began_is_refused(
    run, marker, resume, refused, name, content
):
    (run / name).write_bytes(content.replace(b"MARK", str(marker).encode()))
    assert "do not say how it began" in refused(resume)


def test_the_seal_names_nothing_outside(run, checkpoint, refused):
    edit(checkpoint / "sha256.json", **{"../settings.yaml": "x", "/dev/zero": "x"})
    assert refused(find_checkpoint, str(run)).count("not inside the folder") == 2
