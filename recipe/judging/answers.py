"""What a set of answers is like: how varied, how repetitive, how likely."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from recipe.training.loss import token_nll


def distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all answers together, as a share of all n-grams; nan without any.

    Li et al. 2016, arXiv 1510.03055.
    """
    grams = [gram for ids in answers for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(answers: Sequence[Sequence[int]], n: int = 4) -> float:
    """The share of n-grams that stood in the same answer before; nan without any.

    rep-n of Su et al. 2022, arXiv 2202.06417, over all answers.
    """
    every = [_grams(ids, n) for ids in answers]
    total = sum(map(len, every))
    return 1 - sum(len(set(grams)) for grams in every) / total if total else math.nan


def log_probability(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Sum of the log-probabilities, in nats, that the plain model gives the answer's tokens."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[
            0, :-1
        ]
    return -float(token_nll(logits, ids[0, len(prompt) :]).cpu().double().sum())


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
