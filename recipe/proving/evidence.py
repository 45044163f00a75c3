"""The runs and the oracle's answers, each made once and when it is first asked for."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from recipe.proving import runs
from recipe.proving.plan import Plan
from recipe.proving.stock import (
    CaptureGradients,
    Gradients,
    StartAway,
    relative_difference,
    stock_base,
    stock_model,
    stock_nll,
    window_gradients,
)
from recipe.proving.watchers import (
    BaseHashes,
    Checkpointing,
    FirstMicroBatch,
    LastLogits,
    Progress,
    StoppedHere,
    StopWithin,
    base_hashes,
    relative,
    row_logits,
)
from recipe.settings import RunFailed
from recipe.training.run_log import read_metrics

LEAST, MOST = 1e-6, 1e-4
_LOGIT_ROWS = 2
_WEIGHTS = "adapter/adapter_model.safetensors"
_TIMES = ("_seconds", "_runtime", "per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class Whole:
    """The window as one micro-batch: each step's gradient, where the adapter started, the loss."""

    steps: list[Gradients]
    start: StartAway
    first: FirstMicroBatch


@dataclass(frozen=True)
class Stock:
    """Stock's gradient of each window, by its number of rows, and the NLLs of the first; how far
    two of its attention kernels lie apart in both.
    """

    steps: dict[int, list[Gradients]]
    nll: torch.Tensor
    kernels: float


@dataclass(frozen=True)
class Trained:
    """A short run: bytes of the adapter, records without times; what the watchers saw."""

    folder: Path
    adapter: bytes
    records: list[dict[str, Any]]
    base: BaseHashes
    logits: list[torch.Tensor]


@dataclass(frozen=True)
class Reloaded:
    """The adapter of a short run on a stock base: hashes of the base, logits of two kernels."""

    base: dict[str, str]
    logits: list[torch.Tensor]
    kernels: float


