"""The rows of a run, from ``data:`` and the base's tokenizer to what the Trainer is given."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedTokenizerBase

from recipe.data.cache import cached_rows
from recipe.data.lengths import FittedRows, fit_rows, length_table
from recipe.data.rows import Row, Rows, read_rows
from recipe.data.show import shown_rows
from recipe.data.templates import Template, build_template
from recipe.data.tokens import TokenizedRow
from recipe.model.attention import PER_ROW_SDPA
from recipe.model.checkpoint import load_config, load_tokenizer
from recipe.model.special_ids import check_special_ids
from recipe.settings import Settings, UserError

_SHOWN = 10


@dataclass(frozen=True)
class Data:
    """The rows of a run, and what became of them."""

    rows: Rows
    template: Template
    tokenizer: PreTrainedTokenizerBase
    train: FittedRows
    held_out: FittedRows
    max_length: int
    special_in_text: list[int]
    cache: str

    @property
    def tokens_sha256(self) -> str:
        """Of all ids and masks, in order: what a run that goes on must find again."""
        digest = hashlib.sha256()
        for row in (*self.train.rows, *self.held_out.rows):
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.input_ids.tobytes())
            digest.update(row.trained.tobytes())
        return digest.hexdigest()


def load_data(settings: Settings) -> Data:
    """Read, check and tokenise ``settings.data`` for ``settings.model``.

    Raises:
        UserError: rows, tokenizer and model do not fit together, or a row is too long.
    """
    asked = settings.data
    rows = read_rows(asked)
    tokenizer, config = load_tokenizer(settings.model), load_config(settings.model)
    check_special_ids(settings.model, tokenizer, config)
    template = build_template(rows.template, tokenizer)
    max_length = _max_length(asked.max_length, config)
    every = [*rows.train, *rows.held_out]
    tokenized, cache = cached_rows(every, template, tokenizer, source=asked.path)
    _check_vocabulary(tokenized, config)
    train, held_out = (
        fit_rows(part, max_length=max_length, too_long=asked.too_long, part=name)
        for name, part in (
            ("training", tokenized[: len(rows.train)]),
            ("held-out", tokenized[len(rows.train) :]),
        )
    )
    return Data(
        rows,
        template,
        tokenizer,
        train,
        held_out,
        max_length=max_length,
        special_in_text=_special_in_text(every, template, tokenizer),
        cache=cache,
    )


def share_openings(settings: Settings) -> bool:
    """What ``data.share_openings`` comes to; other attention would let the rows see each other."""
    asked = settings.data.share_openings
    return settings.model.attn_implementation == PER_ROW_SDPA if asked is None else asked


def show_data(settings: Settings, count: int) -> None:
    """Print the first training rows token by token, and what each ``data.max_length`` would cut."""
    data = load_data(settings)
    if os.environ.get("RANK", "0") != "0":  # a launcher started several of us
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in shown_rows(data.train, data.tokenizer, count=count, colour=colour):
        print(line)
    print("\n".join([summary(settings, data), *left_out(data), ""]))
    print("\n".join(length_table(data.train.whole, max_length=data.max_length)))


def summary(settings: Settings, data: Data) -> str:
    """One line: how many rows and tokens of what."""
    held_out = f" · {len(data.held_out.rows)} rows held out" if settings.data.held_out else ""
    return (
        f"data      {len(data.train.rows)} rows of {settings.data.path} · {data.train.tokens:,} "
        f"tokens, {data.train.trained_tokens:,} of them trained · {data.rows.format} rows, "
        f"{data.template.name} template{held_out}"
    )


def left_out(data: Data) -> list[str]:
    """Lines on everything that is not trained as it stands in the source, or looks odd in it."""
    notes = []
    if data.rows.ignored_columns:
        more = ", …" if len(data.rows.ignored_columns) > _SHOWN else ""
        shown = ", ".join(name or repr(name) for name in data.rows.ignored_columns[:_SHOWN])
        notes.append(f"columns not used: {shown}{more}")
    for indices, what in (
        (data.rows.empty, "dropped, answer empty"),
        (data.rows.overlap, "dropped from the held-out rows, trained on"),
        (data.train.dropped + data.held_out.dropped, "dropped, longer than max_length"),
        (data.train.truncated + data.held_out.truncated, "cut at max_length, last EOS not trained"),
        (data.rows.repeated, "trained on more than once, a repetition of an earlier row"),
        (data.rows.asked_before, "held out with the prompt of a training row"),
        (data.special_in_text, "with special tokens of the tokenizer written in their text"),
    ):
        if indices:
            more = ", …" if len(indices) > _SHOWN else ""
            shown = ", ".join(map(str, indices[:_SHOWN])) + more
            notes.append(f"{len(indices)} row{'s'[: len(indices) > 1]} {what}: {shown}")
    if data.cache:
        notes.append(f"tokens {data.cache}")
    return [f"          {note}" for note in notes]


def _max_length(asked: int | None, config: LlamaConfig) -> int:
    context = int(config.max_position_embeddings)
    if asked and asked > context:
        raise UserError.single(
            "data.max_length",
            f"{asked} is beyond this model's context of {context}. Lower it.",
        )
    return asked or context


def _check_vocabulary(rows: Sequence[TokenizedRow], config: LlamaConfig) -> None:
    largest = max((int(row.input_ids.max()) for row in rows), default=0)
    if largest >= config.vocab_size:
        raise UserError.single(
            "model.name_or_path",
            f"its tokenizer makes token {largest}, but the model knows {config.vocab_size}. They "
            "do not belong together: use the tokenizer that came with the model.",
        )


def _special_in_text(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Rows whose text holds what the tokenizer reads as control; raw text may mean it so."""
    if template.name == "raw":
        return []
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {str(token) for token in (*tokenizer.all_special_tokens, *added)}
    return [
        row.index
        for row in rows
        if any(token in text for _, *texts in row.messages for text in texts for token in special)
    ]
