"""Perplexity against stock transformers in float64, one row at a time."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from recipe.data.tokens import TokenizedRow
from recipe.judging import perplexity as perplexities
from recipe.judging.perplexity import Likelihood, perplexity, rows_nll, window_nll


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(tiny_checkpoint):
    return LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64).eval()


def row(index: int, ids: list[int], trained: list[int]) -> TokenizedRow:
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[trained] = True
    return TokenizedRow(index, np.array(ids, dtype=np.int32), mask)


ROWS = [
    row(0, [5, 9, 200, 31, 7, 1], [3, 4, 5]),
    row(1, [17, 3, 99, 120, 4], [0, 1, 4]),  # the first token cannot be predicted
    row(2, list(range(10, 90)), list(range(40, 80))),
]


def reference(model: LlamaForCausalLM, one: TokenizedRow) -> tuple[float, int]:
    """torch's loss in float64 with -100 labels; the model's own is float32 whatever its dtype."""
    ids = torch.from_numpy(one.input_ids).long()[None]
    labels = torch.where(torch.from_numpy(one.trained)[None], ids, -100)[0, 1:]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    assert logits.dtype == torch.float64
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(total), int((labels != -100).sum())


def test_perplexity_equals_the_slow_reference(model, exact):
    found = rows_nll(model, ROWS)
    expected = [reference(exact, one) for one in ROWS]
    assert [one.tokens for one in found] == [count for _, count in expected] == [3, 2, 40]
    total, tokens = map(sum, zip(*expected, strict=True))
    assert perplexity(found) == pytest.approx(math.exp(total / tokens), rel=1e-6)
    for one, (nll, _) in zip(found, expected, strict=True):
        assert one.nll == pytest.approx(nll, rel=1e-6)


@pytest.mark.slow
def test_perplexity_of_real_rows_equals_the_slow_reference(starter, alpaca):
    from recipe.run_data import load_data
    from recipe.settings import load_settings

    settings = load_settings("starter.yaml", [f"data.path={alpaca}", "data.rows=0:20"])
    rows = load_data(settings.model_copy()).train.rows
    model = LlamaForCausalLM.from_pretrained(starter, dtype=torch.float32).eval()
    found = perplexity(rows_nll(model, rows))
    exact = LlamaForCausalLM.from_pretrained(starter, dtype=torch.float64).eval()
    total, tokens = map(sum, zip(*(reference(exact, one) for one in rows), strict=True))
    assert found == pytest.approx(math.exp(total / tokens), rel=1e-6)


def test_it_is_no_mean_of_rows():
    found = [Likelihood(math.log(2) * 1, 1), Likelihood(math.log(8) * 3, 3)]
    assert perplexity(found) == pytest.approx(2 ** ((1 + 9) / 4))
    assert perplexity(found) != pytest.approx((2 + 8) / 2)


def test_perplexity_at_its_ends():
    assert math.isnan(perplexity([]))
    assert math.isnan(perplexity([Likelihood(0.0, 0)]))
    assert perplexity([Likelihood(1e6, 1)]) == math.inf
    assert math.isnan(perplexity([Likelihood(math.nan, 1)]))


@pytest.mark.parametrize(
    ("window", "stride"), [(16, 16), (16, 4), (16, 1), (40, 7), (100, 50), (5, 5)]
)
def test_the_sliding_window_equals_its_definition(model, exact, window, stride):
    """Each token is predicted once, in the first window that reaches it, by all of that window
    that lies before it.
    """
    ids = list(range(20, 57))
    total, count = 0.0, 0
    for place in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if place < s + window)
        if start == place:
            continue  # the window has nothing before it
        context = torch.tensor([ids[start:place]])
        with torch.no_grad():
            logits = exact(context).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[place]])
        count += 1
    found = list(window_nll(model, ids, window=window, stride=stride))
    assert sum(one.tokens for one in found) == count
    assert sum(one.nll for one in found) == pytest.approx(total, rel=1e-6)


def test_a_window_without_overlap_cannot_predict_its_first_token(model):
    found = list(window_nll(model, list(range(20, 52)), window=16, stride=16))
    assert [one.tokens for one in found] == [15, 15]


def test_bos_stands_in_front_of_each_window_and_is_not_predicted(model, exact):
    ids, found = list(range(20, 40)), 0.0
    for one in window_nll(model, ids, window=8, stride=4, first=[1]):
        found += one.nll
    total = 0.0
    for place in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), 4) if place < s + 8)
        with torch.no_grad():
            logits = exact(torch.tensor([[1, *ids[start:place]]])).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[place]])
    assert found == pytest.approx(total, rel=1e-6)


def test_a_long_answer_is_predicted_in_pieces(model, monkeypatch):
    whole = rows_nll(model, ROWS)
    monkeypatch.setattr(perplexities, "_AT_ONCE", 7)
    for one, other in zip(rows_nll(model, ROWS), whole, strict=True):
        assert one.tokens == other.tokens
        assert one.nll == pytest.approx(other.nll, rel=1e-6)


@pytest.mark.parametrize("stride", [0, 17, -1])
def test_a_stride_that_leaves_tokens_out_is_refused(model, stride):
    with pytest.raises(ValueError, match="stride between 1 and 16"):
        list(window_nll(model, [1, 2, 3], window=16, stride=stride))


def test_nothing_to_predict(model):
    assert rows_nll(model, [row(0, [5, 6], [0])]) == [Likelihood(0.0, 0)]
    assert list(window_nll(model, [5], window=4, stride=2)) == []
