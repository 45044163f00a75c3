"""The token loss against arithmetic written out."""

import math
from types import SimpleNamespace

import torch

from recipe.training.loss import TokenLoss, token_nll


def test_nll_is_minus_log_softmax():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])
    labels = torch.tensor([2, 0])
    by_hand = [-(3 - math.log(sum(math.exp(x) for x in (1, 2, 3)))), math.log(3)]
    torch.testing.assert_close(token_nll(logits, labels), torch.tensor(by_hand))


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.arange(64)
    assert token_nll(logits, labels).dtype == torch.float32
    torch.testing.assert_close(token_nll(logits, labels), token_nll(logits.float(), labels))


def test_take_is_the_token_weighted_mean_of_unequal_batches():
    loss, generator = TokenLoss(), torch.Generator().manual_seed(0)
    everything = []
    for tokens in (3, 50, 1):
        logits, labels = torch.randn(1, tokens, 11, generator=generator), torch.arange(tokens) % 11
        everything.append(token_nll(logits[0], labels))
        loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=54)
    total, tokens = loss.take(torch.device("cpu"))
    assert tokens == 54
    assert math.isclose(total / tokens, torch.cat(everything).mean().item(), rel_tol=1e-6)
    assert loss.take(torch.device("cpu")) == (0.0, 0)


def test_last_is_what_the_newest_micro_batches_summed_to():
    loss, generator = TokenLoss(), torch.Generator().manual_seed(0)
    expected = []
    for tokens in (3, 50, 1):
        logits, labels = torch.randn(1, tokens, 11, generator=generator), torch.arange(tokens) % 11
        expected.append(token_nll(logits[0], labels).sum())
        loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=54)
    sums, counts = loss.last(2)
    assert torch.equal(sums, torch.stack(expected[1:]))
    assert counts.tolist() == [50, 1]