class Evidence:
    """All that the claims are judged by.

    Args:
        folder: empty; the runs are made in it.
        doing: told what is being done, for people who wait.
    """

    def __init__(self, plan: Plan, folder: Path, doing: Callable[[str], None]) -> None:
        self.plan = plan
        self.folder = folder
        self._doing = doing
        self._runs = 0
        self._gradients: dict[tuple[Any, ...], list[Gradients]] = {}

    def doing(self, what: str) -> None:
        """Tell people who wait."""
        self._doing(what)

    def new_folder(self) -> Path:
        """One that is not there yet."""
        self._runs += 1
        return self.folder / f"run-{self._runs}"

    @cached_property
    def whole(self) -> Whole:
        """The window as one micro-batch, without shared openings and checkpointing."""
        batch, accumulation = self.plan.shapes[0]
        start, capture = StartAway(attention_dropout=False), CaptureGradients()
        first = FirstMicroBatch(self.plan.window)
        self._run_for_gradients(start, capture, first, batch=batch, accumulation=accumulation)
        return Whole(capture.steps, start, first)

    def gradients(
        self,
        batch: int,
        accumulation: int,
        *,
        share_openings: bool = False,
        checkpointing: bool = False,
    ) -> list[Gradients]:
        """Each step's gradient of a real run that starts where ``whole`` did."""
        asked = (batch, accumulation, share_openings, checkpointing)
        if asked == (*self.plan.shapes[0], False, False):
            return self.whole.steps
        if asked not in self._gradients:
            start = StartAway(self.whole.start.adapter, attention_dropout=False)
            capture = CaptureGradients()
            active = Checkpointing()
            self._run_for_gradients(
                start,
                capture,
                active,
                batch=batch,
                accumulation=accumulation,
                share_openings=share_openings,
                checkpointing=checkpointing,
            )
            if active.on != checkpointing:
                raise RunFailed(f"gradient checkpointing was {'on' if active.on else 'off'}")
            self._gradients[asked] = capture.steps
        return self._gradients[asked]

    def _run_for_gradients(
        self, *watchers: Any, batch: int, accumulation: int, **kinds: bool
    ) -> None:
        with_what = "".join(f", {name.replace('_', ' ')}" for name, on in kinds.items() if on)
        self.doing(f"run {batch} × {accumulation}{with_what}")
        settings = runs.gradient_settings(
            self.plan, batch=batch, accumulation=accumulation, **kinds
        )
        self._run(settings, watchers)

    def _run(
        self, settings: Any, watchers: Sequence[Any], folder: Path | None = None, **named: Any
    ) -> Path:
        tick = Progress(lambda: self._doing(""))
        made = runs.run(settings, folder or self.new_folder(), [*watchers, tick], **named)
        _free()
        return made

    @cached_property
    def stock(self) -> Stock:
        """Stock code on the padded whole, where ``whole`` started."""
        plan, start = self.plan, self.whole.start.adapter
        settings = runs.gradient_settings(plan, batch=1, accumulation=1)
        self.doing("stock on the padded whole")
        with runs.silence():
            model = stock_model(settings, start)
        windows = dict.fromkeys(batch * accumulation for batch, accumulation in plan.shapes)
        steps = {n: window_gradients(model, plan.rows, rows_per_step=n) for n in windows}
        nll = stock_nll(model, plan.rows[: plan.window])
        self.doing("stock with another attention kernel")
        model.get_base_model().set_attn_implementation("eager")
        other = window_gradients(model, plan.rows, rows_per_step=plan.window)
        pairs = zip(other, steps[plan.window], strict=True)
        kernels = max(relative_difference(one, two) for one, two in pairs)
        del model
        _free()
        return Stock(steps, nll, kernels)

    @property
    def tolerance(self) -> float:
        """Of gradients: what stock's own kernels allow themselves, twice; within bounds, so that a
        broken oracle hides nothing.
        """
        return bounded(self.stock.kernels)

    def difference(self, ours: Sequence[Gradients], *, rows_per_step: int) -> float:
        """The largest of all steps, relative to stock, over the tensors that got a gradient."""
        stock = self.stock.steps[rows_per_step]
        if len(ours) != len(stock):
            return float("inf")
        return max(_of_common(one, other) for one, other in zip(ours, stock, strict=True))

    @cached_property
    def trained(self) -> Trained:
        """A short run from its first step to its last."""
        return self._trained("a run of {} steps")

    @cached_property
    def trained_again(self) -> Trained:
        """The same once more."""
        return self._trained("the same {} steps again")

    def _trained(self, what: str) -> Trained:
        self.doing(what.format(runs.steps(self.plan)))
        base, logits = BaseHashes(), LastLogits(self.plan.rows[:_LOGIT_ROWS])
        watchers = [StartAway(), base, logits]
        folder = self._run(runs.short_settings(self.plan), watchers)
        return Trained(folder, *_left_by(folder), base, logits.logits)

    @cached_property
    def resumed(self) -> tuple[bytes, list[dict[str, Any]]]:
        """A short run that was ended in its middle, and continued: adapter and records."""
        settings, folder = runs.short_settings(self.plan), self.new_folder()
        self.doing("a run that is stopped")
        try:
            watchers = [StartAway(), StopWithin(self.stopped_within - 1)]
            self._run(settings, watchers, folder)
        except StoppedHere:
            _free()
        self.doing("its continuation")
        self._run(settings, [StartAway()], folder, resume=True)
        return _left_by(folder)

    @property
    def stopped_within(self) -> int:
        """The step in whose middle ``resumed`` was stopped."""
        return runs.steps(self.plan) // 2 + 1

    @property
    def same_twice(self) -> bool:
        """Whether two short runs from one seed left the same adapter."""
        return self.trained.adapter == self.trained_again.adapter

    @cached_property
    def reloaded(self) -> Reloaded:
        """Stock peft's view of what ``trained`` saved."""
        trained = self.trained
        self.doing("the saved adapter on a stock base")
        settings = self.plan.settings
        with runs.silence():
            base = stock_base(settings, dtype=settings.model.dtype)
        hashes = base_hashes(base)
        model = PeftModel.from_pretrained(base, str(trained.folder / "adapter")).eval()
        rows = self.plan.rows[:_LOGIT_ROWS]
        logits = row_logits(model, rows)
        base.set_attn_implementation("eager")
        pairs = zip(row_logits(model, rows), logits, strict=True)
        kernels = max(relative(one, two) for one, two in pairs)
        del model, base
        _free()
        return Reloaded(hashes, logits, kernels)


def bounded(kernels: float, *, most: float = MOST) -> float:
    """The tolerance where stock's own kernels differ by ``kernels``."""
    return min(max(LEAST, 2 * kernels), most)


def strict_difference(ours: Sequence[Gradients], other: Sequence[Gradients]) -> float:
    """The largest of all steps; infinite where other tensors got a gradient."""
    if [one.keys() for one in ours] != [one.keys() for one in other] or not all(ours):
        return float("inf")
    return max(relative_difference(one, two) for one, two in zip(ours, other, strict=True))


def _of_common(ours: Gradients, stock: Gradients) -> float:
    """Which tensors get a gradient is a claim of its own."""
    names = ours.keys() & stock.keys()
    if not names:
        return float("inf")
    return relative_difference({n: ours[n] for n in names}, {n: stock[n] for n in names})


def _left_by(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    records = [
        {key: value for key, value in record.items() if not key.endswith(_TIMES)}
        for record in read_metrics(folder / "metrics.jsonl")
    ]
    return (folder / _WEIGHTS).read_bytes(), records


def _free() -> None:
    """Models of a Trainer are held by cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
