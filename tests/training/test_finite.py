"""What is not finite ends the run with exit 3, names itself and is never saved."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback

from recipe import finetune as finetune_module
from recipe.exit_codes import run_command
from recipe.settings import RunFailed, load_settings
from recipe.training.finite import in_words

REPOSITORY = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf
# 12 rows in their order, 2 × 2 a step: 3 steps an epoch. Nothing is logged before the end, so only
# the look at each step can find what is wrong.
TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 1,
}


class At(TrainerCallback):
    """Does ``harm`` to the model at an event of the Trainer, when ``step`` steps were taken."""

    def __init__(self, event, step, harm):
        def call(args, state, control, model=None, **_):
            if state.global_step == step:
                harm(model)

        setattr(self, event, call)


def adapter(model):
    return next(p for name, p in model.named_parameters() if "lora_B" in name)


def token_of(row, rows):
    """A token that no other row has."""
    tokens = [set(r.input_ids.tolist()) for r in rows]
    return min(tokens[row].difference(*tokens[:row], *tokens[row + 1 :]))


def forget_a_token(model):
    """Makes the embedding NaN of a token of row 5, in the first micro-batch of step 2."""
    model.get_input_embeddings().weight.data[token_of(5, model.rows)] = NAN


def gradients_times(factor):
    """Multiplies gradients on their way to the adapter, from now on."""

    def harm(model):
        adapter(model).register_hook(lambda gradient: gradient * factor)

    return harm


def adapter_becomes(value):
    def harm(model):
        adapter(model).data[0, 0] = value

    return harm


@pytest.fixture
def trainer(monkeypatch):
    """What the run's Trainer is, once it was built; the model knows its rows."""
    kept = {}
    build = finetune_module.build_trainer

    def build_and_keep(model, arguments, train, *rest, **named):
        model.rows = train
        kept["trainer"] = build(model, arguments, train, *rest, **named)
        return kept["trainer"]

    monkeypatch.setattr(finetune_module, "build_trainer", build_and_keep)
    return lambda: kept["trainer"]


@pytest.fixture
def run(write_config, trainer):
    def run(*watchers, overrides=(), **sections):
        training = {**TRAINING, **sections.pop("training", {})}
        config = write_config(training=training, **sections)
        return finetune_module.finetune(load_settings(str(config), overrides), watchers=watchers)

    return run


def saved_steps(folder):
    """The steps of the checkpoints, all whole and finite; no adapter, nothing but numbers."""
    checkpoints = sorted(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert (checkpoint / "sha256.json").is_file()
    assert not (folder / "adapter").exists()
    for text in folder.rglob("*.json*"):
        assert not {"NaN", "Infinity"} & set(text.read_text().replace(",", " ").split())
    return [int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in checkpoints]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def notes(folder):
    return [(r["step"], r["note"]) for r in records(folder) if "note" in r]


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
    assert result.stderr.count(message) == 2, result.stderr
    assert "exitcode  : 3" in result.stderr
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


class Kwargs(TrainerCallback):
    """Keeps the names that the model's forward is called with."""

    names: frozenset = frozenset()

    def on_train_begin(self, args, state, control, model=None, **_):
        def keep(module, arguments, named):
            self.names |= named.keys()

        model.register_forward_pre_hook(keep, with_kwargs=True)


def test_a_sound_run_warns_of_nothing_and_the_model_sees_no_indices(run, trainer, capsys):
    kwargs = Kwargs()
    data = {"rows": "0:8", "held_out": "8:12"}
    folder = run(kwargs, data=data, training={"eval_strategy": "epoch", "warmup_steps": 2})
    assert "warning" not in capsys.readouterr().out
    assert notes(folder) == []
    assert "row_lengths" in kwargs.names
    assert "row_indices" not in kwargs.names
    assert not trainer().answers_unchanged(trainer().train_dataset[0])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # Far from the base after one step, and the loss grows without bound.
        (
            {"lora": {"target_modules": ["o_proj", "lm_head"]}, "training": {"learning_rate": 1e6}},
            [(1, "grown"), (2, "exploded")],
        ),
        ({"training": {"learning_rate": 1e6}}, [(1, "grown")]),
        # Attention saturates, and no gradient comes back.
        ({"training": {"learning_rate": 1e30}}, [(1, "grown"), (2, "frozen")]),
    ],
)
def test_a_learning_rate_that_destroys_the_adapter_is_said_once(run, capsys, sections, expected):
    folder = run(**sections)
    assert notes(folder) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == len(expected)
    rate = sections["training"]["learning_rate"]
    assert all(f"Lower training.learning_rate (now {rate:g})." in line for line in lines)
    assert [f"warning   {r['line']}" for r in records(folder) if "note" in r] == lines


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_has_noted_what_the_whole_one_did(run, tmp_path, step):
    def stop(model):
        raise RuntimeError("power cut")

    training = {"learning_rate": 1e6, "num_train_epochs": 1}
    lora = {"target_modules": ["o_proj", "lm_head"]}
    outputs = [f"training.output_dir={tmp_path / name}" for name in ("whole", "stopped")]
    whole = run(lora=lora, training=training, overrides=outputs[:1])
    with pytest.raises(RuntimeError, match="power cut"):
        run(At("on_substep_end", step, stop), lora=lora, training=training, overrides=outputs[1:])
    resume = f"training.resume_from_checkpoint={tmp_path / 'stopped'}"
    resumed = run(lora=lora, training=training, overrides=[*outputs[1:], resume])
    assert notes(resumed) == notes(whole) == [(1, "grown"), (2, "exploded")]
    lines = [[r["line"] for r in records(f) if "note" in r] for f in (resumed, whole)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"learning_rate": 1e-12}},
        {"training": {"learning_rate": 1e-12, "warmup_steps": 2}},
        {"training": {"learning_rate": 1e-12, "bf16": True}},
        {"training": {"learning_rate": 1e-12}, "lora": {"lora_dropout": 0.5}},
    ],
)
def test_an_adapter_too_small_to_matter_leaves_the_answers_unchanged(run, trainer, sections):
    folder = run(**sections)
    assert [kind for _, kind in notes(folder)] == ["unchanged"]
    model, row = trainer().model, trainer().train_dataset[0]
    model.train()
    model.get_base_model().model.norm.eval()
    modes = [module.training for module in model.modules()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    random = torch.get_rng_state()
    assert trainer().answers_unchanged(row)
    assert [module.training for module in model.modules()] == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert not trainer().answers_unchanged(row)  # it is switched on again


@pytest.mark.parametrize("lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_an_adapter_that_took_its_start_out_of_the_base_always_matters(run, trainer, lora):
    run(lora=lora)
    assert not trainer().answers_unchanged(trainer().train_dataset[0])


def test_rows_in_words():
    assert in_words([7]) == "row 7"
    assert in_words([9, 2, 9]) == "rows 2, 9"
    assert in_words(range(12)) == "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
