"""What --show-data prints is what the batch trains."""

import re

import pytest

from recipe.data import show
from recipe.data.batch import flatten
from recipe.data.lengths import fit_rows
from recipe.data.show import shown_rows, token_fates
from recipe.data.templates import build_template
from recipe.data.tokens import tokenize_rows
from tests.data.conversations import one_turn, talk


def fitted(tokenizer, rows, *, template="chat", max_length=200):
    whole = tokenize_rows(rows, build_template(template, tokenizer), tokenizer, source="rows")
    return fit_rows(whole, max_length=max_length, too_long="truncate", part="training")


def test_every_token_has_the_fate_that_the_row_says(tokenizer):
    rows = fitted(tokenizer, [talk(0, "Name a fruit.", "Apple", "Another.", "Pear")])
    (row,) = rows.rows
    eos = tokenizer.eos_token_id
    assert token_fates(row, row, eos=eos) == [
        "masked" if not trained else "EOS" if token == eos else "trained"
        for token, trained in zip(row.input_ids.tolist(), row.trained, strict=True)
    ]


def test_cut_and_dropped_tokens_are_shown(tokenizer):
    rows = [
        one_turn(0, "Count.", "", "one two three four"),
        one_turn(1, "word " * 40, "", "Apple"),
    ]
    cut = fitted(tokenizer, rows, max_length=30)
    assert cut.truncated == [0]
    assert cut.dropped == [1]
    lines = shown_rows(cut, tokenizer, count=5, colour=False)
    first, second = (line for line in lines if line.startswith("row "))
    assert re.search(r"[1-9]\d* trained, 0 EOS, [1-9]\d* cut$", first)
    assert re.search(r": 0 masked, 0 trained, 0 EOS, \d+ cut$", second)


def test_all_ids_are_printed_in_order(tokenizer):
    rows = fitted(tokenizer, [talk(3, "Name a fruit.", "Apple", "Another.", "Blue pear")])
    lines = shown_rows(rows, tokenizer, count=1, colour=False)
    numbers = [line.split() for line in lines if re.fullmatch(r" {11}(ids )?[\d ]+", line)]
    printed = [int(word) for words in numbers for word in words if word != "ids"]
    assert printed == rows.rows[0].input_ids.tolist()
    fates = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    assert fates == ["masked", "trained", "EOS"] * 2


def test_colours_only_where_they_are_asked_for(tokenizer):
    rows = fitted(tokenizer, [talk(0, "Name a fruit.", "Apple")])
    plain, coloured = (
        "\n".join(shown_rows(rows, tokenizer, count=1, colour=colour)) for colour in (False, True)
    )
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    for code in ("2", "32", "1;35"):
        assert f"\x1b[{code}m" in coloured


def test_a_row_cannot_steer_the_terminal(tokenizer):
    rows = fitted(tokenizer, [talk(0, "Red \x1b[31m now\x07", "Apple")])
    text = "\n".join(shown_rows(rows, tokenizer, count=1, colour=False))
    assert "\\x1b[31m now\\x07" in text


def test_a_batch_that_predicts_other_tokens_is_found(tokenizer, monkeypatch):
    """The fates come from the batch itself, so a shift in it cannot hide."""

    def shifted(rows):
        batch = flatten(rows)
        batch["logits_to_keep"] = batch["logits_to_keep"] + 1
        return batch

    rows = fitted(tokenizer, [talk(0, "Name a fruit.", "Apple pear")])
    monkeypatch.setattr(show, "flatten", shifted)
    with pytest.raises((AssertionError, IndexError)):
        shown_rows(rows, tokenizer, count=1, colour=False)
