"""The frozen norm gives stock code's bits, and its gradient in fewer passes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from recipe.model.lora import add_lora
from recipe.model.rms_norm import shorten_norms

TOKENS, HIDDEN = 37, 96


def norm(dtype=torch.float32, *, frozen=True, eps=1e-5) -> LlamaRMSNorm:
    torch.manual_seed(1)
    module = LlamaRMSNorm(HIDDEN, eps=eps).to(dtype)
    nn.init.normal_(module.weight)
    return module.requires_grad_(not frozen)


def exchanged(stock: LlamaRMSNorm) -> nn.Module:
    ours = nn.Sequential(copy.deepcopy(stock))
    shorten_norms(ours)
    assert type(ours[0]) is not LlamaRMSNorm
    return ours[0]


def there_and_back(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, that of the weight where it has one."""
    x = x.detach().requires_grad_()
    y = module(x)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def hidden_states(dtype=torch.float32, scale=3.0) -> torch.Tensor:
    torch.manual_seed(2)
    return (scale * torch.randn(1, TOKENS, HIDDEN)).to(dtype)


def closed_form(module: LlamaRMSNorm, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradient in float64, by the Jacobian of each token."""
    torch.manual_seed(3)
    outer, weight = torch.randn(x.shape).double(), module.weight.detach().double()
    x = x.double()
    length = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    direction = x / length
    jacobian = torch.eye(HIDDEN) - direction[..., None] * direction[..., None, :] / HIDDEN
    gradient = torch.einsum("btij,btj->bti", jacobian, weight * outer) / length
    return [weight * direction, gradient]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_bits_there_and_the_closed_form_back(scale, eps):
    stock, x = norm(eps=eps), hidden_states(scale=scale)
    found, expected = there_and_back(exchanged(stock), x), there_and_back(stock, x)
    assert torch.equal(found[0], expected[0])
    exact = closed_form(stock, x)[1]
    error, of_stock = (
        float((g.double() - exact).norm() / exact.norm()) for g in (found[1], expected[1])
    )
    assert error < 2e-7
    assert error < 1.5 * of_stock


@pytest.mark.parametrize("shape", [(HIDDEN,), (5, HIDDEN), (2, 3, 4, HIDDEN), (1, 0, HIDDEN)])
def test_any_shape(shape):
    stock, x = norm(), torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found, expected = there_and_back(exchanged(stock), x), there_and_back(stock, x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_computed_in_float32_too(dtype):
    stock, x = norm(dtype), hidden_states(dtype)
    found, expected = there_and_back(exchanged(stock), x), there_and_back(stock, x)
    assert [one.dtype for one in found] == [dtype] * 2
    assert torch.equal(found[0], expected[0])
    least = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found[1], expected[1], rtol=2 * least, atol=4 * least)


@pytest.mark.parametrize(
    ("of_weight", "of_states", "frozen"),
    [(torch.float32, torch.float32, False), (torch.float32, torch.bfloat16, True)],
)
def test_all_else_has_the_bits_of_stock_code(of_weight, of_states, frozen):
    stock, x = norm(of_weight, frozen=frozen), hidden_states(of_states)
    found, expected = there_and_back(exchanged(stock), x), there_and_back(stock, x)
    assert len(found) == len(expected) == (2 if frozen else 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_under_autocast():
    stock, x = norm(), hidden_states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = there_and_back(exchanged(stock), x), there_and_back(stock, x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def kept_bytes(module: nn.Module) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(hidden_states().requires_grad_())
    assert y.requires_grad  # what is kept lives as long as y does
    return sum(kept.values())


class Passes(TorchDispatchMode):
    """Counts operations that go through tensors as large as the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.count += not func.is_view and any(t.numel() == TOKENS * HIDDEN for t in tensors)
        return result


def passes(module: nn.Module) -> tuple[int, int]:
    """There, and back."""
    x = hidden_states().requires_grad_()
    with Passes() as there:
        y = module(x)
    outer = torch.randn(y.shape)
    with Passes() as back:
        torch.autograd.grad(y, x, outer)
    return there.count, back.count


def test_no_more_is_kept_and_less_is_computed_on_the_way_back():
    stock = norm()
    assert kept_bytes(exchanged(stock)) <= kept_bytes(stock)
    found, expected = passes(exchanged(stock)), passes(stock)
    assert found[0] <= expected[0]
    assert found[1] <= 5 < expected[1]


def test_an_adapter_of_the_recipe_has_every_norm_exchanged_and_nothing_renamed(tiny_checkpoint):
    fields = {"target_modules": ["q_proj"]}
    stock, ours = (LlamaForCausalLM.from_pretrained(tiny_checkpoint) for _ in range(2))
    names = list(get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", **fields)).state_dict())
    model = add_lora(ours, fields)
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    assert len(norms) == 2 * ours.config.num_hidden_layers + 1
    assert all(type(one) is not LlamaRMSNorm for one in norms)
    assert list(model.state_dict()) == names
