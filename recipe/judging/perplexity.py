"""Negative log-likelihood of given text, from which perplexity follows: exp of its mean over all
predicted tokens, never a mean of per-row values.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipe.data.tokens import TokenizedRow
from recipe.training.loss import token_nll

_LARGEST = math.log(sys.float_info.max)
# Logits of so many tokens exist at a time; a longer answer is read once more for the rest.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Likelihood:
    """``nll`` in nats, the sum over ``tokens`` predicted tokens."""

    nll: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether the model computed a number."""
        return math.isfinite(self.nll)


def perplexity(likelihoods: Sequence[Likelihood]) -> float:
    """Of all the text together (Jelinek et al. 1977); nan without any, inf where it overflows."""
    tokens = sum(one.tokens for one in likelihoods)
    if not tokens:
        return math.nan
    mean = math.fsum(one.nll for one in likelihoods) / tokens
    return math.inf if mean > _LARGEST else math.exp(mean)


def rows_nll(
    model: Any, rows: Sequence[TokenizedRow], *, done: Callable[[], object] = lambda: None
) -> list[Likelihood]:
    """Of each row's trained tokens; its first token has nothing before it that could predict it.

    Args:
        model: called with one row at a time, so that nothing is padded.
        done: called after each row.
    """
    found = []
    for row in rows:
        targets = row.trained.nonzero()[0]
        found.append(_nll(model, row.input_ids.tolist(), [int(at) for at in targets if at]))
        done()
    return found


def window_nll(
    model: Any, ids: Sequence[int], *, window: int, stride: int, first: Sequence[int] = ()
) -> Iterator[Likelihood]:
    """Of a text longer than the context: each window of ``window`` tokens begins ``stride`` after
    the one before, and only tokens that no window before has predicted count.

    huggingface.co/docs/transformers/perplexity

    Args:
        first: in front of each window, such as the BOS token that a model expects there.

    Raises:
        ValueError: ``stride`` is not between 1 and ``window``.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"expected a stride between 1 and {window}, found {stride}")
    predicted = 1  # nothing predicts the first token
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        # Behind a window that did not reach here, the first token has nothing before it.
        fresh = range(max(predicted - start, 1), len(part))
        if fresh:
            yield _nll(model, [*first, *part], [len(first) + place for place in fresh])
        predicted = start + len(part)
        if predicted == len(ids):
            return


def _nll(model: Any, ids: Sequence[int], targets: Sequence[int]) -> Likelihood:
    """Of the tokens at ``targets``, each given all before it; their logits alone are computed."""
    whole = torch.tensor([ids], device=model.device)
    total = 0.0
    for start in range(0, len(targets), _AT_ONCE):
        at = torch.tensor(targets[start : start + _AT_ONCE], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=whole, logits_to_keep=at - 1, use_cache=False).logits[0]
            total += float(token_nll(logits, whole[0, at]).double().sum())
    return Likelihood(total, len(targets))
