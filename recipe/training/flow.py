"""Small corrections to when the Trainer does what."""

import shutil
from collections.abc import Callable, Sequence
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


class Rehearse(TrainerCallback):
    """Once model, optimizer and rows are as the first step finds them. The folder of a fresh run
    that cannot be is taken away.
    """

    def __init__(self, rehearse: Callable[[], None], fresh: Path | None) -> None:
        self._rehearse = rehearse
        self._fresh = fresh

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        try:
            self._rehearse()
        except RunFailed:
            if self._fresh:
                shutil.rmtree(self._fresh, ignore_errors=True)
            raise
