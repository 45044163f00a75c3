"""Measures of answers, by hand."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe.judging.answers import distinct, log_probability, repetition


def test_distinct_counts_over_all_answers():
    answers = [[1, 2, 1], [2, 3]]
    assert distinct(answers, 1) == 3 / 5
    assert distinct(answers, 2) == 3 / 3
    assert distinct([[1, 2], [1, 2]], 2) == 1 / 2


def test_repetition_counts_within_an_answer():
    assert repetition([[1, 2, 1, 2, 1], [1, 2]], 2) == 1 - (2 + 1) / (4 + 1)
    assert repetition([[1, 2, 3, 4, 5]]) == 0
    assert repetition([[7] * 10]) == 1 - 1 / 7


def test_too_short_for_an_n_gram_is_nan():
    assert math.isnan(distinct([[1]], 2))
    assert math.isnan(repetition([[1, 2, 3]]))


def test_log_probability_is_the_sum_of_its_tokens(tiny_checkpoint):
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint).eval()
    prompt, answer = [5, 9, 200], [31, 7, 1]
    expected = 0.0
    for at, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:at]])).logits[0, -1]
        expected += float(logits.log_softmax(-1)[token])
    assert log_probability(model, prompt, answer) == pytest.approx(expected, rel=1e-5)
