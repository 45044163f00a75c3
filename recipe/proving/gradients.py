"""The claims on gradients: each step's of a real run, against stock code or another real run."""

from recipe.data.openings import shared_openings
from recipe.proving.evidence import Evidence, strict_difference
from recipe.proving.finding import Finding, compared, not_applicable, number
from recipe.proving.watchers import relative

ACCUMULATION = "accumulation = one big batch"
FLATTENED = "flattened = padded"
OPENINGS = "shared openings = plain"
CHUNKED = "chunked = plain loss"
CHECKPOINTING = "checkpointing on = off"
EVERY_TENSOR = "every adapter tensor gets a gradient, base none"


def accumulation(evidence: Evidence) -> Finding:
    """Each shape of the window, and a short last one, against stock on the padded whole."""
    plan = evidence.plan
    if plan.too_large:
        return not_applicable(ACCUMULATION, plan.too_large)
    if not _flattened_holds(evidence):
        return not_applicable(ACCUMULATION, _rests_on(FLATTENED))
    found = {
        f"{batch}×{steps}": evidence.difference(
            evidence.gradients(batch, steps), rows_per_step=batch * steps
        )
        for batch, steps in plan.shapes
    }
    shapes = " · ".join(f"{shape} {number(value)}" for shape, value in found.items())
    short = f" and {len(plan.rows) % plan.window}" if len(plan.rows) % plan.window else ""
    return compared(
        ACCUMULATION,
        max(found.values()),
        tolerance=evidence.tolerance,
        note=f"{shapes}, windows of {plan.window}{short} rows; stock eager ↔ stock sdpa "
        f"{number(evidence.stock.kernels)}",
    )


def flattened(evidence: Evidence) -> Finding:
    """One micro-batch without padding: the NLL of each trained token, and the gradient."""
    plan = evidence.plan
    if plan.too_large:
        return not_applicable(FLATTENED, plan.too_large)
    nll, gradient = _flattened(evidence)
    stock = evidence.stock.nll
    return compared(
        FLATTENED,
        max(nll, gradient),
        tolerance=evidence.tolerance,
        note=f"NLLs of {len(stock)} trained tokens {number(nll)} · gradient {number(gradient)}",
    )


def _flattened(evidence: Evidence) -> tuple[float, float]:
    ours, stock = evidence.whole.first.nll, evidence.stock.nll
    nll = relative(ours, stock) if ours.shape == stock.shape else float("inf")
    batch, steps = evidence.plan.shapes[0]
    return nll, evidence.difference(evidence.whole.steps, rows_per_step=batch * steps)


def _flattened_holds(evidence: Evidence) -> bool:
    return max(_flattened(evidence)) <= evidence.tolerance


def _rests_on(claim: str) -> str:
    return f'rests on "{claim}", which does not hold'


def openings(evidence: Evidence) -> Finding:
    """The window with openings computed once, against the same without."""
    plan = evidence.plan
    attention = plan.settings.model.attn_implementation
    window = plan.rows[: plan.window]
    shared = shared_openings(window)
    if plan.too_large:
        return not_applicable(OPENINGS, plan.too_large)
    if attention != "per_row_sdpa":
        return not_applicable(OPENINGS, f"attn_implementation {attention} shares none")
    if shared is None:
        return not_applicable(OPENINGS, f"no openings of the first {len(window)} rows are worth it")
    if not _flattened_holds(evidence):
        return not_applicable(OPENINGS, _rests_on(FLATTENED))
    batch, steps = plan.shapes[0]
    ours = evidence.gradients(batch, steps, share_openings=True)
    saved, tokens = sum(one.opening for one in shared), sum(row.needed for row in window)
    return compared(
        OPENINGS,
        strict_difference(ours, evidence.whole.steps),
        tolerance=evidence.tolerance,
        note=f"gradient; {saved} of {tokens} tokens not computed",
    )


def chunked(evidence: Evidence) -> Finding:
    """The loss in chunks of a few positions: each NLL, and the gradient of the hidden states."""
    if evidence.plan.too_large:
        return not_applicable(CHUNKED, evidence.plan.too_large)
    first = evidence.whole.first
    if first.chunked is None:
        reason = "the head is trained, adapted or quantized, so the model applies it as ever"
        return not_applicable(CHUNKED, reason)
    plain, exact = first.chunked
    return compared(
        CHUNKED,
        max(plain, exact),
        tolerance=evidence.tolerance,
        note=f"{first.chunks} chunks against the plain loss {number(plain)}, torch's in float64 "
        f"{number(exact)}",
    )


def checkpointing(evidence: Evidence) -> Finding:
    """The window with gradient checkpointing, against the same without."""
    if evidence.plan.too_large:
        return not_applicable(CHECKPOINTING, evidence.plan.too_large)
    batch, steps = evidence.plan.shapes[0]
    ours = evidence.gradients(batch, steps, checkpointing=True)
    measured = strict_difference(ours, evidence.whole.steps)
    note = "gradient, bit-equal" if measured == 0 else "gradient"
    return compared(CHECKPOINTING, measured, tolerance=evidence.tolerance, note=note)


def every_tensor(evidence: Evidence) -> Finding:
    """The tensors with a gradient are those that stock peft trains, and no other."""
    plan = evidence.plan
    if plan.too_large:
        return not_applicable(EVERY_TENSOR, plan.too_large)
    ours, stock = evidence.whole.steps[0], evidence.stock.steps[plan.window][0]
    # A token that no row holds trains no row of its embedding; stock then says so.
    expected = {name for name, gradient in stock.items() if gradient.any()}
    found = {name for name, gradient in ours.items() if gradient.any()}
    without = sorted(expected - found)
    more = sorted(ours.keys() - stock.keys())
    said = f"{len(found & expected)} of {len(expected)}; {len(more)} of the base"
    named = f": {_short((without or more)[0])}" if without or more else ""
    return compared(EVERY_TENSOR, len(without) + len(more), tolerance=0, note=said + named)


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")
