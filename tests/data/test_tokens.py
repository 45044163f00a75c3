"""The mask, and each invariant broken once: it trips its own check and no other."""

import numpy as np
import pytest

from recipe.data.rows import Row
from recipe.data.templates import AlpacaTemplate, Span, build_template
from recipe.data.tokens import tokenize_rows
from recipe.settings import UserError

ROW = Row(7, "Name a fruit.", "", "Apple")


def tokenize(rows, tokenizer, template=None, *, max_length=200, too_long="error"):
    template = template or build_template("alpaca", tokenizer)
    return tokenize_rows(rows, template, tokenizer, max_length=max_length, too_long=too_long)


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_exactly_the_answer_and_its_eos_are_trained(tokenizer, name):
    template = build_template(name, tokenizer)
    (row,) = tokenize([ROW], tokenizer, template).rows
    assert tokenizer.decode(row.input_ids[row.trained]) == "Apple</s>"
    assert tokenizer.decode(row.input_ids[~row.trained]) == template.prompt("Name a fruit.")
    assert (
        row.input_ids.tolist()
        == tokenizer(template.prompt(ROW.instruction) + "Apple</s>")["input_ids"]
    )


def test_the_starter_tokenizer_counts_of_alpaca(starter, alpaca):
    """21,244 tokens in rows 0:200, counted by hand from the joined texts."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter)
    records = json.loads(alpaca.read_text())[:200]
    rows = [Row(i, **record) for i, record in enumerate(records)]
    result = tokenize(rows, tokenizer, max_length=512)
    assert len(result.rows) == 200
    assert result.tokens == 21_244
    assert all(row.input_ids[-1] == tokenizer.eos_token_id for row in result.rows)
    assert all(row.trained[-1] for row in result.rows)


class Mutated(AlpacaTemplate):
    """The Alpaca template with one thing broken."""

    def spans(self, row):
        prompt, response = super().spans(row)
        return self.broken(prompt.text, response.text)


def mutant(broken):
    return type("Mutant", (Mutated,), {"broken": staticmethod(broken)})(eos_token="</s>")


MUTANTS = {
    "no EOS": (lambda p, r: [Span(p, False), Span(r[:-4], True)], "not the last trained token"),
    "EOS untrained": (
        lambda p, r: [Span(p, False), Span(r[:-4], True), Span("</s>", False)],
        "not the last trained token",
    ),
    "doubled BOS": (lambda p, r: [Span("<s><s>" + p, False), Span(r, True)], "BOS token twice"),
    "nothing trained": (lambda p, r: [Span(p, False), Span(r, False)], "trains no token"),
    "border merges": (
        lambda p, r: [Span(p[:-1] + " instruc", False), Span("tion" + r, True)],
        "merges across the border",
    ),
    "EOS inside": (
        lambda p, r: [Span(p, False), Span("Ap</s>ple" + r, True)],
        "reads as the end",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_broken_invariant_trips_its_own_check(tokenizer, name):
    broken, message = MUTANTS[name]
    with pytest.raises(UserError, match=message) as raised:
        tokenize([ROW], tokenizer, mutant(broken))
    (problem,) = raised.value.problems
    assert problem.where == "row 7"


def test_an_eos_written_in_a_row_is_found(tokenizer):
    with pytest.raises(UserError, match="reads as the end"):
        tokenize([Row(3, "Say it.", "", "one</s>two")], tokenizer)


def test_too_long_is_never_silent(tokenizer):
    long = Row(1, "Count.", "", "one two three four five six seven eight nine ten")
    (short,) = tokenize([ROW], tokenizer).rows
    limit = len(short)
    with pytest.raises(UserError, match=f"data.max_length is {limit}") as raised:
        tokenize([ROW, long], tokenizer, max_length=limit)
    assert len(raised.value.problems) == 1

    dropped = tokenize([ROW, long], tokenizer, max_length=limit, too_long="drop")
    assert [row.index for row in dropped.rows] == [7]
    assert dropped.dropped == [1]

    cut = tokenize([ROW, long], tokenizer, max_length=limit, too_long="truncate")
    assert cut.truncated == [1]
    assert len(cut.rows[1]) == limit
    assert cut.rows[1].trained.any()


def test_a_row_cut_to_its_prompt_is_dropped(tokenizer):
    result = tokenize(
        [ROW, Row(1, "word " * 80, "", "Apple")], tokenizer, max_length=120, too_long="truncate"
    )
    assert result.dropped == [1]
    assert np.concatenate([row.trained for row in result.rows]).any()


def test_no_row_left_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no row fits"):
        tokenize([ROW], tokenizer, max_length=10, too_long="drop")
