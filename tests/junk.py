"""Hypothesis strategies for what a file could hold instead of what it should."""

from hypothesis import strategies as st

# Line ends that str.splitlines knows, control characters, halves of surrogate pairs.
_ODD = "\0\n\r\t\x0b\x1c\x7f\x85\u2028\u2029\ud800\udfff\ufeff\u200d\u0301'\"\\,:;{}[]<>|"

texts = st.text() | st.text(alphabet=_ODD + "ab ", max_size=8)
numbers = st.integers() | st.floats() | st.integers(min_value=10**17, max_value=10**30)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few pieces cut out and others put in."""
    content = draw(sound)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 20)))
        content = content[:start] + draw(st.binary(max_size=8)) + content[stop:]
    return content
