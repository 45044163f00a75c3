"""What is proven: the config on this machine, and the first of its rows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM

from recipe.data.tokens import TokenizedRow
from recipe.memory.probe import free_memory
from recipe.model.checkpoint import load_config
from recipe.run_data import Data, load_data
from recipe.settings import HubSettings, Settings, UserError, plain

ROWS = 10  # a window of 8 and a short last one of 2
_WINDOW = 8
_HELD_OUT = 2
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """``settings`` publish, resume and name no folder; ``data`` are all rows of them, ``rows`` the
    first that are trained.

    ``too_large`` says why no gradient can be compared in float32, ``gpus`` is what the environment
    said of them before all but the first were hidden, ``notes`` are lines for the screen.
    """

    settings: Settings
    data: Data
    rows: Sequence[TokenizedRow]
    too_large: str | None
    gpus: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def on_cpu(self) -> bool:
        return _on_cpu(self.settings)

    @property
    def window(self) -> int:
        """Rows of an optimizer step; where there are enough, some are left for a short one."""
        fewer = len(self.rows) - 1 if len(self.rows) > 2 else len(self.rows)
        return min(_WINDOW, fewer - fewer % 2 or 1)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows × accumulation of one window, the largest micro-batch first; the config's own last
        where it is another.
        """
        window = self.window
        shapes = [(window, 1), *([(2, window // 2)] if window > 3 else []), (1, window)]
        training = self.settings.training
        own = (
            training.get("per_device_train_batch_size", 8),
            training.get("gradient_accumulation_steps", 1),
        )
        # More rows than there are would be one short window.
        capped = (min(own[0], len(self.rows)), min(own[1], len(self.rows)))
        return list(dict.fromkeys([*shapes, capped]))


def make_plan(settings: Settings) -> Plan:
    """Read and tokenise the rows of ``settings``, and see what this machine can prove of them.

    Raises:
        UserError: started as several processes, data and model do not fit together, or the model
            does not fit into memory.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError.single(
            "WORLD_SIZE", "prove.py starts its own processes. Start it with python alone."
        )
    gpus = _hide_other_gpus(settings)
    notes: list[str] = []
    machine = _on_this_machine(settings, notes)
    too_large = _too_large(machine)
    data = load_data(machine)
    if (machine.model.dtype != "float32" or _mixed(machine)) and not too_large:
        notes.append("gradients are compared in float32; everything else is done as configured")
    dropout = settings.lora.get("lora_dropout")
    if dropout:
        notes.append(
            f"lora_dropout {dropout} is 0 where gradients or processes are compared, and kept "
            "where a claim does not depend on it"
        )
    return Plan(machine, data, data.train.rows[:ROWS], too_large, gpus, notes)


def first_rows(plan: Plan, *, held_out: bool, share_openings: bool | None) -> dict[str, Any]:
    """Fields of ``data:`` that take the first rows, and two held-out ones."""
    few = plan.data.held_out.rows[:_HELD_OUT] if held_out else []
    return {
        "rows": _range(plan.rows),
        "held_out": _range(few) if few else None,
        "share_openings": share_openings,
    }


def _range(rows: Sequence[TokenizedRow]) -> str:
    return f"{rows[0].index}:{rows[-1].index + 1}"


# Where the name without paging is not just what follows.
_NOT_PAGED = {"paged_adamw_8bit": "adamw_bnb_8bit", "paged_adamw_32bit": "adamw_torch"}


def _on_cpu(settings: Settings) -> bool:
    return bool(settings.training.get("use_cpu")) or not torch.accelerator.is_available()


def _mixed(settings: Settings) -> str | None:
    return next((name for name in ("fp16", "bf16") if settings.training.get(name)), None)


def _on_this_machine(settings: Settings, notes: list[str]) -> Settings:
    """The settings without what belongs to one run; in float32 where 16 bit need a GPU."""
    training = plain(settings.training)
    for name in ("output_dir", "resume_from_checkpoint"):
        training.pop(name, None)
    model, mixed = settings.model, _mixed(settings)
    meant = mixed == "bf16" and training.get("use_cpu")
    if mixed and _on_cpu(settings) and not meant:
        training[mixed] = False
        model = model.model_copy(update={"dtype": "float32"})
        notes.append(f"training.{mixed} needs a GPU and there is none: all is proven in float32")
        if "bnb_4bit_compute_dtype" in (model.quantization or {}):
            held = {**plain(model.quantization), "bnb_4bit_compute_dtype": "float32"}
            model = model.model_copy(update={"quantization": held})
    optim = str(training.get("optim") or "")
    if optim.startswith("paged_") and _on_cpu(settings):
        # The same updates: paging is where the state lies.
        training["optim"] = _NOT_PAGED.get(optim, optim.removeprefix("paged_"))
        notes.append(f"{optim} needs a GPU to page to: proven with {training['optim']}")
    update = {"model": model, "training": training, "hub": HubSettings()}
    return settings.model_copy(update=update)


def _too_large(settings: Settings) -> str | None:
    """Why the gradients cannot be compared in float32; None where they can.

    Raises:
        UserError: on a CPU, where the rest would not fit either.
    """
    if settings.model.quantization:
        return None
    with torch.device("meta"):
        parameters = LlamaForCausalLM(load_config(settings.model)).num_parameters()
    needed = 1.2 * 4 * parameters
    on_cpu = _on_cpu(settings)
    free = free_memory("cpu" if on_cpu else "cuda")
    if free is None or needed <= free:
        return None
    said = f"needs about {needed / _GIB:.0f} GiB in float32, and {free / _GIB:.0f} GiB are free"
    if on_cpu:
        raise UserError.single(
            "model.name_or_path",
            f"{settings.model.name_or_path} {said}. Prove it on a GPU, or prove a smaller model.",
        )
    return f"the model {said}"


def _hide_other_gpus(settings: Settings) -> str | None:
    """One process must see one GPU, or the Trainer splits every batch over all of them."""
    if _on_cpu(settings) or torch.cuda.device_count() < 2:
        return None
    before = os.environ.get(_VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ[_VISIBLE] = before.split(",")[0]
    return before
