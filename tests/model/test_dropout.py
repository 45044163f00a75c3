"""The quick dropout has dropout's distribution, draws from torch's generator, and is used."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from recipe.model.dropout import SixteenBitDropout, quicken


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_distribution(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    y = SixteenBitDropout(p)(x)
    kept = y != 0
    error = (p * (1 - p) / x.numel()) ** 0.5  # standard deviation of the share
    assert abs(float((~kept).double().mean()) - p) < 4 * error + 2**-17
    assert float(y.double().mean()) == pytest.approx(1, abs=4 * error / (1 - p))
    assert torch.equal(y[kept], torch.full_like(y[kept], float(y.max())))
    assert float(y.max()) == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))
    # Independent: neighbours in a word, and rows, are dropped together as often as by chance.
    for shift in (1, 2, 3, 4, 1000):
        both = (~kept.flatten()[shift:] & ~kept.flatten()[:-shift]).double().mean()
        assert abs(float(both) - p * p) < 5 * error


@pytest.mark.parametrize("dropped", [1, 2, 3277, 32768, 65534, 65535])
def test_what_is_kept_is_what_sixteen_bits_decide(dropped):
    torch.manual_seed(5)
    words = torch.empty(2**15, dtype=torch.int64).random_(-(2**63), None)
    expected = words.view(torch.int16).int() + 2**15 >= dropped
    torch.manual_seed(5)
    assert torch.equal(SixteenBitDropout(dropped / 2**16)(torch.ones(2**17)) != 0, expected)


def test_the_gradient_has_the_same_factors():
    x = torch.randn(7, 33, requires_grad=True)
    y = SixteenBitDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad * x.detach(), y.detach())


def test_one_byte_an_element_is_kept_for_the_backward_pass():
    kept = []
    x = torch.randn(7, 33, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        SixteenBitDropout(0.3)(x)
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [x.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (0, 4)])
def test_any_shape_and_dtype(shape, dtype):
    y = SixteenBitDropout(0.5)(torch.ones(shape, dtype=dtype))
    assert y.shape == shape
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7])
def test_nothing_and_everything_are_left_to_torch(p):
    y = SixteenBitDropout(p)(torch.ones(50))
    assert torch.equal(y, torch.zeros(50) if p == 1 else torch.full((50,), float(y[0])))


def test_seeds_and_evaluation():
    dropout, x = SixteenBitDropout(0.5), torch.ones(100)
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
    assert kinds == [SixteenBitDropout] * 14
    assert all(m.p == 0.1 for m in model.modules() if isinstance(m, SixteenBitDropout))
    assert list(model.state_dict()) == names
