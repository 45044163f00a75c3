"""Ways to poison a run from outside, and what is left of it afterwards."""

import json
import math

from safetensors.torch import load_file
from transformers import TrainerCallback

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
