"""What would make a run fit, each with what it costs in time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recipe.memory.forecast import Forecast, Plan, forecast
from recipe.memory.stand_in import checkpoints_activations
from recipe.settings import ModelSettings, Settings, UserError

# What a byte of results costs beside an operation of a matrix product, at the rates of a GPU and
# of a CPU: about 2 TB/s to 150 TFLOP/s, and 5 GB/s to 100 GFLOP/s.
_FLOPS_A_BYTE = {"cuda": 75, "cpu": 20}
_SHORTEST = 64
_NOTABLE = 0.05


@dataclass(frozen=True)
class Remedy:
    """``overrides`` for the command line; ``time`` is what a token then takes, 1 being as now.

    ``same`` tells whether it trains the same.
    """

    overrides: Sequence[str]
    plan: Plan
    forecast: Forecast
    time: float
    same: bool


def remedies(plan: Plan, found: Forecast, *, room: int) -> list[Remedy]:
    """Changes that bring the peak to ``room`` bytes: those that train the same, the quickest first,
    then others, likewise.

    Where no single one that trains the same suffices, those together, one after the other, until
    they do; where nothing has sufficed so far, all of them; nothing where even these do not.
    """
    before = _cost(plan, found)
    single = _all_tried(plan, before)
    fitting = _ranked([one for one in single if one.forecast.peak <= room])
    if not any(one.same for one in fitting):
        fitting = [*_together(plan, found, room, before=before, only_same=True), *fitting]
    return fitting or _together(plan, found, room, before=before, only_same=False)


def smaller(plan: Plan, found: Forecast) -> list[Remedy]:
    """Single changes that save a twentieth of what is allocated or more, the quickest first."""
    before = _cost(plan, found)
    tried = _all_tried(plan, before)
    least = _NOTABLE * found.allocated
    return _ranked([one for one in tried if found.allocated - one.forecast.allocated >= least])


def _ranked(ways: list[Remedy]) -> list[Remedy]:
    return sorted(ways, key=lambda one: (not one.same, round(one.time, 2), one.forecast.peak))


def _together(
    plan: Plan, found: Forecast, room: int, *, before: float, only_same: bool
) -> list[Remedy]:
    """Each time what saves most, until it fits."""
    overrides: list[str] = []
    same, now, ahead = True, plan, found
    for _ in range(12):
        tried = [one for one in _all_tried(now, before) if one.same or not only_same]
        best = min(tried, key=lambda one: (one.forecast.peak, not one.same), default=None)
        if best is None or best.forecast.peak >= ahead.peak:
            return []
        kept = [one for one in overrides if _key(one) not in map(_key, best.overrides)]
        overrides, same = [*kept, *best.overrides], same and best.same
        now, ahead = best.plan, best.forecast
        if ahead.peak <= room:
            return [Remedy(overrides, now, ahead, best.time, same)]
    return []


def _key(override: str) -> str:
    return override.partition("=")[0]


@dataclass(frozen=True)
class _Change:
    overrides: Sequence[str]
    settings: Settings
    same: bool


def _all_tried(plan: Plan, before: float) -> list[Remedy]:
    found = []
    for change in _candidates(plan):
        # What leaves no row, or cannot be followed, such as DoRA in 4 bit, is no remedy.
        with suppress(UserError):
            found.append(_tried(plan, change, before))
    return found


def _tried(plan: Plan, change: _Change, before: float) -> Remedy:
    changed = plan.with_settings(change.settings)
    ahead = forecast(changed)
    return Remedy(change.overrides, changed, ahead, _cost(changed, ahead) / before, change.same)


def _cost(plan: Plan, found: Forecast) -> float:
    """Of a token, in operations."""
    tokens = sum(row.needed for row in plan.rows)
    a_byte = _FLOPS_A_BYTE.get(plan.device, _FLOPS_A_BYTE["cuda"])
    return (found.trace.flops + found.trace.attention_flops + a_byte * found.trace.written) / tokens


def _candidates(plan: Plan) -> Iterator[_Change]:
    settings, training = plan.settings, plan.settings.training
    if not checkpoints_activations(settings):
        yield _training(settings, same=True, gradient_checkpointing=True)
    batch = int(training.get("per_device_train_batch_size", 8))
    if batch > 1 and len(plan.rows) > 1:
        accumulation = int(training.get("gradient_accumulation_steps", 1))
        most = min(batch, len(plan.rows)) // 2
        size = next(part for part in range(most, 0, -1) if batch % part == 0)
        yield _training(
            settings,
            same=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation * (batch // size),
        )
    evaluated = int(training.get("per_device_eval_batch_size", 8))
    if evaluated > 1 and len(plan.evaluated) > 1:
        fewer = min(evaluated, len(plan.evaluated)) // 2
        yield _training(settings, same=True, per_device_eval_batch_size=fewer)
    if "8bit" not in str(training.get("optim", "")) and not training.get("optim_args"):
        yield _training(settings, same=False, optim="adamw_bnb_8bit")
    if plan.device == "cuda" and settings.model.quantization is None:
        yield from _other_weights(settings)
    shorter = max(map(len, plan.rows), default=0) // 2
    if shorter >= _SHORTEST:
        values = {"max_length": shorter, "too_long": "drop"}
        data = settings.data.model_copy(update=values)
        yield _change(settings, "data", data, values, same=False)


def _other_weights(settings: Settings) -> Iterator[_Change]:
    if settings.model.dtype == "float32":
        yield _model(settings, dtype="bfloat16")
    if _starts_from_weights(settings):
        return
    yield _model(settings, quantization={"load_in_8bit": True})
    half = settings.training.get("fp16") or settings.model.dtype == "float16"
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    compute = {"bnb_4bit_compute_dtype": "float16" if half else "bfloat16"}
    yield _model(settings, quantization={**four, **compute})


def _training(settings: Settings, *, same: bool, **values: Any) -> _Change:
    return _change(settings, "training", {**settings.training, **values}, values, same=same)


def _model(settings: Settings, **values: Any) -> _Change:
    given = settings.model.model_dump(exclude_none=True)
    return _change(settings, "model", ModelSettings(**{**given, **values}), values, same=False)


def _change(
    settings: Settings, section: str, whole: Any, values: Mapping[str, Any], *, same: bool
) -> _Change:
    changed = settings.model_copy(update={section: whole})
    return _Change([f"{section}.{k}={_yaml(v)}" for k, v in values.items()], changed, same)


def _starts_from_weights(settings: Settings) -> bool:
    """Whether peft computes the adapter's start from weights, which must then be whole."""
    start = settings.lora.get("init_lora_weights")
    return isinstance(start, str) and start not in ("gaussian", "orthogonal")


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
