"""A page as Python's own parser of HTML reads it."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input", "br"}
# What content may add to a page: an escape, and the marks of words that differ.
ADDED = {"del", "ins"}


class Tree(HTMLParser):
    """Start and end tags with attributes, the text of each box, and all that is between tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.boxes, self.words, self.open = [], [], [], []
        self.attributes, self.cells, self.headings = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, "an element is left open"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attrs]
        classes = (attributes.get("class") or "").split()
        added = tag in ADDED or classes == ["escape"]
        if not added:
            self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append((tag, added, "text" in classes or "nothing" in classes))
        if "text" in classes or "nothing" in classes:
            self.boxes.append("")
        if tag in ("td", "th"):
            self.cells.append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        opened, added, _ = self.open.pop()
        assert opened == tag
        if not added:
            self.tags.append((f"/{tag}", []))

    def handle_data(self, data):
        inside = [tag for tag, _, _ in self.open]
        if inside[-1:] not in (["script"], ["style"]):
            self.words.append(data)
        if any(box for _, _, box in self.open):
            self.boxes[-1] += data
        if "td" in inside or "th" in inside:
            self.cells[-1] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self):
        return "".join(self.words)

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]
