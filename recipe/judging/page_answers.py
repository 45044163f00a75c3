"""Every prompt with its reference and both answers, and the controls that a script brings alive."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipe.judging.page_figures import PARTS, compact, minus
from recipe.judging.page_markup import Markup, element, joined, shown, titled
from recipe.judging.page_words import LIMIT, Span, differing

# Longer texts get a box that scrolls. A shorter one never needs it, nor a stop of the tab key.
_LONG, _LINES = 1500, 24
_ENDED = {
    "eos": ("ended by itself", None),
    "stop": ("ended at a stop string", None),
    "length": ("cut off at the limit", "cut"),
}


def answers_section(answers: Sequence[Mapping[str, Any]], generation: str) -> Markup:
    """All answers in the order given."""
    if not answers:
        note = element("p", "No answers were generated for this comparison.", class_="note")
        return titled("answers", "Answers", note)
    legend = element(
        "p",
        joined(
            [
                "Both models answered the same prompts",
                f" ({generation})" if generation else "",
                ", and every answer is here. Marked are words that stand ",
                element("del", "only in the base answer"),
                " and ",
                element("ins", "only in the tuned answer"),
                ".",
            ]
        ),
        class_="note",
    )
    listed = [_article(number, one) for number, one in enumerate(answers, start=1)]
    whole = element("div", *listed, id="answer-list")
    return titled("answers", "Answers", legend, _controls(answers), whole)


def _controls(answers: Sequence[Mapping[str, Any]]) -> Markup:
    """Hidden until the script runs; no form, so that Enter sends nothing."""
    counts = {part: sum(one["part"] == part for one in answers) for part in ("seen", "unseen")}
    choices = [("all", f"All {len(answers)}")]
    names = {"seen": "Seen", "unseen": "Held out"}
    choices += [(part, f"{names[part]} {count}") for part, count in counts.items() if count]
    radios = []
    for value, label in choices:
        radio = element(
            "input", type="radio", name="part", value=value, id=f"part-{value}",
            checked=value == "all", autocomplete="off",
        )  # fmt: skip
        radios += [radio, element("label", label, for_=f"part-{value}")]
    search = element("input", type="search", id="search", autocomplete="off", spellcheck="false")
    orders = [
        element("option", label, value=value)
        for value, label in (
            ("given", "as in the data"),
            ("gain", "largest ROUGE-L gain first"),
            ("loss", "largest ROUGE-L loss first"),
        )
    ]
    mark = element("input", type="checkbox", id="mark", checked=True, autocomplete="off")
    return element(
        "div",
        _field(
            element("p", id="count", role="status", aria_live="polite"),
            element(
                "fieldset", element("legend", "Rows", class_="spoken"), *radios, class_="choice"
            ),
        ),
        _field(element("label", "Search prompts and answers", for_="search"), search),
        _field(
            element("label", "Order", for_="order"),
            element("select", *orders, id="order", autocomplete="off"),
        ),
        element("div", mark, element("label", "Mark differences", for_="mark"), class_="check"),
        id="controls",
        role="search",
        aria_label="Filter the answers",
        hidden=True,
    )


def _field(label: Markup, control: Markup) -> Markup:
    return element("div", label, control, class_="field")


def _article(number: int, one: Mapping[str, Any]) -> Markup:
    base, tuned = one["base"], one["tuned"]
    title = f"{PARTS[one['part']].removesuffix('s')} {one['index']}"
    change = f"ROUGE-L {base['rougeL']:.2f} → {tuned['rougeL']:.2f}"
    spans = differing(base["text"], tuned["text"])
    ours, theirs = spans or ([], [])
    notes = []
    if spans is None:
        notes.append(f"Differences are not marked: an answer has more than {LIMIT:,} words.")
    elif base["text"] == tuned["text"]:
        notes.append("Both models gave the same answer.")
    return element(
        "article",
        element(
            "div",
            element("h3", title, id=f"answer-{number}-title"),
            element("p", change, class_="change"),
            class_="answer-head",
        ),
        _panel("Prompt", one["prompt"], number, class_="prompt"),
        element(
            "div",
            _panel("Reference", one["reference"], number, class_="reference"),
            _panel(
                "Base",
                base["text"],
                number,
                mark=("del", ours),
                facts=_facts(base, one["reference"]),
            ),
            _panel(
                "Tuned",
                tuned["text"],
                number,
                mark=("ins", theirs),
                facts=_facts(tuned, one["reference"]),
            ),
            class_="columns",
        ),
        *[element("p", note, class_="note") for note in notes],
        class_="answer",
        id=f"answer-{number}",
        aria_labelledby=f"answer-{number}-title",
        data_part=one["part"],
        data_change=f"{tuned['rougeL'] - base['rougeL']:.6f}",
    )


def _panel(
    name: str,
    text: str,
    number: int,
    *,
    class_: str | None = None,
    mark: tuple[str, Sequence[Span]] = ("ins", ()),
    facts: Markup | None = None,
) -> Markup:
    """A heading, the text, and what is known of it."""
    if text:
        long = len(text) > _LONG or text.count("\n") >= _LINES
        box: dict[str, str | float | bool | None] = {"dir": "auto", "class_": "text"}
        if long:
            label = f"{name} {number}, scrolls"
            box |= {"class_": "text long", "tabindex": 0, "role": "group", "aria_label": label}
        body = element("div", _marked(text, *mark), **box)
    else:
        body = element("p", "(empty)", class_="nothing")
    return element(
        "div", element("h4", name), body, facts, class_=f"panel {class_ or name.lower()}"
    )


def _marked(text: str, tag: str, spans: Sequence[Span]) -> Markup:
    """``text`` with each stretch in an element of its own."""
    parts, done = [], 0
    for start, end in spans:
        parts += [shown(text[done:start]), element(tag, text[start:end])]
        done = end
    return joined([*parts, shown(text[done:])])


def _facts(answer: Mapping[str, Any], reference: str) -> Markup:
    reason = answer["finish_reason"]
    ended, class_ = _ENDED.get(reason, (reason, None))
    tokens = answer["tokens"]
    facts = [
        element("li", ended, class_=class_),
        element("li", f"{tokens:,} token{'' if tokens == 1 else 's'}"),
        element("li", f"ROUGE-L {minus(compact(answer['rougeL']))}"),
    ]
    if answer["text"] and not answer["text"].strip():
        facts.append(element("li", "white space only", class_="cut"))
    if answer["text"].strip() and answer["text"].strip() == reference.strip():
        facts.insert(0, element("li", "is the reference", class_="hit"))
    if copied := answer.get("copied"):
        said = (
            f"repeats the answer of training row {copied['index']}: {copied['share']:.0%} of its "
            "runs of five words stand there"
        )
        facts.append(element("li", said, class_="copied"))
    return element("ul", *facts, class_="facts")
