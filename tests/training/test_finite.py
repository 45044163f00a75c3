"""What is not finite ends the run with exit 3, names itself and is never saved."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe import finetune as finetune_module
from recipe.exit_codes import run_command
from recipe.settings import RunFailed
from recipe.training.finite import in_words
from tests.training.harm import (
    INF,
    NAN,
    TRAINING,
    At,
    adapter_becomes,
    forget_a_token,
    gradients_times,
    saved_steps,
    token_of,
)

REPOSITORY = Path(__file__).parents[2]
HARMS = {
    "loss of one micro-batch": (
        At("on_step_begin", 1, forget_a_token),
        r"the loss of rows 4, 5 is nan at step 2, so that step is not taken\. "
        r"model\.embed_tokens\.weight of the base is not finite\. Use a whole copy",
    ),
    "loss of both micro-batches": (
        At("on_step_begin", 1, adapter_becomes(NAN)),
        r"the loss of rows 4, 5, 6, 7 is nan at step 2, so that .* Lower training\.learning_rate",
    ),
    "gradient NaN": (
        At("on_step_begin", 1, gradients_times(NAN)),
        r"the gradient norm is nan at step 2 \(rows 4, 5, 6, 7\) though every loss is finite",
    ),
    "gradient infinite": (
        At("on_step_begin", 1, gradients_times(INF)),
        r"the gradient norm is (nan|inf) at step 2 \(rows 4, 5, 6, 7\)",
    ),
    "norm of a finite gradient infinite": (
        At("on_step_begin", 1, gradients_times(1e30)),
        r"the gradient norm is inf at step 2",
    ),
    "adapter NaN after the step": (
        At("on_optimizer_step", 1, adapter_becomes(NAN)),
        r"q_proj\.lora_B\.default\.weight of the adapter is not finite after step 2 "
        r"\(rows 4, 5, 6, 7\), so that step is not saved",
    ),
    "adapter infinite at the end of the step": (
        At("on_step_end", 2, adapter_becomes(-INF)),
        r"q_proj\.lora_B\.default\.weight of the adapter is not finite after step 2",
    ),
}


@pytest.mark.parametrize(
    ("name", "max_grad_norm"),
    [(name, 1.0) for name in HARMS] + [(name, 0.0) for name in HARMS if "gradient" in name],
)
def test_the_step_that_is_not_finite_is_the_last_and_is_not_saved(
    run, tmp_path, name, max_grad_norm
):
    harm, message = HARMS[name]
    with pytest.raises(RunFailed, match=message):
        run(harm, overrides=[f"training.max_grad_norm={max_grad_norm}"])
    assert saved_steps(tmp_path / "run") == [1]


def test_a_learning_rate_beyond_float32_breaks_the_adapter_itself(run, tmp_path):
    with pytest.raises(RunFailed, match=r"and 7 more of the adapter is not finite after step 1"):
        run(training={"learning_rate": 1e39})
    assert saved_steps(tmp_path / "run") == []


def test_exit_code_3_and_one_message(run, tmp_path, capsys):
    assert run_command(lambda: run(At("on_step_begin", 1, forget_a_token))) == 3
    errors = capsys.readouterr().err
    (message,) = [line for line in errors.splitlines() if "step" in line]
    assert message.startswith("the loss of rows 4, 5 is nan at step 2")
    assert "Traceback" not in errors
    assert saved_steps(tmp_path / "run") == [1]


def broken_copy(checkpoint, folder, tensor="model.norm.weight", at=0):
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[tensor][at] = NAN
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"name_or_path": str(folder)}


def test_a_base_that_is_not_finite_is_named_before_the_first_step(run, tiny_checkpoint, tmp_path):
    broken = broken_copy(tiny_checkpoint, tmp_path / "broken")
    said = r"is nan at step {}.* model\.norm\.weight of the base is not finite\. Use a whole copy"
    with pytest.raises(
        RunFailed, match=r"the held-out loss of rows 8, 9, 10, 11 " + said.format(0)
    ):
        run(model=broken, data={"rows": "0:8", "held_out": "8:12"})
    assert saved_steps(tmp_path / "run") == []
    output = f"training.output_dir={tmp_path / 'second'}"
    with pytest.raises(RunFailed, match=r"the loss of rows 0, 1, 2, 3 " + said.format(1)):
        run(model=broken, data={"rows": None, "held_out": None}, overrides=[output])
    assert saved_steps(tmp_path / "second") == []


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (At("on_train_begin", 0, adapter_becomes(NAN)), "is nan at step 1, .* Nothing has been"),
        (At("on_epoch_end", 2, adapter_becomes(NAN)), "rows 8, 9 is nan at step 2. Lower train"),
    ],
)
def test_what_to_do_depends_on_whether_anything_was_trained(run, tmp_path, harm, message):
    data = {"rows": "0:8", "held_out": "8:10"}
    with pytest.raises(RunFailed, match=message):
        run(harm, data=data, training={"eval_strategy": "epoch", "save_strategy": "epoch"})
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_with_the_same_words(
    run, trainer, tiny_checkpoint, tmp_path, write_config
):
    run(training={"max_steps": 1, "output_dir": str(tmp_path / "tokens")})
    token = token_of(7, trainer().train_dataset)  # of step 2, on the second process alone
    broken = broken_copy(tiny_checkpoint, tmp_path / "broken", "model.embed_tokens.weight", token)
    config = write_config(model=broken, training=TRAINING)
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    result = subprocess.run(
        [torchrun, "--nproc_per_node=2", "recipe/train.py", "--config", str(config)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode
    message = "the loss of rows 6, 7 is nan at step 2, so that step is not taken. model.embed_tok"
    # The second process would tell, with its rank, what is not word for word what the first told.
    assert result.stderr.count(message) == 1, result.stderr
    assert not re.search(r"^rank 1\b", result.stderr, re.MULTILINE), result.stderr
    assert result.stderr.count("exitcode  : 3") == 2
    assert saved_steps(tmp_path / "run") == [1]


@pytest.fixture
def scaled(monkeypatch):
    """Makes every run behave as fp16 on a GPU does, beginning with a scale that overflows."""
    build = finetune_module.build_trainer

    def with_scaler(*arguments, **named):
        trainer = build(*arguments, **named)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        return trainer

    monkeypatch.setattr(finetune_module, "build_trainer", with_scaler)


@pytest.mark.parametrize(
    ("harm", "message", "steps"),
    [
        # The forward does not depend on the scale.
        (forget_a_token, "the loss of rows 4, 5 is nan at step 2", [1]),
        # 16, 8, 4, 2 and 1 may have been too much; half of the loss may not.
        (
            gradients_times(INF),
            r"the gradient norm is (nan|inf) at step 7 .* the fp16 scaler's scale is down to 0\.5",
            [1, 2, 3, 4, 5, 6],
        ),
        # A scaler looks at the values, and clipping by an infinite norm writes zeros.
        (gradients_times(1e30), "the gradient norm of step 2 overflowed float32", [1]),
    ],
)
def test_an_fp16_scaler_may_skip_only_what_its_scale_overflowed(
    run, scaled, tmp_path, harm, message, steps
):
    with pytest.raises(RunFailed, match=message):
        run(At("on_step_begin", 1, harm), training={"num_train_epochs": 4})
    checkpoints = (tmp_path / "run").glob("checkpoint-*")
    assert sorted(int(c.name.removeprefix("checkpoint-")) for c in checkpoints) == steps
    assert not (tmp_path / "run/adapter").exists()


def test_rows_in_words():
    assert in_words([7]) == "row 7"
    assert in_words([9, 2, 9]) == "rows 2, 9"
    assert in_words(range(12)) == "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
