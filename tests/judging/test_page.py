"""The page of a comparison, read by Python's own parser of HTML."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise

import pytest

from recipe.judging.page import page
from recipe.judging.page_markup import element, plain
from tests.judging.page_tree import Tree
from tests.judging.reports import ANSWERS, HOSTILE, answer, filled, report


def written_out(text):
    """The oracle: what Unicode calls other, or a separator of lines, and what draws nothing."""
    blank = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\u180b\u180c\u180d\u180f"
    return "".join(
        f"⟨U+{ord(letter):04X}⟩"
        if (unicodedata.category(letter)[0] == "C" and letter not in "\n\t")
        or unicodedata.category(letter) in ("Zl", "Zp")
        or letter in blank
        or 0xE0100 <= ord(letter) <= 0xE01EF
        else letter
        for letter in text
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_shown_exactly_and_is_no_markup(name):
    text = HOSTILE[name]
    made = page(filled(text))
    assert made.encode("utf-8").decode("utf-8") == made
    assert not re.search("[\0\r\u202e\u2066\u200b\x1b\x85]", made)
    tree, harmless = Tree(made), Tree(page(filled(re.sub(r"\S", "x", text))))
    assert tree.tags == harmless.tags
    expected = written_out(text)
    assert tree.boxes == [*[expected] * 3, f"{expected} and {expected}"] * 2
    assert tree.text.count(expected) >= 20


@pytest.mark.parametrize("name", HOSTILE)
def test_an_attribute_holds_its_text_and_nothing_else(name):
    """No text of others is in one today."""
    text = HOSTILE[name]
    made = element("p", text, title=text, hidden=True, lang=None, class_="x y")
    assert Tree(made).attributes[:3] == [
        ("p", "title", written_out(text)),
        ("p", "hidden", ""),
        ("p", "class", "x y"),
    ]
    content = made.partition(">")[2].removesuffix("</p>")
    assert not re.search("[\"'<>]", re.sub("</?span[^>]*>", "", content))


def test_every_code_point_is_shown_or_written_out():
    codes = [*range(0x33480), *range(0xDFFF0, 0xF0010), *range(0x10FFF0, sys.maxunicode + 1)]
    everything = "".join(map(chr, codes))  # without planes that have nothing in them
    assert plain(everything) == written_out(everything)
    plain(everything).encode("utf-8")


def test_what_looks_like_an_escape_is_told_from_one():
    one = ANSWERS[0] | {"prompt": "⟨U+202E⟩ and \u202e"}
    made = page(report(answers=[one]))
    assert '⟨U+202E⟩ and <span class="escape">⟨U+202E⟩</span>' in made


def test_the_policy_allows_the_one_style_and_the_one_script():
    made = page(filled(HOSTILE["closes all"]))
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', made)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.replace("&#x27;", "'").split(";"))
    assert rules.pop("default-src") == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", made, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
        assert made.count(f"<{tag}") == 1
        assert len(block) > 1000
        assert "</" not in block
        assert "http" not in block
    assert rules == {"base-uri": "'none'", "form-action": "'none'"}
    assert made.index("Content-Security-Policy") < made.index("<style>")


def test_nothing_is_fetched_and_nothing_runs_from_an_attribute():
    tree = Tree(page(filled(HOSTILE["link"])))
    keys = {key for _, key, _ in tree.attributes}
    assert not keys & {"src", "srcset", "style", "action", "formaction", "data", "poster", "xmlns"}
    assert not [key for key in keys if key.startswith(("on", "xlink"))]
    assert {tag for tag, key, _ in tree.attributes if key == "href"} == {"a"}
    assert all(value.startswith("#") for value in tree.values("href"))
    for _, _, value in tree.attributes:
        assert not re.search(r"https?:|url\(|javascript:", value or "")
    style = re.search("<style>(.*?)</style>", page(report()), re.DOTALL).group(1)
    assert not re.search(r"url\(|@import|@font-face", style)


@pytest.mark.parametrize("made", [report(), filled("x"), report(answers=[], epochs=[], loss=[])])
def test_names_are_there_once_and_what_points_to_them_finds_them(made):
    tree = Tree(page(made))
    names = tree.values("id")
    assert len(names) == len(set(names))
    pointed = [value[1:] for value in tree.values("href")]
    for key in ("for", "aria-labelledby", "aria-describedby"):
        pointed += [name for value in tree.values(key) for name in value.split()]
    assert set(pointed) <= set(names)
    assert len(pointed) > 10


def test_landmarks_headings_and_language():
    tree = Tree(page(report()))
    tags = [tag for tag, _ in tree.tags]
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert tags.count(tag) == 1, tag
    assert all(after - before <= 1 for before, after in pairwise(tree.headings))
    assert tree.headings[:2] == [1, 2]
    assert dict(tree.tags[0][1]) == {"lang": "en"}
    focusable = [attrs for tag, attrs in tree.tags if tag in ("a", "input", "summary")]
    assert ("href", "#main") in focusable[0]
    (count,) = (dict(attrs) for _, attrs in tree.tags if ("id", "count") in attrs)
    assert count == {"id": "count", "role": "status", "aria-live": "polite"}


NOTHING = {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": {}}, "Nothing was measured."),
        ({"answers": []}, "No answers were generated"),
        ({"epochs": [], "loss": []}, "neither checkpoints nor losses"),
        ({"turned": None}, "Perplexity by epoch"),
        ({"turned": 0}, "memorises from the start"),
        ({"versions": {}, "commands": [], "settings": "", "manifest": {}}, "How it was made"),
        ({"loss": [{"step": 1, "epoch": 0.1, "loss": 2.5}]}, "Training loss by step"),
        ({"loss": [{"step": 1, "epoch": 0.1, "loss": None}]}, "Perplexity by epoch"),
        ({"epochs": report()["epochs"][:1]}, "Perplexity by epoch"),
        ({"parts": {"neutral": report()["parts"]["neutral"]}}, "4 windows, 1,996 tokens"),
        (
            {"parts": {"seen": {"rows": 1, "tokens": 1, "base": {"perplexity": NOTHING},
                                "tuned": {"perplexity": NOTHING},
                                "difference": {"nll": NOTHING | {"p": None}}}}},
            "1 row, 1 token",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out_or_said(changes, said):
    tree = Tree(page(report(**changes)))
    assert said in tree.text
    assert "None" not in tree.text
    assert "nan" not in tree.text.split()


def test_answers_say_how_they_ended_and_what_they_repeat():
    made = page(report())
    tree = Tree(made)
    assert tree.boxes == [
        "Name the colour of the sky.", "Blue.", "The sky is often blue.", "Blue.",
        "Count to three.", "One, two, three.", "One, two, three.", "One, two, three.",
        "Write the date.\n4 May 2019", "2019-05-04", "May May May May", "(empty)",
    ]  # fmt: skip
    for said in (
        "Seen row 3", "Held-out row 312", "ROUGE-L 0.33 → 1.00", "ended by itself",
        "cut off at the limit", "ended at a stop string", "1 token", "5 tokens", "ROUGE-L 0.33",
        "repeats the answer of training row 7: 94% of its runs of five words",
        "Both models gave the same answer.",
        "greedy_search, max_new_tokens=128", "All 3", "Seen 2", "Held out 1",
    ):  # fmt: skip
        assert said in tree.text, said
    assert tree.text.count("repeats") == 1
    assert tree.text.count("is the reference") == 3
    assert tree.text.count("Both models gave the same answer") == 1


def test_four_hundred_answers_and_megabytes_are_quick():
    text = "The quick brown fox <b>jumps</b> over it; " * 60
    answers = [
        {"part": "seen", "index": at, "prompt": text, "reference": text,
         "base": answer(text + str(at)), "tuned": answer(text[::-1])}
        for at in range(400)
    ]  # fmt: skip
    begun = time.perf_counter()
    made = page(report(answers=answers))
    assert time.perf_counter() - begun < 20
    assert made.count("<article") == 400
    assert len(made) > 4_000_000


def test_an_answer_of_white_space_is_not_one_that_is_empty():
    one = ANSWERS[0] | {"reference": "", "base": answer(""), "tuned": answer(" \n ")}
    tree = Tree(page(report(answers=[one])))
    assert tree.boxes[1:] == ["(empty)", "(empty)", " \n "]
    assert tree.text.count("white space only") == 1
    assert "is the reference" not in tree.text


def test_long_texts_scroll_in_a_box_that_the_keyboard_reaches():
    one = ANSWERS[0] | {"prompt": HOSTILE["long"], "reference": "line\n" * 100}
    tree = Tree(page(report(answers=[one])))
    boxes = [dict(attrs) for tag, attrs in tree.tags if "long" in dict(attrs).get("class", "")]
    assert [box["aria-label"] for box in boxes] == ["Prompt 1, scrolls", "Reference 1, scrolls"]
    assert all(box["tabindex"] == "0" and box["role"] == "group" for box in boxes)
    texts = [
        dict(attrs) for _, attrs in tree.tags if "text" in dict(attrs).get("class", "").split()
    ]
    assert all(box["dir"] == "auto" for box in texts)


def test_the_same_report_is_the_same_page_in_any_process():
    code = (
        "import json, sys; from recipe.judging.page import page; "
        "sys.stdout.buffer.write(page(json.load(sys.stdin)).encode())"
    )
    content = report(answers=ANSWERS * 3)
    pages = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(content).encode(),
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert pages == {page(content).encode()}
