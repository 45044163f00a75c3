"""Every step is finite, or the run stops before anything of that step is saved."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.model.shards import is_sharded, local
from recipe.training.engine import SINGLE, Engine
from recipe.training.loss import TokenLoss, distributed
from recipe.training.run_log import RunLog, gradient_scale, remedy

_SHOWN_ROWS = 10
_GROWN = 100  # times as large as it began

NotFinite = list[tuple[float, list[int]]]  # the value, and the rows that gave it


class FiniteSteps(TrainerCallback):
    """Looks at each step's losses and gradient norm before the optimizer steps, and at the adapter
    behind it; each look reads the device once.

    The last callback of a run, so that it sees what the others left behind. The trainer fills in
    ``micro_batches``, the row indices of each micro-batch of the step, and ``grad_norm``, float
    (), before clipping: an infinite norm makes clipping write zeros, and looks finite afterwards.

    Raises:
        RunFailed: a value is NaN or infinite. An fp16 scaler may skip steps whose gradient
            overflowed, as long as its scale had a part in it.
    """

    def __init__(
        self, model: PeftModel, loss: TokenLoss, log: RunLog, *, engine: Engine = SINGLE
    ) -> None:
        self.micro_batches: list[list[int]] = []
        self.grad_norm = torch.tensor(math.nan)
        self._model = model
        self._loss = loss
        self._log = log
        # DeepSpeed steps at the end of its backward pass.
        self._not_done = "is not saved" if engine.deepspeed else "is not taken"
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self._guessing = math.inf  # the loss of guessing every token alike
        self._overflowed_at: float | None = None  # the fp16 scaler's scale

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainable = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._guessing = math.log(self._model.config.vocab_size)
        self._log.first.setdefault("adapter_norm", self._adapter_norm())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.micro_batches = []
        self._overflowed_at = None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        sums, counts = self._loss.last(len(self.micro_batches))
        norm = self.grad_norm.to(sums)
        # Added over the processes, so that all stop at the same step.
        shared = torch.stack(
            [
                sums.isfinite().logical_not().sum().to(sums),
                norm.isfinite().logical_not().to(sums),
                sums.sum(),
                counts.sum().to(sums),
            ]
        )
        if distributed():
            dist.all_reduce(shared)
        values = torch.cat([shared, norm[None], sums]).tolist()
        losses, norms, nll, tokens, grad_norm, *local_sums = values
        if losses:
            self._stop_for_loss(state, local_sums)
        self._note_loss(args, state, nll / tokens)
        if norms:
            self._stop_unless_scaled(state, grad_norm, gradient_scale(optimizer))
        elif grad_norm == 0:
            self._note_frozen(args, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        step = state.global_step
        if self._overflowed_at is not None and gradient_scale(optimizer) == self._overflowed_at:
            self._log.stop(
                f"the gradient norm of step {step} overflowed float32, which the fp16 scaler did "
                f"not see. {remedy(step)}"
            )
        norm = self._adapter_norm()
        # A finite norm proves every value finite; an infinite one may be of large values only.
        if not math.isfinite(norm):
            self._stop_for_adapter(step)
        self._note_growth(args, state, norm)

    def stop_for_evaluation(self, not_finite: NotFinite, step: int) -> None:
        """Stop for held-out losses of any process; each process calls it, or none."""
        value, rows = _of_all_processes(not_finite)
        self._log.stop(
            f"the held-out loss of {in_words(rows)} is {value} at step {step}. {self._remedy(step)}"
        )

    def _stop_for_loss(self, state: TrainerState, sums: Sequence[float]) -> None:
        value, rows = _of_all_processes(
            [
                (value, rows)
                for value, rows in zip(sums, self.micro_batches, strict=True)
                if not math.isfinite(value)
            ]
        )
        self._log.stop(
            f"the loss of {in_words(rows)} is {value} at step {state.global_step + 1}, so that "
            f"step {self._not_done}. {self._remedy(state.global_step)}"
        )

    def _stop_unless_scaled(self, state: TrainerState, norm: float, scale: float | None) -> None:
        if scale is not None and scale >= 1:
            self._overflowed_at = scale
            return
        _, rows = _of_all_processes([(norm, rows) for rows in self.micro_batches])
        unscaled = "" if scale is None else f", and the fp16 scaler's scale is down to {scale}"
        self._log.stop(
            f"the gradient norm is {norm} at step {state.global_step + 1} ({in_words(rows)}) "
            f"though every loss is finite{unscaled}, so that step {self._not_done}. "
            f"{self._remedy(state.global_step)}"
        )

    def _stop_for_adapter(self, step: int) -> None:
        broken = _broken(self._trainable)
        if broken:
            rows = in_words([row for rows in self.micro_batches for row in rows])
            self._log.stop(
                f"{broken} of the adapter is not finite after step {step} ({rows}), so that step "
                f"is not saved. {remedy(step)}"
            )

    def _remedy(self, step: int) -> str:
        base = {n: p for n, p in self._model.named_parameters() if not p.requires_grad}
        broken = _broken(base)
        if broken:
            return f"{broken} of the base is not finite. Use a whole copy of the checkpoint."
        return remedy(step)

    @torch.no_grad()
    def _adapter_norm(self) -> float:
        norm = get_total_norm([local(p) for p in self._trainable.values()])
        if any(map(is_sharded, self._trainable.values())):
            squared = norm.double().square()
            dist.all_reduce(squared)
            norm = squared.sqrt()
        return float(norm)

    def _note_loss(self, args: TrainingArguments, state: TrainerState, mean_loss: float) -> None:
        first = self._log.first.setdefault("loss", mean_loss)
        if mean_loss > max(self._guessing, 2 * first):
            step = state.global_step + 1
            line = (
                f"the loss of step {step} is {mean_loss:.2f}: worse than guessing every token "
                f"alike ({self._guessing:.2f}) and than step 1 ({first:.2f}). {_lower(args)}"
            )
            self._log.note("exploded", line, state=state, step=step)

    def _note_frozen(self, args: TrainingArguments, state: TrainerState) -> None:
        step = state.global_step + 1
        line = (
            f"the gradient of step {step} is exactly 0, so the adapter stands still: nothing "
            f"reaches it, or too large a step before this one killed it. {_lower(args)}"
        )
        self._log.note("frozen", line, state=state, step=step)

    def _note_growth(self, args: TrainingArguments, state: TrainerState, norm: float) -> None:
        first = self._log.first["adapter_norm"]
        if first and norm > _GROWN * first:
            line = (
                f"step {state.global_step} left the adapter more than {_GROWN} times as large as "
                f"it began, far from the base. {_lower(args)}"
            )
            self._log.note("grown", line, state=state, step=state.global_step)


def _lower(args: TrainingArguments) -> str:
    return f"Lower training.learning_rate (now {args.learning_rate:g})."


def _broken(parameters: Mapping[str, torch.Tensor]) -> str:
    """The first parameter that holds NaN or infinity, and how many more; empty without one."""
    broken = torch.stack([local(p).isfinite().all().logical_not() for p in parameters.values()])
    if any(map(is_sharded, parameters.values())):  # another process may hold what is broken
        count = broken.int()
        dist.all_reduce(count)
        broken = count.bool()
    names = [name for name, one in zip(parameters, broken.tolist(), strict=True) if one]
    if not names:
        return ""
    first = names[0].removeprefix("base_model.model.").replace(".base_layer", "")
    return first + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def in_words(rows: Sequence[int]) -> str:
    """Row indices for a message: sorted, each once, the first ten and how many more."""
    indices = sorted(set(rows))
    shown = ", ".join(map(str, indices[:_SHOWN_ROWS]))
    more = len(indices) - _SHOWN_ROWS
    return f"row{'s'[: len(indices) > 1]} {shown}" + (f" and {more} more" if more > 0 else "")


def _of_all_processes(not_finite: NotFinite) -> tuple[float, list[int]]:
    """The first value, and the rows of all; a process that has none learns the others'."""
    everyone: list[Any] = [not_finite]
    if distributed():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, not_finite)
    found = [pair for process in everyone for pair in process]
    return found[0][0], [row for _, rows in found for row in rows]
