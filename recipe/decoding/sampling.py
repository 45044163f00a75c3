"""Greedy search, sampling and DoLa: each row of a batch goes its own way, token by token."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from recipe.decoding.steps import Steps
from recipe.decoding.stopping import FinishReason, Interruption, Stop
from recipe.decoding.stream import Stream
from recipe.settings import RunFailed

Choose = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
Scores = Callable[[torch.Tensor, Any], torch.Tensor]


def argmax(scores: torch.Tensor, _rows: Sequence[int]) -> torch.Tensor:
    """The likeliest token of each row."""
    return scores.argmax(dim=-1)


class Draw:
    """Draws a token for each row from the row's own random numbers, whatever its neighbours do.

    Args:
        keys: one for each row, such as "0:7" for seed 0 and prompt 7.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._generators = [generator_of(key) for key in keys]

    def __call__(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """From the softmax of ``scores``, (rows, vocabulary), by inverting its distribution.

        One float64 number a row decides. It is drawn on the CPU: the same on every device.
        """
        device = scores.device
        drawn = [
            torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows
        ]
        if scores.device.type == "mps":  # it has no float64
            scores = scores.cpu()
        reached = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = reached[:, -1:]
        wanted = torch.cat(drawn)[:, None].to(reached.device) * total
        # A product that is rounded up to the whole would ask for the token behind the last.
        wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(reached, wanted, right=True)[:, 0].to(device)


def nothing_left() -> RunFailed:
    """What to raise when the settings forbid every token."""
    return RunFailed(
        "every token is ruled out by what the settings forbid, so no answer can go on. Forbid less."
    )


def generator_of(key: str) -> torch.Generator:
    """Random numbers that no other key shares."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number)


def decode_rows(
    steps: Steps,
    processors: LogitsProcessorList,
    stop: Stop,
    interruption: Interruption,
    *,
    choose: Choose,
    scores_of: Scores | None = None,
    stream: Stream | None = None,
) -> list[tuple[list[int], FinishReason]]:
    """Extend each row of ``steps`` until it ends; the new tokens of each and why it ended.

    A row that has ended is taken out of the batch, so the others are not slowed by it.

    Args:
        processors: they see all rows of the batch, ended ones too, in their first order.
        scores_of: from logits and the model's output to scores; None takes the logits.
        stream: for a single row.
    """
    written: list[list[int]] = [[] for _ in steps.ids]
    reasons: list[FinishReason] = ["interrupted"] * len(written)
    active = list(range(len(written)))
    texts = steps.ids if processors else None
    while active and not interruption.happened:
        logits, output = steps.read()
        scores = logits if scores_of is None else scores_of(logits, output)
        if texts is not None:
            scores = _processed(processors, texts, scores, active)
        if scores.amax(dim=-1).isneginf().any():
            raise nothing_left()
        tokens = choose(scores, active)
        steps.append(tokens)
        if texts is not None:
            column = torch.zeros_like(texts[:, :1])
            column[active, 0] = tokens
            texts = torch.cat([texts, column], dim=1)
        going_on = []
        for at, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            written[row].append(token)
            if stream is not None:
                stream.add([token])
            reason = stop.reason(written[row])
            if reason is None:
                going_on.append(at)
            else:
                reasons[row] = reason
        if len(going_on) < len(active):
            active = [active[at] for at in going_on]
            if active:
                steps.select(torch.tensor(going_on, device=steps.ids.device))
    if stream is not None:
        stream.end()
    return list(zip(written, reasons, strict=True))


def _processed(
    processors: LogitsProcessorList,
    texts: torch.Tensor,
    scores: torch.Tensor,
    active: Sequence[int],
) -> torch.Tensor:
    """Some processors know the rows by their place in the first batch."""
    if len(active) == len(texts):
        return processors(texts, scores)  # type: ignore[no-any-return]
    whole = scores.new_zeros((len(texts), scores.shape[1]))
    whole[active] = scores
    return processors(texts, whole)[active]  # type: ignore[no-any-return]
