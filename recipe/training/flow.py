"""Small corrections to when the Trainer does what."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.settings import RunFailed


class SaveBehindEvaluation(TrainerCallback):
    """A checkpoint due at the last step of an epoch is made when the epoch has ended.

    The Trainer would make it before the epoch's record and evaluation, and a run resumed from it
    begins with the next epoch.
    """

    def __init__(self) -> None:
        self._due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        last = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if last and control.should_save:
            control.should_save, self._due = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_save = control.should_save or self._due
        self._due = False


class GoOnLogging(TrainerCallback):
    """The next logged loss is the mean since the last logged step, as if nothing had been stopped;
    the Trainer would begin anew. And the steps to log, evaluate and save at are the settings', not
    the checkpoint's.
    """

    def __init__(self, trainer: Trainer, open_loss: Sequence[float], logged_step: int) -> None:
        self._trainer = trainer
        self._open_loss = open_loss
        self._logged_step = logged_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer._tr_loss += self._open_loss[args.process_index]
        self._trainer._globalstep_last_logged = self._logged_step
        state.compute_steps(args, state.max_steps)


class FrozenInputs(TrainerCallback):
    """No gradient flows below the lowest adapted layer.

    For reentrant checkpointing, which is refused here, transformers lets the embedding's output
    require one: with lora.layers_to_transform all layers below would be recomputed for nothing.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel = None,
        **_: Any,
    ) -> None:
        model.get_base_model().disable_input_require_grads()


@dataclass(frozen=True)
class FreshFolder:
    """A run's folder before anything was trained; ``made`` by the run, or by the user."""

    path: Path
    made: bool

    def remove(self) -> None:
        """Take away what the run has written, and nothing else."""
        for name in ("settings.yaml", "manifest.json", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("tensorboard", "logs", ".rehearsal.partial"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        if self.made:
            with suppress(OSError):  # something else is in it
                self.path.rmdir()


class OnFirstSave(TrainerCallback):
    """Does something once, when the first checkpoint is whole, or training has ended."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._act:
            self._act()
        self._act = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.on_save(args, state, control)


class OnTrainBegin(TrainerCallback):
    """Does something once model, optimizer and rows are as the first step finds them."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._act()


class Rehearse(TrainerCallback):
    """Once model, optimizer and rows are as the first step finds them. The folder of a fresh run
    that cannot be is taken away.
    """

    def __init__(self, rehearse: Callable[[], None], fresh: FreshFolder | None) -> None:
        self._rehearse = rehearse
        self._fresh = fresh

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        try:
            self._rehearse()
        except (RunFailed, RuntimeError, OSError):
            if self._fresh:
                self._fresh.remove()
            raise
