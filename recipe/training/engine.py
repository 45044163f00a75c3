"""Which engine trains, as the launcher asks for it, and whether that is what runs.

The launch file reaches each process as variables of its environment. accelerate and the Trainer
follow them where they can, and silently run something else where they cannot.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from recipe.model.shards import is_sharded
from recipe.settings import UserError
from recipe.training.arguments import world_size

_WHERE = "accelerate launch"
_ON = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Engine:
    """``name`` is ``single``, ``ddp``, ``fsdp2``, ``zero2`` or ``zero3``."""

    name: str

    @property
    def deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def shards(self) -> bool:
        """Whether a process holds only a part of the optimizer's states, or of more."""
        return self.name == "fsdp2" or self.deepspeed

    @property
    def shards_weights(self) -> bool:
        return self.name in ("fsdp2", "zero3")


SINGLE = Engine("single")


def asked_engine() -> Engine:
    """What the launcher asks for.

    Raises:
        UserError: something that this recipe does not train with.
    """
    if _on("ACCELERATE_USE_DEEPSPEED"):
        return Engine(f"zero{_zero_stage()}")
    if _on("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError.single(
                _WHERE,
                f"asks for FSDP {version}, whose flat parameters mix base and adapter. Set "
                "fsdp_version: 2, as launch/fsdp2.yaml does.",
            )
        return Engine("fsdp2")
    return Engine("ddp" if world_size() > 1 else "single")


def load_engine(engine: Engine) -> None:
    """Import what the engine needs, before anything else does.

    Raises:
        UserError: DeepSpeed is asked for and not installed.
    """
    if not engine.deepspeed:
        return
    if find_spec("deepspeed") is None:
        raise UserError.single(
            _WHERE, f"asks for {engine.name}, and DeepSpeed is not installed. Run make deepspeed."
        )
    import deepspeed

    # Without a GPU it would compile a faster way between processes of one machine, in every process
    # at once, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_whole(engine: Engine) -> None:
    """Let what is loaded from now on be whole, so that it can be checked; the engine cuts it later.

    transformers would cut it at once under ZeRO-3, whatever zero3_init_flag says, and cast it to
    what DeepSpeed is told to compute in.
    """
    if engine.deepspeed:
        unset_hf_deepspeed_config()


def loads_weights(engine: Engine) -> bool:
    """Whether this process loads the base; FSDP2 can hand out what the first one alone has."""
    shared = engine.name == "fsdp2" and _on("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return not shared or os.environ.get("RANK", "0") == "0"


class CheckEngine(TrainerCallback):
    """Before the first step, see ``check_running``."""

    def __init__(self, trainer: Any, asked: Engine) -> None:
        self._trainer = trainer
        self._asked = asked

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        check_running(self._trainer, self._asked)


def check_running(trainer: Any, asked: Engine) -> None:
    """Compare what has started with what was asked for; called when the model is in its place.

    Raises:
        UserError: another number of processes, another engine, or weights that are not sharded.
    """
    state = trainer.accelerator.state
    found = _running(state)
    if state.num_processes != world_size():
        found += f" in {state.num_processes} of {world_size()} processes"
    elif asked.shards_weights and not _all_sharded(trainer.model):
        found = "weights that every process holds whole"
    if found != asked.name:
        raise UserError.single(
            _WHERE,
            f"asks for {asked.name} in {world_size()} processes, and what started is {found}. "
            "Start with a file in launch/ as it is; launch/README.md says which one when.",
        )


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in _ON


def _zero_stage() -> int:
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config != "none":
        raise UserError.single(
            _WHERE,
            f"names a deepspeed_config_file ({config}), which would own batch size and precision. "
            "Use zero_stage, as launch/zero3.yaml does.",
        )
    offloaded = [
        name
        for name in ("OPTIMIZER", "PARAM")
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none") != "none"
    ]
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if offloaded or stage not in ("2", "3"):
        what = f"offload of {offloaded[0].lower()}" if offloaded else f"zero_stage {stage}"
        raise UserError.single(
            _WHERE,
            f"asks for {what}, which this version does not do. Use launch/zero2.yaml or "
            "launch/zero3.yaml as they are.",
        )
    return int(stage)


def _running(state: Any) -> str:
    kind = state.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{state.fsdp_plugin.fsdp_version}"
    return "single" if kind == DistributedType.NO else "ddp"


def _all_sharded(model: Any) -> bool:
    return all(is_sharded(p) for p in model.parameters() if p.numel() or is_sharded(p))
