"""The token loss against arithmetic written out."""

import math
from functools import partial
from types import SimpleNamespace

import torch

from recipe.data.batch import IGNORED
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


def test_gradients_of_likely_and_unlikely_tokens_add_up():
    """torch's exp(log_softmax) has one error in all entries of a row: they do not sum to 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 30 + 3 * torch.randn(64, 49152, generator=generator)
    labels = torch.randint(49152, (64,), generator=generator)

    def sums(nll) -> float:
        """The largest sum of a row's gradient, of absolute values that sum to almost 2."""
        one = logits.clone().requires_grad_()
        nll(one, labels).sum().backward()
        return float(one.grad.double().sum(-1).abs().max())

    assert sums(token_nll) < 5e-7
    assert sums(partial(torch.nn.functional.cross_entropy, reduction="none")) > 1e-6


def test_gradients_are_the_closed_form_and_zero_where_ignored():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [9.0, 8.0, 7.0]], requires_grad=True)
    labels = torch.tensor([2, 0, IGNORED])
    kept = logits.detach().clone()
    (token_nll(logits, labels) * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
    expected = kept.softmax(-1) - torch.nn.functional.one_hot(labels.clamp(min=0), 3)
    expected *= torch.tensor([[1.0], [3.0], [0.0]])
    torch.testing.assert_close(logits.grad, expected)
    assert torch.equal(logits, kept)
