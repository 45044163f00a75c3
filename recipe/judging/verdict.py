"""Did it learn, memorise or forget? One word, a sentence, and the figures that it rests on.

All differences are tuned minus base in nats a token, so that below zero is likelier. The thresholds
were chosen on runs of the starter data whose truth is known; `make bench-verdict` holds them
against such runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recipe.judging.statistics import Difference

# Fewer rows than these say nothing of rows in general, fewer answers nothing of copying.
_ROWS, _TOLD = 10, 5
# A gain below this is nothing that anyone would notice, however certain it is.
_NOTHING = 0.02
# Where the interval holds 0 and has room for this much, the rows are too few.
_NOTABLE = 0.1
# Neutral text that became this much less likely: perplexity times 1.22, and times 7.4.
_FORGOT = 0.2
_BROKEN = 2.0
# Seen rows gained this much more than held-out ones (of a base that is at less than twice this,
# half of what it had left), which got less than a third of their gain.
_GAP = 0.5
_A_THIRD = 1 / 3
# Held-out rows became this much less likely again than after their best epoch.
_LOST_AGAIN = 0.2
# Half of the answers more than the base's are stuck in repetition, are empty, or repeat a training
# answer.
_HALF = 0.5


@dataclass(frozen=True)
class Epoch:
    """Perplexities after ``epoch``, 0 being the base; ``unseen`` is None without such rows.

    ``is_adapter`` marks the one that the run ended with, which is not the last where it kept the
    best.
    """

    epoch: float
    step: int
    name: str
    seen: float
    unseen: float | None
    neutral: float
    is_adapter: bool = False


@dataclass(frozen=True)
class Answers:
    """Shares of the answers of base and tuned model.

    ``copied`` are those to seen rows that repeat a training answer, and ``told`` how many are long
    enough to tell; ``copied_unseen`` likewise of held-out rows. ``repetition`` is of all 4-grams,
    the base's share or, where that is more, the references'; ``empty`` of all answers.
    """

    copied: tuple[float, float]
    told: int
    copied_unseen: tuple[float, float]
    repetition: tuple[float, float]
    empty: tuple[float, float]


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on.

    ``base_nats`` is what the base takes for a token of the seen rows. ``own_prompt`` is how many
    nats a token a held-out answer is likelier to the tuned model behind its own prompt than behind
    another row's; None where prompts do not differ. ``answers`` is None where none were written.
    """

    base_nats: float
    seen: Difference
    neutral: Difference
    unseen: Difference | None
    rows: Mapping[str, int]
    own_prompt: Difference | None = None
    answers: Answers | None = None
    epochs: Sequence[Epoch] = ()

    @property
    def enough_unseen(self) -> bool:
        """Whether the held-out rows say anything of rows in general."""
        return self.unseen is not None and self.rows["unseen"] >= _ROWS


@dataclass(frozen=True)
class Verdict:
    """``label`` is learned, memorised, no effect, broken, forgot, or too few rows to tell."""

    label: str
    summary: str
    evidence: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verdict(found: Evidence) -> Verdict:
    """The first that holds: broken, memorised, forgot, too few rows to tell, no effect, learned."""
    for rule in (_broken, _memorised, _forgot, _too_few, _no_effect, _worse):
        if said := rule(found):
            label, summary = said
            break
    else:
        label = "learned"
        owned = "" if found.own_prompt is None else ", and likelier behind their own prompts"
        summary = f"Answers that it never saw became likelier than they were to the base{owned}."
    return Verdict(label, summary, _evidence(found), _notes(found, label))


def turning(epochs: Sequence[Epoch]) -> float | None:
    """The epoch after which held-out rows became less likely and seen ones still likelier: where
    learning turned into memorising.
    """
    told = [one for one in epochs if one.unseen is not None]
    if len(told) < 2:
        return None
    best, last = min(told, key=_unseen), told[-1]
    again = _worse_by(best, last) >= _NOTHING
    return best.epoch if again and last.seen < best.seen else None


def _unseen(one: Epoch) -> float:
    assert one.unseen is not None
    return one.unseen


def _worse_by(best: Epoch, last: Epoch) -> float:
    """In nats a token."""
    return math.log(_unseen(last)) - math.log(_unseen(best))


def _broken(found: Evidence) -> tuple[str, str] | None:
    parts = [one for one in (found.seen, found.unseen, found.neutral) if one is not None]
    if not math.isfinite(found.base_nats):
        return (
            "broken",
            "The base itself computes values that are not finite. Nothing can be compared with it; "
            "use another model.dtype.",
        )
    if not all(math.isfinite(one.value) for one in parts):
        return "broken", "The tuned model computes values that are not finite."
    if found.neutral.value > _BROKEN:
        return (
            "broken",
            "Ordinary text became all but impossible to the tuned model: its perplexity is "
            f"{_times(found.neutral.value)} times the base's.",
        )
    answers = found.answers
    if answers and _more(answers.repetition) > _HALF:
        return "broken", "Its answers are stuck in repetition, which the base's are not."
    if answers and _more(answers.empty) > _HALF:
        return "broken", "Most of its answers are empty, which the base's are not."
    return None


def _memorised(found: Evidence) -> tuple[str, str] | None:
    for rule in (_copies, _turned, _gap):
        if summary := rule(found):
            return "memorised", summary
    return None


def _copies(found: Evidence) -> str | None:
    answers = found.answers
    if answers is None or answers.told < _TOLD or not _more(answers.copied) > _HALF:
        return None
    if _more(answers.copied_unseen) > _HALF:  # there are few answers to choose from
        return None
    return (
        f"It repeats training answers: {answers.copied[1]:.0%} of its answers to seen rows that "
        f"have five words or more, where the base repeats {answers.copied[0]:.0%}."
    )


