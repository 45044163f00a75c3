"""Stopped and resumed is the same run, to the last bit; anything else is refused."""

import json

import pytest
from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.settings import UserError, load_settings

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


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resumed_is_uninterrupted(config, tmp_path, step):
    whole = run(config, f"training.output_dir={tmp_path / 'whole'}")
    stopped = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, f"training.output_dir={stopped}", watchers=[StopAt(step)])
    assert not (stopped / "adapter").exists()
    resumed = run(config, f"training.resume_from_checkpoint={stopped}")
    assert resumed == stopped
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(resumed) == metrics(whole)


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
def test_a_damaged_checkpoint_is_refused(config, tmp_path, harm, message):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(2)])
    harm(tmp_path / "run/checkpoint-2")
    with pytest.raises(UserError, match=message):
        run(config, f"training.resume_from_checkpoint={tmp_path / 'run'}")


def test_another_run_is_not_continued(config, tmp_path, write_rows):
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, watchers=[StopAt(1)])
    resume = f"training.resume_from_checkpoint={tmp_path / 'run'}"
    with pytest.raises(UserError) as raised:
        run(config, resume, "lora.r=8", "training.seed=7")
    lora, seed = map(str, raised.value.problems)
    assert lora.startswith("lora.r: is 8, but")
    assert seed.startswith("training.seed: is 7, but")
    file = write_rows()
    file.write_text(file.read_text().replace("Apple", "Pear"))
    with pytest.raises(UserError, match="its rows changed"):
        run(config, resume)


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
