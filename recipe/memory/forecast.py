"""What a run will take of memory and time, item by item, before anything of it exists.

Weights, adapter, gradients, optimizer state and everything that lives during a micro-batch follow
from the shapes (``recipe.memory.trace``). What the process and the allocator take beside them is
fitted to runs that were measured (``make bench-forecast``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from transformers import LlamaConfig

from recipe.data.tokens import TokenizedRow
from recipe.memory.live_bytes import GRADIENTS, TEMPORARY
from recipe.memory.optimizer import DEFAULT, is_known, kept_whole, state_bytes, step_bytes
from recipe.memory.stand_in import checkpoints_activations
from recipe.memory.trace import Trace, traced
from recipe.settings import Settings, UserError

Rows = Sequence[TokenizedRow]
PROCESS, ALLOCATOR, OPTIMIZER, ADAPTER = (
    "process",
    "allocator",
    "optimizer state",
    "adapter",
)
# On a CPU, of the resident set. Fixed is what libraries take once they compute. glibc cannot use
# every hole again for another tensor of the size that left it: it holds a share of what is in use
# at the peak, and a share of what a layer writes; with checkpointing, where each layer is computed
# again among the holes of others, of what all layers write.
_CPU_FIXED, _CPU_SHARE, _CPU_LAYER_SHARE, _CPU_AGAIN_SHARE = 119 << 20, 0.388, 0.346, 0.032
# On CUDA neither is measured yet: the context and cuBLAS workspaces, and fragmentation.
_CUDA_CONTEXT, _CUDA_SHARE = 600 << 20, 0.05


@dataclass(frozen=True)
class Plan:
    """What is asked for, as far as memory and time depend on it.

    ``rows`` are the micro-batch that needs the most tokens, ``evaluated`` the largest batch of
    held-out rows; ``device`` is ``cpu`` or ``cuda``; ``share_openings`` as ``flatten`` has it;
    ``imported`` are the bytes that the process holds before it loads anything, on a CPU. ``deal``
    gives both kinds of rows anew for other settings, out of all rows; without it they are taken
    from these.
    """

    settings: Settings
    config: LlamaConfig
    rows: Rows
    evaluated: Rows
    device: str
    share_openings: bool
    imported: int = 0
    deal: Callable[[Settings], tuple[Rows, Rows]] | None = None

    def with_settings(self, settings: Settings) -> "Plan":
        """The same for other settings, with the rows that these make decide."""
        rows, evaluated = self.deal(settings) if self.deal else self._of_these(settings)
        return replace(self, settings=settings, rows=rows, evaluated=evaluated)

    def _of_these(self, settings: Settings) -> tuple[Rows, Rows]:
        training, longest = settings.training, settings.data.max_length
        return (
            _longest(self.rows, int(training.get("per_device_train_batch_size", 8)), longest),
            _longest(self.evaluated, int(training.get("per_device_eval_batch_size", 8)), longest),
        )


def _longest(rows: Rows, count: int, max_length: int | None) -> Rows:
    """At most ``count``; of longer rows the end, as others of that length may take their place."""
    kept = nlargest(count, rows, key=lambda row: row.needed) if len(rows) > count else rows
    if max_length is None:
        return kept
    return [_ending(row, max_length) for row in kept]


def _ending(row: TokenizedRow, tokens: int) -> TokenizedRow:
    """The last tokens of what is needed of ``row``, and the one that these predict."""
    end = slice(max(row.needed + 1 - tokens, 0), row.needed + 1)
    return TokenizedRow(row.index, row.input_ids[end], row.trained[end])


@dataclass(frozen=True)
class Forecast:
    """``items`` are the bytes at the peak, which is in ``phase``: their sum. ``saved`` and
    ``gradients`` are what these come to at their own largest, and ``trace`` what all rests on.
    """

    items: Mapping[str, int]
    phase: str
    saved: int
    gradients: int
    trace: Trace
    notes: Sequence[str] = ()

    @property
    def peak(self) -> int:
        """On a CPU of the resident set, on CUDA of what the card holds."""
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        """Without what the process and the allocator take: CUDA's ``max_memory_allocated``."""
        return sum(n for name, n in self.items.items() if name not in (PROCESS, ALLOCATOR))


def forecast(plan: Plan) -> Forecast:
    """Follow one micro-batch, and add what surrounds it.

    Raises:
        UserError: LoraConfig's fields do not fit the model, or torch cannot follow these settings
            on tensors without memory.
    """
    trace = _followed(plan)
    training = plan.settings.training
    optim = str(training.get("optim") or DEFAULT)
    adapter = sum(trace.trainable.values())
    step = step_bytes(optim, trace.shapes, device=plan.device)
    peaks = {**trace.peaks, "optimizer step": {GRADIENTS: adapter, TEMPORARY: step}}
    phase = max(peaks, key=lambda name: sum(peaks[name].values()))
    live = {kind: n for kind, n in peaks[phase].items() if n > 0}
    items = {
        **{f"base weights, {dtype}": n for dtype, n in trace.weights.items()},
        ADAPTER: adapter,
        OPTIMIZER: sum(
            state_bytes(optim, shapes, itemsize=size, args=training.get("optim_args"))
            for size, shapes in trace.shapes.items()
        )
        + kept_whole(optim, trace.embeddings),
        **live,
    }
    process, allocator = surroundings(
        plan.device,
        # An optimizer's step finds the holes of the micro-batch, and leaves none.
        moving=sum(trace.peak.values()),
        written=trace.written,
        layers=plan.config.num_hidden_layers,
        checkpointed=checkpoints_activations(plan.settings),
    )
    imported = plan.imported if plan.device == "cpu" else 0
    extra = {PROCESS: imported + process, ALLOCATOR: allocator}
    notes = [] if is_known(optim) else [f"{optim}: its state is taken for AdamW's"]
    if plan.device == "cuda":
        notes.append("process and allocator are assumed of CUDA, not measured")
    return Forecast({**items, **extra}, phase, trace.saved, adapter, trace, notes)


def _followed(plan: Plan) -> Trace:
    try:
        return traced(
            plan.config,
            plan.settings,
            plan.rows,
            evaluated=plan.evaluated,
            device=plan.device,
            share_openings=plan.share_openings,
        )
    except RuntimeError as error:  # what fake tensors raise for an operation
        said = " ".join(str(error).split())[:120]
        raise UserError.single(
            "forecast",
            f"these settings cannot be followed without weights ({type(error).__name__}: {said}). "
            "recipe/train.py --check tries them with weights.",
        ) from error


def surroundings(
    device: str, *, moving: int, written: int, layers: int, checkpointed: bool
) -> tuple[int, int]:
    """Bytes that the process takes beyond what it imported, and the allocator beyond those in use.

    Args:
        moving: what lives at the micro-batch's peak beside weights, adapter and optimizer state.
        written: results of all operations, forward and backward.
        checkpointed: whether layers are computed again in the backward pass.
    """
    if device == "cuda":
        return _CUDA_CONTEXT, round(_CUDA_SHARE * moving)
    holes = _CPU_AGAIN_SHARE * written if checkpointed else _CPU_LAYER_SHARE * written / layers
    return _CPU_FIXED, round(_CPU_SHARE * moving + holes)