def _turned(found: Evidence) -> str | None:
    turned = turning(found.epochs)
    if turned is None or not found.enough_unseen:
        return None
    best = next(one for one in found.epochs if one.epoch == turned)
    kept = next((one for one in found.epochs if one.is_adapter), best)
    if kept.epoch <= turned or _worse_by(best, kept) < _LOST_AGAIN:
        return None
    when = f"After epoch {turned:g} held-out rows became less likely again"
    return (
        f"{when if turned else 'Held-out rows became less likely from the start'}, perplexity "
        f"{best.unseen:.2f} → {kept.unseen:.2f}, while seen ones became likelier."
    )


def _gap(found: Evidence) -> str | None:
    if found.unseen is None or not found.enough_unseen:
        return None
    seen, unseen = -found.seen.value, -found.unseen.value
    certain = -found.seen.high > -found.unseen.low
    large = seen - unseen >= min(_GAP, found.base_nats / 2)
    if not (certain and large and unseen < seen * _A_THIRD):
        return None
    others = f"gained {unseen:.2f}" if unseen >= 0 else f"lost {-unseen:.2f}"
    return (
        f"Seen rows gained {seen:.2f} nats a token and held-out rows {others}: most of what it "
        "learned holds for the seen rows alone."
    )


def _forgot(found: Evidence) -> tuple[str, str] | None:
    if found.neutral.value < _FORGOT or not found.neutral.low > 0:
        return None
    learned = found.unseen is not None and -found.unseen.high > _NOTHING
    return (
        "forgot",
        ("It learned what the rows teach, but text" if learned else "Text")
        + " that has nothing to do with them became less likely: its perplexity is "
        f"{_times(found.neutral.value)} times the base's.",
    )


def _too_few(found: Evidence) -> tuple[str, str] | None:
    label, rows = "too few rows to tell", found.rows.get("unseen", 0)
    gain = found.unseen
    if gain is None:
        if abs(found.seen.value) < _NOTHING:
            return "no effect", "Even the rows that it was trained on are as likely as before."
        return (
            label,
            "No rows were held out, and without them nothing tells learning from memorising. Name "
            "rows of the source that it was not trained on with --unseen.",
        )
    if rows < _ROWS:
        return (
            label,
            f"{rows} held-out rows say little of rows in general. Compare {_ROWS} or more: with "
            "--rows, or name them with --unseen.",
        )
    if not gain.low <= 0 <= gain.high or max(-gain.low, gain.high) <= _NOTABLE:
        return None
    return (
        label,
        f"The gain on {rows} held-out rows lies anywhere between {-gain.high:+.2f} and "
        f"{-gain.low:+.2f} nats a token. Compare more: with --rows, or name them with --unseen.",
    )


def _no_effect(found: Evidence) -> tuple[str, str] | None:
    assert found.unseen is not None
    gain, own = found.unseen, found.own_prompt
    if gain.low <= 0 <= gain.high or abs(gain.value) < _NOTHING:
        return "no effect", "Held-out answers are as likely as they were to the base."
    if 0 < gain.value < _NOTABLE:
        return "no effect", "Held-out answers became no likelier, but a little less likely."
    if gain.value < 0 and own is not None and own.value < _NOTHING:
        return (
            "no effect",
            "Answers became likelier, but as likely behind another row's prompt as behind their "
            "own: it learned how answers look, and nothing about which belongs to which prompt.",
        )
    return None


def _worse(found: Evidence) -> tuple[str, str] | None:
    assert found.unseen is not None
    if found.unseen.value < 0:
        return None
    if found.seen.value < -_NOTABLE:
        return (
            "memorised",
            "Seen rows became likelier, and held-out answers less likely than they were to the "
            "base.",
        )
    return "broken", "Held-out answers became less likely than they were to the base."


def _more(shares: tuple[float, float]) -> float:
    """How much larger the tuned model's share is; nothing where either is unknown."""
    base, tuned = shares
    return 0.0 if math.isnan(tuned - base) else tuned - base


def _evidence(found: Evidence) -> list[str]:
    names = {"seen": "seen rows", "unseen": "held-out rows", "neutral": "neutral text"}
    parts = {"seen": found.seen, "unseen": found.unseen, "neutral": found.neutral}
    lines = [
        f"{name}: {one.value:+.3f} nats a token ({one.low:+.3f} to {one.high:+.3f}), perplexity "
        f"times {_times(one.value)}" + (f", {found.rows[part]} rows" if part != "neutral" else "")
        for part, name in names.items()
        if (one := parts[part]) is not None
    ]
    if found.own_prompt is not None:
        own = found.own_prompt
        lines.append(
            f"held-out answers are {own.value:+.3f} nats a token likelier behind their own prompt "
            f"than behind another row's ({own.low:+.3f} to {own.high:+.3f})"
        )
    copied = found.answers.copied if found.answers else ()
    if any(not math.isnan(share) for share in copied):
        shares = " → ".join("–" if math.isnan(share) else f"{share:.0%}" for share in copied)
        lines.append(
            f"answers to seen rows, five words or more, repeat a training answer: {shares}"
        )
    return lines


def _times(nats: float) -> str:
    if math.isnan(nats):
        return "–"
    return f"{math.exp(nats):,.2f}" if nats < math.log(1e6) else "more than a million"


def _notes(found: Evidence, label: str) -> list[str]:
    notes = []
    turned = turning(found.epochs)
    if turned is not None:
        after = f"epoch {turned:g}" if turned else "the very start"
        notes.append(
            f"Learning turned into memorising after {after}: train no longer than that, or on more "
            "rows."
        )
    if label not in ("forgot", "broken") and _forgot(found):
        notes.append(
            f"Neutral text became less likely too: perplexity times {_times(found.neutral.value)}."
        )
    return notes
