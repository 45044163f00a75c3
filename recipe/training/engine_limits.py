"""What a config asks for that an engine which shards would not do, or would do otherwise."""

import os
from collections.abc import Iterator

from recipe.settings import Problem, Settings
from recipe.training.engine import Engine

_WHERE = "accelerate launch"
# Of each value its own state, so that flat parts of parameters are updated as whole ones would be.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
_WHOLE_MODULES = ("modules_to_save", "trainable_token_indices", "use_dora")
_NEVER = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params, which this version does not do. Set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing, which belongs to the config. "
    "Set training.gradient_checkpointing there",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag, with which no process could check the "
    "base's weights. Set it to false",
}


def limits(settings: Settings, engine: Engine, *, on_cpu: bool) -> Iterator[Problem]:
    """Each with what to do about it; none without shards."""
    if not engine.shards:
        return
    yield from _of_the_launcher(engine, on_cpu=on_cpu)
    yield from _of_any(settings, engine)
    if engine.shards_weights:
        yield from _of_cut_weights(settings, engine)


def _of_the_launcher(engine: Engine, *, on_cpu: bool) -> Iterator[Problem]:
    if engine.name == "fsdp2" and on_cpu:
        yield Problem(
            _WHERE,
            "asks for FSDP2, which accelerate does on GPUs only: on a CPU it would silently run "
            "DDP. Use launch/ddp.yaml, or launch/zero3.yaml, which shards on a CPU too.",
        )
    for variable, what in _NEVER.items():
        if os.environ.get(variable, "false").lower() == "true":
            yield Problem(_WHERE, f"asks for {what}.")


def _of_any(settings: Settings, engine: Engine) -> Iterator[Problem]:
    training = settings.training
    optim = str(training.get("optim") or _OPTIMIZERS[0])
    if optim not in _OPTIMIZERS:
        yield Problem(
            "training.optim",
            f"{optim} would update parts of parameters otherwise than whole ones under "
            f"{engine.name}. Use one of {', '.join(_OPTIMIZERS)}, or start with launch/ddp.yaml.",
        )
    if training.get("fp16"):
        yield Problem(
            "training.fp16",
            f"its scaler looks at whole gradients, and {engine.name} has parts. Use "
            "training.bf16=true training.fp16=false, or start with launch/ddp.yaml.",
        )
    start = settings.lora.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        yield Problem(
            "lora.init_lora_weights",
            f"{start} is taken out of a base that {engine.name} has not placed yet, or cuts. Leave "
            "it out, or start with launch/ddp.yaml.",
        )


def _of_cut_weights(settings: Settings, engine: Engine) -> Iterator[Problem]:
    instead = "Leave it out, or start with launch/zero2.yaml or launch/ddp.yaml."
    if settings.model.quantization is not None:
        yield Problem(
            "model.quantization",
            f"{engine.name} would cut packed 4-bit and 8-bit weights apart. {instead}",
        )
    for key in _WHOLE_MODULES:
        if settings.lora.get(key):
            yield Problem(f"lora.{key}", f"needs weights whole, and {engine.name} cuts. {instead}")
