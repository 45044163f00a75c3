"""The feed-forward part gives stock code's bits, there and back, and keeps a third less."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from recipe.model.lora import add_lora
from recipe.model.swiglu import keep_two_factors

TOKENS, HIDDEN, WIDE = 37, 24, 56


def feed_forward(dtype=torch.float32, **fields) -> LlamaMLP:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_attention_heads=4, **fields
    )
    return LlamaMLP(config).to(dtype)


def exchanged(stock: LlamaMLP) -> nn.Module:
    ours = nn.Sequential(copy.deepcopy(stock))
    keep_two_factors(ours)
    assert type(ours[0]) is not LlamaMLP
    return ours[0]


def there_and_back(module: nn.Module, dtype=torch.float32) -> list[torch.Tensor]:
    """Output and gradients, those of the weights that have one."""
    torch.manual_seed(2)
    x = (3 * torch.randn(1, TOKENS, HIDDEN)).to(dtype).requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape).to(dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def kept_bytes(module: nn.Module) -> int:
    """Of what autograd keeps, weights not."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    module.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad  # what is kept lives as long as y does
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mlp_bias", "hidden_act"), [(False, "silu"), (True, "swish")])
def test_bits_are_those_of_stock_code(dtype, mlp_bias, hidden_act):
    stock = feed_forward(dtype, mlp_bias=mlp_bias, hidden_act=hidden_act)
    found, expected = (there_and_back(m, dtype) for m in (exchanged(stock), stock))
    assert len(found) == len(expected) == (8 if mlp_bias else 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_by_finite_differences():
    ours = exchanged(feed_forward(torch.float64))
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, x)


def is_one_node(module: nn.Module, x: torch.Tensor) -> bool:
    return "_Frozen" in type(module(x).grad_fn.next_functions[0][0]).__name__


def test_elsewhere_than_on_a_cpu_it_is_not_one_node():
    ours = exchanged(feed_forward().requires_grad_(False))
    x = torch.randn(1, 3, HIDDEN, requires_grad=True)
    assert [is_one_node(ours.to(place), x.to(place)) for place in ("cpu", "meta")] == [True, False]


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_frozen_one_is_equal_to_rounding(mlp_bias):
    stock = feed_forward(torch.float64, mlp_bias=mlp_bias).requires_grad_(False)
    ours = exchanged(stock)
    x = torch.randn(1, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert is_one_node(ours, x)
    found, expected = (there_and_back(m, torch.float64) for m in (ours, stock))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_two_wide_tensors_are_kept_not_three():
    stock = feed_forward()
    wide = TOKENS * WIDE * 4
    assert kept_bytes(exchanged(stock)) == 2 * wide
    assert kept_bytes(stock) == 3 * wide


@pytest.mark.parametrize("alone", ["gate_proj", "up_proj"])
def test_never_more_is_kept_than_by_stock_code(alone):
    """Here one factor needs a gradient, the other none."""
    stock = feed_forward()
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}[alone]
    getattr(stock, other).register_forward_hook(lambda module, inputs, output: output.detach())
    assert kept_bytes(exchanged(stock)) == kept_bytes(stock)
    found, expected = (there_and_back(m.requires_grad_()) for m in (exchanged(stock), stock))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast(frozen):
    stock = feed_forward().requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (there_and_back(m) for m in (exchanged(stock), stock))
    assert found[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_factors_of_two_dtypes_are_left_to_autograd():
    stock = feed_forward()
    stock.up_proj.register_forward_hook(lambda module, inputs, output: output.double())
    stock.down_proj.double()
    found, expected = (there_and_back(m, torch.float32) for m in (exchanged(stock), stock))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_activation_is_left_alone():
    model = nn.Sequential(feed_forward(hidden_act="gelu"))
    keep_two_factors(model)
    assert type(model[0]) is LlamaMLP


def test_an_adapter_of_the_recipe_has_every_layer_exchanged_and_nothing_renamed(tiny_checkpoint):
    fields = {"target_modules": "all-linear"}
    stock, ours = (LlamaForCausalLM.from_pretrained(tiny_checkpoint) for _ in range(2))
    names = list(get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", **fields)).state_dict())
    model = add_lora(ours, fields)
    parts = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    assert len(parts) == ours.config.num_hidden_layers
    assert all(type(part) is not LlamaMLP for part in parts)
    assert list(model.state_dict()) == names
