"""The figures of a comparison: their names in plain words, and how each is written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.judging.page_markup import Markup, element, joined

DASH = "–"
PARTS = {"seen": "Seen rows", "unseen": "Held-out rows", "neutral": "Neutral text"}
_POINTS = " points"


@dataclass(frozen=True)
class Figure:
    """``form`` is number, score (0 to 1) or share (shown in percent).

    ``tested`` names the difference that has an interval and a p.
    """

    name: str
    label: str
    form: str
    meaning: str
    tested: str | None = None

    def text(self, value: float | None) -> str:
        """``6.25``, ``0.583``, ``61.1%``; an en dash for what is not there."""
        if value is None or not math.isfinite(value):
            return DASH
        if self.form == "share":
            return minus(f"{100 * value:.1f}%")
        return minus(f"{value:.3f}") if self.form == "score" else compact(value)

    def difference(self, base: float | None, tuned: float | None) -> str:
        """Tuned minus base."""
        if base is None or tuned is None or not math.isfinite(tuned - base):
            return DASH
        change = tuned - base
        if self.form == "share":
            return minus(f"{100 * change:+.1f}{_POINTS}")
        return minus(f"{change:+.3f}" if self.form == "score" else f"{change:+,.2f}")


FIGURES = (
    Figure(
        "perplexity",
        "Perplexity",
        "number",
        "How surprised the model is by each token of the text: 1 is not at all, and lower is "
        "better. Its difference is tested on its logarithm, in nats a token.",
        tested="nll",
    ),
    Figure(
        "rougeL",
        "ROUGE-L",
        "score",
        "How much of the reference stands in the answer in the same order, from 0 to 1.",
        tested="rougeL",
    ),
    Figure("rouge1", "ROUGE-1", "score", "Words that answer and reference share, from 0 to 1."),
    Figure("rouge2", "ROUGE-2", "score", "Pairs of words that they share, from 0 to 1."),
    Figure("exact_answer", "Exact answers", "share", "Answers that are the reference."),
    Figure(
        "near_copy",
        "Near copies",
        "share",
        "Answers that repeat one of the training rows: at least 80% of their runs of five words "
        "stand in one training answer. Shorter answers are not counted.",
    ),
    Figure(
        "stop_rate",
        "Ended by itself",
        "share",
        "Answers that ended before the limit of tokens was reached.",
    ),
    Figure("mean_tokens", "Tokens an answer", "number", "The mean length of the answers."),
    Figure(
        "repetition",
        "Repetition",
        "share",
        "Runs of four tokens that stood in the same answer before.",
    ),
)
FIGURE = {figure.name: figure for figure in FIGURES}


def minus(text: str) -> str:
    """With the sign that is as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def compact(value: float | None) -> str:
    """``6.25``, ``123.4``, ``12,345``, ``1.2e+08``; an en dash for what is not there."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size >= 1e6:
        return minus(f"{value:.1e}")
    return minus(f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2}f}")


def p_text(p: float | None) -> str:
    """``p = 0.032``, ``p < 0.001``; nothing where there is none."""
    if p is None or not math.isfinite(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def value_of(part: Mapping[str, Any] | None, model: str, name: str) -> float | None:
    """Of ``parts``: what ``model`` reached, None where it was not measured."""
    found = ((part or {}).get(model) or {}).get(name) or {}
    value: float | None = found.get("value")
    return value


def headline(parts: Mapping[str, Any]) -> Markup | None:
    """The figures that a verdict is read from, each from base to tuned."""
    tiles = []
    for part, name in (
        ("seen", "perplexity"),
        ("unseen", "perplexity"),
        ("neutral", "perplexity"),
        ("unseen", "rougeL"),
        ("unseen", "exact_answer"),
        ("seen", "near_copy"),
    ):
        base, tuned = (value_of(parts.get(part), model, name) for model in ("base", "tuned"))
        if base is None and tuned is None:
            continue
        figure = FIGURE[name]
        label = joined([figure.label, element("span", PARTS[part].lower())], " ")
        change = joined(
            [
                element("span", figure.text(base), class_="from"),
                element("span", "→", class_="arrow", aria_hidden="true"),
                element("span", " to ", class_="spoken"),
                element("strong", figure.text(tuned)),
            ]
        )
        tiles.append(element("div", element("dt", label), element("dd", change)))
    return element("dl", *tiles, class_="tiles") if tiles else None


def meanings() -> Markup:
    """A sentence for each figure."""
    terms = [
        part
        for figure in FIGURES
        for part in (element("dt", figure.label), element("dd", figure.meaning))
    ]
    summary = element("summary", "What the figures mean")
    return element("details", summary, element("dl", *terms, class_="meanings"))
