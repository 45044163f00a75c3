"""The claims on tokens: which are trained, and that generation begins as training did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from recipe.answerer import Answerer
from recipe.data.prompts import Prompt
from recipe.data.rows import Row
from recipe.data.templates import Template
from recipe.data.tokens import TokenizedRow
from recipe.proving.evidence import Evidence
from recipe.proving.finding import Finding, compared, not_applicable
from recipe.run_data import Data

MASK = "mask, row by row, EOS included"
PROMPT = "generate's prompt ids = training's"
_PROMPTS = 100


@dataclass(frozen=True)
class Expected:
    """A row as the stock tokenizer writes it: its ids, which of them an answer is made of, and
    where each answer begins.
    """

    ids: list[int]
    trained: NDArray[np.bool_]
    begins: list[int]


def mask(evidence: Evidence) -> Finding:
    """Every row of the config against prompt, and prompt with answer, tokenised apart."""
    data = evidence.plan.data
    evidence.doing("the mask of every row")
    tokenizer = _stock_tokenizer(evidence)
    rows = _rows(data)
    wrong = [
        row.index
        for row in data.train.rows
        if not _is_as_expected(
            row,
            _expected(rows[row.index], data.template, tokenizer),
            cut=row.index in data.train.truncated,
        )
    ]
    tokens = sum(int(row.trained.sum()) for row in data.train.rows)
    said = f"{len(data.train.rows):,} rows, {tokens:,} trained tokens"
    named = f"; first row {wrong[0]}" if wrong else ""
    return compared(MASK, len(wrong), tolerance=0, note=said + named)


def prompt_ids(evidence: Evidence) -> Finding:
    """What generate.py gives a model to read, against how the training rows begin."""
    data = evidence.plan.data
    tokenizer = _stock_tokenizer(evidence)
    answerer = Answerer(None, data.tokenizer, data.template, "", "base")
    rows = _rows(data)
    wrong, compared_prompts = [], 0
    for row in data.train.rows[:_PROMPTS]:
        source = rows[row.index]
        begins = _expected(source, data.template, tokenizer).begins
        for (prompt, before), begin in zip(_asked(source), begins, strict=True):
            if begin >= len(row):  # cut off by max_length
                continue
            (encoded,) = answerer.encode([prompt], before=before)
            compared_prompts += 1
            if list(encoded.ids) != row.input_ids[:begin].tolist():
                wrong.append(row.index)
    if not compared_prompts:
        return not_applicable(PROMPT, "data.max_length cuts every prompt off")
    said = f"{compared_prompts} prompts, up to the first trained token"
    named = f"; first row {wrong[0]}" if wrong else ""
    return compared(PROMPT, len(wrong), tolerance=0, note=said + named)


def _stock_tokenizer(evidence: Evidence) -> Any:
    model = evidence.plan.settings.model
    return AutoTokenizer.from_pretrained(
        model.name_or_path, revision=model.revision, trust_remote_code=False
    )


def _rows(data: Data) -> dict[int, Row]:
    return {row.index: row for row in data.rows.train}


def _asked(row: Row) -> Iterator[tuple[Prompt, Sequence[Any]]]:
    """For each answer of a row: the prompt that generate.py would get, and the turns before."""
    for number, message in enumerate(row.messages):
        if message.role == "assistant":
            question = row.messages[number - 1]
            prompt = Prompt(row.index, question.content, question.context)
            yield prompt, row.messages[: number - 1]


def _is_as_expected(row: TokenizedRow, expected: Expected, *, cut: bool) -> bool:
    length = len(row) if cut else len(expected.ids)
    return row.input_ids.tolist() == expected.ids[:length] and bool(
        (row.trained == expected.trained[:length]).all()
    )


def _expected(row: Row, template: Template, tokenizer: Any) -> Expected:
    """Trained is what follows a prompt, up to and with the first EOS behind it."""
    if template.name == "chat":
        prompts, whole = _chat(row, template, tokenizer)
    else:
        question, answer = row.messages
        text = template.prompt(question.content, question.context)
        prompts = [tokenizer(text)["input_ids"]]
        whole = tokenizer(text + answer.content + tokenizer.eos_token)["input_ids"]
    trained = np.zeros(len(whole), dtype=np.bool_)
    last = 0
    for prompt in prompts:
        last = whole.index(tokenizer.eos_token_id, len(prompt))
        trained[len(prompt) : last + 1] = True
    # Templates may write on behind the last EOS; nobody trains that, so no row holds it.
    return Expected(whole[: last + 1], trained[: last + 1], [len(prompt) for prompt in prompts])


def _chat(row: Row, template: Template, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    turns = [
        {
            "role": message.role,
            "content": "\n\n".join(filter(None, (message.content, message.context))),
        }
        for message in row.messages
    ]
    render = partial(
        tokenizer.apply_chat_template, chat_template=template.source, return_dict=False
    )
    prompts = [
        render(turns[:number], add_generation_prompt=True)
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    return prompts, render(turns)
