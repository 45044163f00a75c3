"""Markup that text cannot break out of: whatever is not ``Markup`` is escaped where it enters."""

import html
import unicodedata
from collections.abc import Iterable

_VOID = {"br", "input", "meta"}
# They print as nothing, though Unicode counts them among letters and marks.
_BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}
_BLANK |= {*range(0x180B, 0x1810), *range(0xE0100, 0xE01F0)}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


class _Escapes(dict[int, str]):
    """For ``str.translate``: what a reader would not see is written out, the rest stays."""

    def __init__(self, form: str) -> None:
        self._form = form

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = letter if _is_seen(letter) else self._form.format(code)
        return self[code]


_ESCAPED = "⟨U+{:04X}⟩"
_PLAIN = _Escapes(_ESCAPED)
_SPANS = _Escapes(f'<span class="escape">{_ESCAPED}</span>')


def _is_seen(letter: str) -> bool:
    """Not so: controls, bidi and zero-width characters, surrogates, what Unicode does not name."""
    spaces = letter in "\n\t" or unicodedata.category(letter) == "Zs"
    return (spaces or letter.isprintable()) and ord(letter) not in _BLANK


def plain(text: str) -> str:
    """``text`` with what cannot be seen written as ``⟨U+202E⟩``; any of it can become UTF-8."""
    return text.translate(_PLAIN)


def shown(text: str) -> Markup:
    """``text`` as content of an element, exactly, with what cannot be seen in spans."""
    return text if isinstance(text, Markup) else Markup(html.escape(text).translate(_SPANS))


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Of markup, and of text that becomes markup."""
    return Markup(shown(between).join(map(shown, parts)))


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """``element("p", "a < b", class_="note")``; an underscore in a name stands for a dash.

    Children that are no ``Markup`` are escaped, as are all attributes. A child that is None and an
    attribute that is None or False are left out.
    """
    opened = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        text = "" if value is True else html.escape(plain(str(value)))
        opened.append(f'{label}="{text}"')
    start = f"<{' '.join(opened)}>"
    if name in _VOID:
        return Markup(start)
    content = "".join(shown(child) for child in children if child is not None)
    return Markup(f"{start}{content}</{name}>")


def titled(name: str, heading: str, *children: str | None, level: int = 2) -> Markup:
    """A section with a heading that names it and that the navigation can point to."""
    title = element(f"h{level}", heading, id=f"{name}-title")
    return element("section", title, *children, id=name, aria_labelledby=f"{name}-title")


def table(
    caption: str,
    head: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    name: str,
    class_: str | None = None,
) -> Markup:
    """A plain table; the first cell of each row is its header."""
    body = []
    for first, *rest in rows:
        cells = [element("td", cell) for cell in rest]
        body.append(element("tr", element("th", first, scope="row"), *cells))
    return scrolling_table(caption, head, [element("tbody", *body)], name=name, class_=class_)


def scrolling_table(
    caption: str,
    head: Iterable[str],
    bodies: Iterable[Markup],
    *,
    name: str,
    class_: str | None = None,
) -> Markup:
    """A table in a region of its own that scrolls sideways, by keyboard too."""
    cells = [element("th", cell, scope="col") for cell in head]
    whole = element(
        "table",
        element("caption", caption, id=f"{name}-caption"),
        element("thead", element("tr", *cells)),
        *bodies,
        class_=class_,
    )
    labelled = f"{name}-caption"
    return element(
        "div", whole, class_="scroll", role="region", tabindex=0, aria_labelledby=labelled
    )
