"""A comparison as one HTML file that works offline, and in which no model output can do anything.

All content is escaped, and the policy at its head lets nothing run or load but the one style and
the one script that are part of the page, known by their sha256.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.judging.page_answers import answers_section
from recipe.judging.page_chart import SERIES, loss_chart, perplexity_chart, turn_text
from recipe.judging.page_figures import compact, headline, meanings
from recipe.judging.page_markup import Markup, element, joined, plain, shown, table, titled
from recipe.judging.page_table import figures_table

# What each verdict looks like, and a sign of 24 by 24 that needs no colour.
_LOOKS = {
    "learned": ("good", "M4 13l5 5L20 6"),
    "memorised": ("doubtful", "M4 8h11v11H4zM9 8V4h11v11h-5"),
    "forgot": ("doubtful", "M12 4v15M5 12l7 7 7-7"),
    "broken": ("bad", "M5 5l14 14M19 5L5 19"),
    "no effect": ("plain", "M5 9h14M5 15h14"),
    "too few rows to tell": ("plain", "M4 12h2M11 12h2M18 12h2"),
}
_SECTIONS = {
    "verdict": "Verdict",
    "measured": "Figures",
    "curves": "Curves",
    "answers": "Answers",
    "made": "Settings",
}


def page(report: Mapping[str, Any]) -> str:
    """The page of ``report``, the content of ``report.json``.

    Any of ``parts``, ``epochs``, ``loss`` and ``answers`` may be empty, and any figure null. The
    result is a function of ``report`` alone and can always be encoded as UTF-8.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = shown(plain(f"{report['verdict']['label']}: {report['run']}"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", style),
    )
    body = element(
        "body",
        element("a", "Skip to the verdict", href="#main", class_="skip"),
        _header(report),
        _navigation(),
        _main(report),
        element("footer", element("p", "Made by recipe/compare.py. It asks nothing of a network.")),
        element("script", script),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> Markup:
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _header(report: Mapping[str, Any]) -> Markup:
    base = (report.get("manifest") or {}).get("base")
    date = report["date"].replace("T", " ").replace("+00:00", " UTC")
    facts = [
        ("base", base if isinstance(base, str) else None),
        ("on", report.get("device")),
        ("date", date),
    ]
    terms = [
        element("div", element("dt", name), element("dd", element("bdi", value)))
        for name, value in facts
        if value
    ]
    return element(
        "header",
        element("p", "Base and tuned model compared", class_="eyebrow"),
        element("h1", element("bdi", report["run"])),
        element("dl", *terms, class_="about"),
    )


def _navigation() -> Markup:
    links = [
        element("li", element("a", label, href=f"#{name}")) for name, label in _SECTIONS.items()
    ]
    return element("nav", element("ul", *links), aria_label="Parts of this page")


def _main(report: Mapping[str, Any]) -> Markup:
    return element(
        "main",
        _verdict(report["verdict"], report["parts"]),
        _measured(report["parts"]),
        _curves(report),
        answers_section(report.get("answers") or [], report.get("generation") or ""),
        _made(report),
        id="main",
        tabindex=-1,
    )


def _verdict(verdict: Mapping[str, Any], parts: Mapping[str, Any]) -> Markup:
    label = verdict["label"]
    look, path = _LOOKS.get(label, ("plain", _LOOKS["no effect"][1]))
    sign = element(
        "svg", element("path", d=path), viewBox="0 0 24 24", class_="sign", aria_hidden="true"
    )
    heading = element(
        "h2",
        element("span", "Verdict: ", class_="spoken"),
        label[:1].upper() + label[1:],
        id="verdict-title",
    )
    notes = verdict.get("notes") or []
    return element(
        "section",
        element("div", sign, heading, class_="label"),
        element("p", verdict["summary"], class_="summary"),
        headline(parts),
        _listed("What it rests on", verdict.get("evidence") or []),
        _listed("To note", notes),
        id="verdict",
        class_=look,
        aria_labelledby="verdict-title",
    )


def _listed(heading: str, lines: Sequence[str]) -> Markup | None:
    if not lines:
        return None
    return joined([element("h3", heading), element("ul", *[element("li", line) for line in lines])])


def _measured(parts: Mapping[str, Any]) -> Markup:
    note = (
        "Small print under a figure is its 95% interval over rows. Differences with a p were "
        "tested in pairs, row by row, and are bold where p is below 0.05; the others are plain "
        "subtractions. On the right, base is the open circle and tuned the filled one."
    )
    return titled(
        "measured", "Figures", figures_table(parts), element("p", note, class_="note"), meanings()
    )


def _curves(report: Mapping[str, Any]) -> Markup:
    losses, epochs = report.get("loss") or [], report.get("epochs") or []
    turned = report.get("turned")
    figures = []
    if chart := perplexity_chart(epochs, turned=turned):
        rows = [
            [
                f"{one['epoch']:g}" + (f" ({turn_text(turned)})" if one["epoch"] == turned else ""),
                *(one["name"], str(one["step"])),
                *(compact(one.get(key)) for key in SERIES),
            ]
            for one in epochs
        ]
        head = ["epoch", "checkpoint", "step", *SERIES.values()]
        figures.append(_figure("Perplexity by epoch", chart, head, rows, name="by-epoch"))
    if chart := loss_chart(losses, turned=turned):
        rows = [[str(x["step"]), f"{x['epoch']:.3g}", compact(x["loss"])] for x in losses]
        head = ["step", "epoch", "loss"]
        figures.append(
            _figure(
                "Training loss by step, and its mean by epoch", chart, head, rows, name="by-step"
            )
        )
    if not figures:
        note = element("p", "The run kept neither checkpoints nor losses.", class_="note")
        return titled("curves", "Curves", note)
    return titled("curves", "Curves", element("div", *figures, class_="charts"))


def _figure(
    caption: str, chart: Markup, head: Sequence[str], rows: Sequence[Sequence[str]], *, name: str
) -> Markup:
    summary = element("summary", joined(["As a table", element("span", f": {caption.lower()}")]))
    data = element("details", summary, table(caption, head, rows, name=name))
    return element("figure", element("figcaption", caption), chart, data)


def _made(report: Mapping[str, Any]) -> Markup:
    """How it was made, for whoever wants to make it again."""
    versions = [[name, number] for name, number in (report.get("versions") or {}).items()]
    manifest = json.dumps(report.get("manifest") or {}, indent=1, ensure_ascii=False)
    return titled(
        "made",
        "How it was made",
        _folded("Commands", _verbatim("Commands", "\n".join(report.get("commands") or []))),
        _folded("Settings of the run", _verbatim("Settings", report.get("settings") or "")),
        _folded("Manifest of the run", _verbatim("Manifest", manifest)),
        _folded("Versions", table("Versions", ["library", "version"], versions, name="versions")),
    )


def _folded(summary: str, content: Markup) -> Markup:
    return element("details", element("summary", summary), content)


def _verbatim(name: str, text: str) -> Markup:
    return element(
        "div", text, class_="verbatim", dir="auto", role="region", tabindex=0, aria_label=name
    )
