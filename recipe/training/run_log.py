"""What a person and a file see of a run: bar, epoch lines, metrics.jsonl."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.settings import RunFailed
from recipe.training.loss import TokenLoss, sum_over_processes

# What the model was given, and what need not be given: of this process, and on the main one also of
# all before a stop.
_TOKENS = ("computed_tokens", "shared_tokens", "ending_tokens")


class RunLog(TrainerCallback):
    """Write each record of the Trainer to ``metrics.jsonl`` and each epoch to the screen.

    A terminal also gets a bar. A value that is not finite stops the run; see
    ``recipe.training.finite`` for the steps between two records.

    Raises:
        RunFailed: a logged value is NaN or infinite.
    """

    def __init__(self, loss: TokenLoss, *, peak_memory: Callable[[], dict[str, int]]) -> None:
        self.file = Path("metrics.jsonl")  # into the run's folder once there is one
        self.epoch_losses: list[float] = []
        self.trained_tokens = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self.computed_tokens = self.shared_tokens = self.ending_tokens = 0
        self.first_perplexity: float | None = None
        self.first: dict[str, float] = {}  # what later steps are compared with
        self._noted: set[str] = set()
        self._records = 0
        self._loss = loss
        self._peak_memory = peak_memory
        self._bar: tqdm[Any] | None = None
        self._epoch_started = 0.0
        self._open_seconds = 0.0  # of an epoch that a resumed run finishes
        self._scale: float | None = None  # of the fp16 scaler, before the current step
        self._evaluating_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", leave=False
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._epoch_started = time.perf_counter() - self._open_seconds
        self._open_seconds = 0.0
        self._evaluating_seconds = 0.0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        # accelerate's step_was_skipped stays False with a fused optimizer, the default; the scaler
        # itself lowers its scale exactly when it skipped a step.
        scale = gradient_scale(optimizer)
        self.skipped_steps += scale is not None and self._scale is not None and scale < self._scale
        self._scale = scale
        if self._bar is not None:
            self._bar.update(1)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._scale = gradient_scale(optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        record = dict(logs or {})
        # Overflowing gradients are how an fp16 scaler finds its scale; the step was skipped.
        if gradient_scale(optimizer) is not None and not math.isfinite(
            record.get("grad_norm") or 0.0
        ):
            record["grad_norm"] = None
        # Wall time and throughput of the whole call are told by the epochs, free of evaluation.
        if "train_runtime" in record:
            return
        self._evaluating_seconds += record.get("eval_runtime", 0.0)
        if state.global_step == 0:
            self.first_perplexity = record.get("eval_perplexity")
        self._stop_unless_finite(record, state.global_step)
        if state.is_world_process_zero:
            self._write({"step": state.global_step, **record, "skipped_steps": self.skipped_steps})
        if self._bar is not None and "loss" in record:
            self._bar.set_postfix(loss=f"{float(record['loss']):.3f}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        nll, tokens = self._loss.take(args.device)
        if not tokens:
            return
        record = self._close_epoch(
            step=state.global_step,
            epoch=state.epoch or 0.0,
            nll=nll,
            tokens=tokens,
            seconds=self._epoch_seconds(),
        )
        self._stop_unless_finite(record, state.global_step)
        if state.is_world_process_zero:
            self._write(record)
            self.say(
                f"epoch {len(self.epoch_losses):<4}loss {record['epoch_loss']:.3f} · "
                f"{record['epoch_seconds']:.0f} s · "
                f"{record['trained_tokens_per_second']:.0f} trained tokens/s"
                + (f" · {self.skipped_steps} skipped steps" if self.skipped_steps else "")
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What a resumed run must know to log as if it had never stopped."""
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "epoch_losses": self.epoch_losses,
            "trained_tokens": self.trained_tokens,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "first_perplexity": self.first_perplexity,
            "first": self.first,
            **self.token_counts(args.device),
            "records": self._records,
            "ended": state.global_step >= state.max_steps,
            "open_epoch": {
                **dict(zip(("nll", "tokens"), self._loss.totals(args.device), strict=True)),
                "seconds": self._epoch_seconds(),
            },
        }

    def resume(self, state: dict[str, Any], *, main_process: bool) -> None:
        """Take up ``state``, and forget what was logged later: that is run again."""
        for name in (
            "epoch_losses",
            "trained_tokens",
            "seconds",
            "skipped_steps",
            "first_perplexity",
            "first",
        ):
            setattr(self, name, state[name])
        counts = {"ending_tokens": 0, **state}  # a run from before has none
        for name in _TOKENS:  # of all processes together
            setattr(self, name, counts[name] if main_process else 0)
        epoch, open_epoch = state["epoch"], state["open_epoch"]
        if main_process:
            records = read_metrics(self.file)[: state["records"]]
            # A kill must not take what is kept.
            whole = self.file.with_name(f".{self.file.name}.partial")
            whole.write_text("".join(json.dumps(r) + "\n" for r in records))
            whole.replace(self.file)
            self._records = len(records)
            self._noted = {r["note"] for r in records if "note" in r}
        if not open_epoch["tokens"]:  # saved behind the end of the epoch, which is in the log
            return
        if epoch != round(epoch) and not state["ended"]:
            self._open_seconds = open_epoch["seconds"]
            if main_process:
                self._loss.restore(open_epoch["nll"], open_epoch["tokens"])
            return
        # The best, saved at the last step of an epoch: the Trainer begins the next one.
        record = self._close_epoch(step=state["step"], epoch=epoch, **open_epoch)
        if main_process:
            self._write(record)

    @property
    def tokens(self) -> int:
        """Of all rows trained, whole."""
        return self.computed_tokens + self.shared_tokens + self.ending_tokens

    def token_counts(self, device: torch.device) -> dict[str, int]:
        """Of all processes, by the names of this class."""
        return {name: sum_over_processes((0.0, getattr(self, name)), device)[1] for name in _TOKENS}

    def stop(self, message: str) -> NoReturn:
        """End the run, without the bar across the message."""
        self.close()
        raise RunFailed(message)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def note(self, kind: str, line: str, *, state: TrainerState, step: int) -> None:
        """Warn of what does not stop the run: one line and one record, once a run for each kind."""
        if kind in self._noted or not state.is_world_process_zero:
            return
        self._noted.add(kind)
        self._write({"step": step, "note": kind, "line": line})
        self.say(f"warning   {line}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        say(line)

    def _epoch_seconds(self) -> float:
        return time.perf_counter() - self._epoch_started - self._evaluating_seconds

    def _close_epoch(
        self, *, step: int, epoch: float, nll: float, tokens: int, seconds: float
    ) -> dict[str, Any]:
        self.epoch_losses.append(nll / tokens)
        self.trained_tokens += tokens
        self.seconds += seconds
        return {
            "step": step,
            "epoch": round(epoch, 4),
            "epoch_loss": nll / tokens,
            "epoch_trained_tokens": tokens,
            "epoch_seconds": round(seconds, 3),
            "trained_tokens_per_second": round(tokens / seconds, 2),
            "peak_memory_bytes": self._peak_memory(),
            "skipped_steps": self.skipped_steps,
        }

    def flush(self) -> None:
        """Bring all records to the disk."""
        with self.file.open("a") as stream:
            os.fsync(stream.fileno())

    def _write(self, record: dict[str, Any]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._records += 1

    def _stop_unless_finite(self, record: dict[str, Any], step: int) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.stop(f"{name} is {value} at step {step}. {remedy(step)}")


def say(line: str) -> None:
    """Print a line above the bar. A run whose reader is gone, such as a ``tee``, goes on."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``; a last line that a crash left half-written is left out."""
    if not file.is_file():
        return []
    *lines, _ = file.read_text().split("\n")
    return [json.loads(line) for line in lines]


def remedy(step: int) -> str:
    """What to do about a value that is not finite after ``step`` steps."""
    if step:
        return "Lower training.learning_rate, or train in bf16 or fp32 instead of fp16."
    return (
        "Nothing has been trained yet, so it is the base that computes it. Use bf16 or fp32 where "
        "fp16 overflows, or another checkpoint."
    )


def gradient_scale(optimizer: Any) -> float | None:
    """The scale of the fp16 gradient scaler; None without one."""
    scaler = getattr(optimizer, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
