"""How long the rest of a run will take, told after its first steps, and checked at its end."""

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipe.training.order import steps_of

_PROBED = 20  # steps, behind the first one, which makes what later ones find made
_WORTH_TELLING = 20  # steps left


class Pace(TrainerCallback):
    """Steps take as long as their tokens are many; of all steps these are known before.

    Counted is the time within steps, without evaluation and saving.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.forecast: float | None = None  # seconds, of the steps behind the probe
        self._say = say
        self._tokens: list[int] = []  # of all steps up to each
        self._first = self._probed = 0
        self._began = self._spent = self._left = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        needed = [row.needed for row in train_dataloader.dataset]
        steps = steps_of(
            train_dataloader, steps=state.max_steps, accumulation=args.gradient_accumulation_steps
        )
        # Where no rows are left for this process it computes one token.
        counts = (sum(sum(needed[at] for at in rows) or 1 for rows in step) for step in steps)
        self._tokens = list(accumulate(counts, initial=0))
        self._first = state.global_step + 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        seconds, step = time.perf_counter() - self._began, state.global_step
        if self.forecast is not None:
            self._left += seconds
        elif step > self._first:
            self._spent += seconds
            if step == self._first + _PROBED and state.max_steps - step >= _WORTH_TELLING:
                self._tell(step, state.max_steps)

    def _tell(self, step: int, last: int) -> None:
        if last >= len(self._tokens):  # the loader gave fewer than were planned
            return
        probed = self._tokens[step] - self._tokens[self._first]
        left = self._tokens[last] - self._tokens[step]
        self.forecast = self._spent / probed * left
        self._say(
            f"pace      {self._spent / _PROBED:.2f} s a step over {_PROBED} steps: about "
            f"{_in_words(self.forecast)} for the {last - step} that are left"
        )

    def account(self) -> dict[str, float] | None:
        """Seconds forecast and measured behind the probe; None where nothing was told."""
        if self.forecast is None:
            return None
        return {"forecast": round(self.forecast, 3), "measured": round(self._left, 3)}

    def lines(self) -> list[str]:
        """For the screen at the end."""
        if self.forecast is None or not self._left:
            return []
        return [
            f"time      forecast {_in_words(self.forecast)} after {_PROBED} steps, measured "
            f"{_in_words(self._left)} ({self._left / self.forecast - 1:+.1%})"
        ]


def _in_words(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
