"""The quick dropout has dropout's distribution, draws from torch's generator, and is used."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from recipe.model.dropout import GapDropout, quicken


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_distribution(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    y = GapDropout(p)(x)
    kept = y != 0
    error = (p * (1 - p) / x.numel()) ** 0.5  # standard deviation of the share
    assert abs(float((~kept).double().mean()) - p) < 4 * error
    assert float(y.double().mean()) == pytest.approx(1, abs=4 * error / (1 - p))
    assert torch.equal(y[kept], torch.full_like(y[kept], float(y.max())))
    assert float(y.max()) == pytest.approx(1 / (1 - p))
    # Independent: neighbours, and rows, are dropped together as often as by chance.
    for shift in (1, 2, 3, 4, 1000):
        both = (~kept.flatten()[shift:] & ~kept.flatten()[:-shift]).double().mean()
        assert abs(float(both) - p * p) < 5 * error


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5])
def test_gaps_are_geometric(p):
    torch.manual_seed(5)
    n = 2_000_000
    places = GapDropout(p).drawn(torch.ones(n))
    assert places[-1] == n
    gaps = places[places < n].diff() - 1
    assert int(gaps.min()) >= 0
    upto = torch.arange(int(gaps.max()) + 1)
    found = torch.bincount(gaps).cumsum(0) / len(gaps)
    expected = 1 - (1 - p) ** (upto.double() + 1)
    assert float((found - expected).abs().max()) < 1.95 / len(gaps) ** 0.5  # Kolmogorov, 0.1 %


def test_of_three_elements_all_are_alike():
    """Where gaps begin and end: each of the eight patterns as often as three coins give it."""
    torch.manual_seed(6)
    dropout, p, times = GapDropout(0.3), 0.3, 20_000
    found = torch.zeros(8)
    for _ in range(times):
        found[int((dropout(torch.ones(3)) == 0).long() @ torch.tensor([4, 2, 1]))] += 1
    for pattern, often in enumerate(found):
        dropped = pattern.bit_count()
        expected = p**dropped * (1 - p) ** (3 - dropped)
        assert abs(float(often) / times - expected) < 4 * (expected / times) ** 0.5


def test_so_rare_or_so_many_are_left_to_torch():
    x = torch.ones(10)
    assert [GapDropout(p).draws(x) for p in (0, 1e-6, 2**-16, 0.5, 0.51, 1)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip


def test_the_gradient_has_the_same_factors():
    x = torch.randn(7, 33, requires_grad=True)
    y = GapDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad * x.detach(), y.detach())


def test_only_the_places_are_kept_for_the_backward_pass():
    kept = []
    x = torch.randn(700, 330, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        GapDropout(0.05)(x)
    (places,) = kept
    assert places.untyped_storage().nbytes() < 1.12 * 8 * 0.05 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (0, 4)])
def test_any_shape_and_dtype(shape, dtype):
    y = GapDropout(0.5)(torch.ones(shape, dtype=dtype))
    assert y.shape == shape
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7])
def test_nothing_and_everything_are_left_to_torch(p):
    y = GapDropout(p)(torch.ones(50))
    assert torch.equal(y, torch.zeros(50) if p == 1 else torch.full((50,), float(y[0])))


def test_seeds_and_evaluation():
    dropout, x = GapDropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout.eval()(x), x)


def test_every_lora_dropout_of_a_model_is_exchanged(tiny_checkpoint):
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.1)
    model = get_peft_model(base, lora)
    names = list(model.state_dict())
    quicken(model)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Dropout)]
    assert kinds == [GapDropout] * 14
    assert all(m.p == 0.1 for m in model.modules() if isinstance(m, GapDropout))
    assert list(model.state_dict()) == names
