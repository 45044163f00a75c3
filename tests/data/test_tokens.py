"""The mask, and each invariant broken once: it trips its own check and no other."""

import numpy as np
import pytest

from recipe.data.templates import AlpacaTemplate, Span, build_template
from recipe.data.tokens import EncodedRow, tokenize_rows
from recipe.settings import UserError
from tests.data.conversations import one_turn, talk

ROW = one_turn(7, "Name a fruit.", "", "Apple")


def tokenize(rows, tokenizer, template=None):
    template = template or build_template("alpaca", tokenizer)
    return tokenize_rows(rows, template, tokenizer, source="rows.json")


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_exactly_the_answer_and_its_eos_are_trained(tokenizer, name):
    template = build_template(name, tokenizer)
    (row,) = tokenize([ROW], tokenizer, template)
    assert tokenizer.decode(row.input_ids[row.trained]) == "Apple</s>"
    assert tokenizer.decode(row.input_ids[~row.trained]) == template.prompt("Name a fruit.")
    assert (
        row.input_ids.tolist()
        == tokenizer(template.prompt("Name a fruit.") + "Apple</s>")["input_ids"]
    )


def test_the_starter_tokenizer_counts_of_alpaca(starter, alpaca):
    """21,244 tokens in rows 0:200, counted by hand from the joined texts."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter)
    records = json.loads(alpaca.read_text())[:200]
    rows = [
        one_turn(i, record["instruction"], record["input"], record["output"])
        for i, record in enumerate(records)
    ]
    result = tokenize(rows, tokenizer)
    assert len(result) == 200
    assert sum(map(len, result)) == 21_244
    assert all(row.input_ids[-1] == tokenizer.eos_token_id for row in result)
    assert all(row.trained[-1] for row in result)


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
    assert problem.where == "rows.json: row 7"


def test_an_eos_written_in_a_row_is_found(tokenizer):
    with pytest.raises(UserError, match="reads as the end"):
        tokenize([one_turn(3, "Say it.", "", "one</s>two")], tokenizer)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_mask_shifted_by_one_trips_its_own_check(tokenizer, monkeypatch, by):
    mask = EncodedRow.mask
    monkeypatch.setattr(EncodedRow, "mask", lambda self: np.roll(mask(self), by))
    with pytest.raises(UserError, match="trained tokens are not those of its response"):
        tokenize([ROW], tokenizer)


def test_all_answers_of_a_conversation_are_trained(tokenizer):
    template = build_template("chat", tokenizer)
    row = talk(0, "Name a fruit.", "Apple", "Another.", "Blue pear", "One more.", "Plum")
    (tokenized,) = tokenize([row], tokenizer, template)
    runs, last = [], False
    for token, trained in zip(tokenized.input_ids, tokenized.trained, strict=True):
        if trained and not last:
            runs.append([])
        if trained:
            runs[-1].append(token)
        last = trained
    assert [tokenizer.decode(run) for run in runs] == ["Apple</s>", "Blue pear</s>", "Plum</s>"]
    # What generation would read before each answer is how the row begins.
    prompt = template.prompt("Name a fruit.")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenized.input_ids[: len(ids)].tolist() == ids


def test_characters_of_several_tokens_do_not_shift_the_mask(tokenizer):
    (row,) = tokenize([one_turn(0, "Größe? 你好 🦙", "", "🦙 größer 你")], tokenizer)
    assert tokenizer.decode(row.input_ids[row.trained]) == "🦙 größer 你</s>"


def test_an_answer_without_its_eos_in_the_middle_of_a_conversation_is_found(tokenizer):
    class Forgetful(AlpacaTemplate):
        def spans(self, row):
            return [Span("a ", False), Span("b", True), Span(" c ", False), Span("d</s>", True)]

    with pytest.raises(UserError, match="is not the last trained token"):
        tokenize([ROW], tokenizer, Forgetful("</s>"))
