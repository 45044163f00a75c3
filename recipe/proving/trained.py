"""The claims on whole runs: the base stays, the adapter comes back, and runs repeat."""

from collections.abc import Sequence
from typing import Any

from safetensors.torch import load

from recipe.proving import runs
from recipe.proving.evidence import MOST, Evidence, bounded
from recipe.proving.finding import Finding, compared, not_applicable, number
from recipe.proving.watchers import relative

BASE = "base bit-equal after steps"
RELOADED = "save → load → same logits"
RESUMED = "stop → resume → same bytes"
SAME_SEED = "same seed twice → same bytes"
_CHANGES_BASE = ("pissa", "olora")
_MOST_IN_16_BIT = 0.05


def base(evidence: Evidence) -> Finding:
    """Each tensor of the base, before the first step, behind the last, and in the checkpoint."""
    hashes, checkpoint = evidence.trained.base, evidence.reloaded.base
    changes = _changes_base(evidence)
    changed = {name for name in hashes.before if hashes.before[name] != hashes.after.get(name)}
    if not changes:
        names = hashes.after.keys() | checkpoint.keys()
        changed |= {name for name in names if hashes.after.get(name) != checkpoint.get(name)}
    said = f"{len(hashes.before)} tensors over {runs.steps(evidence.plan)} steps"
    said += f"; {changes} changes them before the first" if changes else ", and the checkpoint's"
    named = f"; {min(changed)}" if changed else ""
    return compared(BASE, len(changed), tolerance=0, note=said + named)


def reloaded(evidence: Evidence) -> Finding:
    """Logits of the model in memory, and of stock peft with what was saved."""
    again = evidence.reloaded
    pairs = list(zip(evidence.trained.logits, again.logits, strict=True))
    measured = max(relative(ours, theirs) for ours, theirs in pairs)
    equal = all((ours == theirs).all() for ours, theirs in pairs)
    tokens = sum(len(logits) for logits in again.logits)
    most = _MOST_IN_16_BIT if again.kernels > MOST else MOST
    # What PiSSA and OLoRA took out of the base is put back as part of a larger adapter, and rounds.
    tolerance = most if _changes_base(evidence) else bounded(again.kernels, most=most)
    return compared(
        RELOADED,
        measured,
        tolerance=tolerance,
        note=f"stock peft on a stock base, {tokens} tokens, "
        + ("bit-equal" if equal else f"stock eager ↔ stock sdpa {number(again.kernels)}"),
    )


def _changes_base(evidence: Evidence) -> str | None:
    """The initialisation that takes its start out of the base, if it is one of those."""
    init = evidence.plan.settings.lora.get("init_lora_weights")
    return init if isinstance(init, str) and init.startswith(_CHANGES_BASE) else None


def resumed(evidence: Evidence) -> Finding:
    """Adapter and records of a run that was stopped in its middle, and of one that was not."""
    if not evidence.same_twice:
        return not_applicable(RESUMED, f'rests on "{SAME_SEED}", which does not hold')
    adapter, records = evidence.resumed
    whole = evidence.trained
    other_records = _different(records, whole.records)
    tensors = _different_tensors(adapter, whole.adapter)
    note = (
        f"{runs.steps(evidence.plan)} steps of {runs.BATCH} × {runs.ACCUMULATION} rows, stopped "
        f"within step {evidence.stopped_within}; {len(whole.records)} records"
    )
    if tensors or other_records:
        note += f"; {tensors} tensors and {other_records} records differ"
    return compared(RESUMED, tensors + other_records, tolerance=0, note=note)


def same_seed(evidence: Evidence) -> Finding:
    """Two runs of one config."""
    tensors = _different_tensors(evidence.trained.adapter, evidence.trained_again.adapter)
    records = _different(evidence.trained.records, evidence.trained_again.records)
    note = f"{len(evidence.trained.adapter):,} bytes, {len(evidence.trained.records)} records"
    if (tensors or records) and not evidence.plan.on_cpu:
        note += "; on a GPU some kernels add in any order unless training.full_determinism is true"
    return compared(SAME_SEED, tensors + records, tolerance=0, note=note)


def _different_tensors(one: bytes, other: bytes) -> int:
    """How many tensors of two safetensors files differ; 1 where only the rest does."""
    if one == other:
        return 0
    ours, theirs = load(one), load(other)
    names = ours.keys() | theirs.keys()
    return max(1, sum(not _equal(ours.get(name), theirs.get(name)) for name in names))


def _equal(one: Any, other: Any) -> bool:
    return one is not None and other is not None and bool((one == other).all())


def _different(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(a != b for a, b in pairs) + abs(len(one) - len(other))
