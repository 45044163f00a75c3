"""LoRA as one node against peft's own forward and autograd, in float64 and with the same masks."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from recipe.model.dropout import quicken
from recipe.model.lora import add_lora
from recipe.model.lora_linear import join_adapters

IN, OUT, RANK = 24, 40, 4


def pair(*, bias=False, dtype=torch.float64, **lora) -> tuple[nn.Module, nn.Module]:
    """A layer with an adapter that does something: peft's own, and ours."""
    torch.manual_seed(1)
    given = {"r": RANK, "lora_alpha": 10, "lora_dropout": 0.3, **lora}
    base = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(dtype)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], **given))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
            parameter.data = parameter.data.to(dtype)
    quicken(model)
    ours = copy.deepcopy(model)
    join_adapters(ours)
    layer = ours.base_model.model[0]
    assert isinstance(layer, Linear)
    assert type(layer) is not Linear
    return model, ours


@pytest.fixture
def by_peft(monkeypatch):
    """How often peft's own forward was called."""
    calls = []

    def forward(self, *args, **named):
        calls.append(self)
        return own(self, *args, **named)

    own = Linear.forward
    monkeypatch.setattr(Linear, "forward", forward)
    return calls


def there_and_back(model: nn.Module, x: torch.Tensor, *, first=False) -> list[torch.Tensor]:
    """Output and all gradients; those of ``x`` unless it is what the ``first`` layer gets."""
    x = x.detach().requires_grad_(not first)
    torch.manual_seed(3)
    y = model(x)
    outer = torch.randn(*y.shape[:-1], 2 * OUT, dtype=torch.float64)[..., ::2].to(y.dtype)
    y.backward(outer)  # which lies in memory with holes, as behind a transposition
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), *([] if first else [x.grad]), *trained]


def inputs(*shape: int, dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, IN, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 37), (6,), (2, 3, 5)])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["", "rslora"])
def test_output_and_gradients_are_pefts(by_peft, shape, lora_dropout, bias, more):
    stock, ours = pair(bias=bias, lora_dropout=lora_dropout, **more)
    expected = there_and_back(stock, inputs(*shape))
    assert len(by_peft) == 1
    found = there_and_back(ours, inputs(*shape))
    assert len(by_peft) == 1
    assert len(found) == len(expected) == 4
    for ours_is, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_is, theirs, rtol=1e-12, atol=1e-12)


def test_an_input_that_needs_no_gradient_gets_none(by_peft):
    stock, ours = pair()
    expected = there_and_back(stock, inputs(1, 9), first=True)
    with FlopCounterMode(display=False) as counted:
        found = there_and_back(ours, inputs(1, 9), first=True)
    for ours_is, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_is, theirs, rtol=1e-12, atol=1e-12)
    assert len(by_peft) == 1
    # Forward, and back to B, from there to A's output and to A; not to x.
    assert counted.get_total_flops() == 2 * 9 * (IN * OUT + 2 * RANK * IN + 3 * RANK * OUT)


def test_an_input_with_holes(by_peft):
    stock, ours = pair()
    x = inputs(3, 5).transpose(0, 1)
    found = there_and_back(ours, x)
    assert by_peft == []
    for ours_is, theirs in zip(found, there_and_back(stock, x), strict=True):
        torch.testing.assert_close(ours_is, theirs, rtol=1e-12, atol=1e-12)


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


def a_second_adapter(model):
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=2))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        parameter.data = parameter.data.double()


OTHERWISE = {
    "evaluation": lambda model: model.eval(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "two adapters": a_second_adapter,
    "base trained": lambda model: layer_of(model).base_layer.weight.requires_grad_(),
    "hook on the base": lambda model: layer_of(model).base_layer.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "hook on A": lambda model: (
        layer_of(model)
        .lora_A["default"]
        .register_forward_pre_hook(lambda module, given: (2 * given[0],))
    ),
    "hook on the way back": lambda model: layer_of(model).base_layer.register_full_backward_hook(
        lambda module, grads, outer: None
    ),
    "hook before the way back": lambda model: (
        layer_of(model)
        .lora_B["default"]
        .register_full_backward_pre_hook(lambda module, outer: None)
    ),
    "forward of accelerate": lambda model: setattr(layer_of(model).base_layer, "_hf_hook", 1),
    "forward of its own": lambda model: setattr(
        layer_of(model).base_layer, "forward", lambda x: x.new_ones(*x.shape[:-1], OUT)
    ),
    "hook on B": lambda model: (
        layer_of(model).lora_B["default"].register_forward_hook(lambda module, given, out: 2 * out)
    ),
    "hook on the dropout": lambda model: (
        layer_of(model)
        .lora_dropout["default"]
        .register_forward_hook(lambda module, given, out: 2 * out)
    ),
}


def assert_left_to_peft(stock: nn.Module, ours: nn.Module, by_peft: list[nn.Module]) -> None:
    outputs = []
    for model in (stock, ours):
        torch.manual_seed(3)
        outputs.append(model(inputs(1, 9)))
    assert len(by_peft) == 2
    assert torch.equal(*outputs)


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_is_not_the_plain_case_is_left_to_peft(by_peft, what):
    stock, ours = pair()
    for model in (stock, ours):
        OTHERWISE[what](model)
    assert_left_to_peft(stock, ours, by_peft)


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.7}, {"lora_dropout": 1.0}],
    ids=str,
)
def test_other_kinds_of_adapter_are_left_to_peft(by_peft, lora):
    stock, ours = pair(bias=True, **lora)
    assert_left_to_peft(stock, ours, by_peft)


def test_answers_are_pefts_bit_by_bit_without_dropout_too(by_peft):
    """What is published is compared with what was trained, to the bit."""
    stock, ours = (model.eval() for model in pair(lora_dropout=0.0))
    assert torch.equal(stock(inputs(1, 9)), ours(inputs(1, 9)))
    assert len(by_peft) == 2


def test_elsewhere_than_on_a_cpu_it_is_pefts(by_peft):
    _, ours = pair()
    ours.to("meta")(inputs(1, 9).to("meta"))
    assert len(by_peft) == 1


def test_mixed_dtypes_and_autocast_are_left_to_peft(by_peft):
    stock, ours = pair(dtype=torch.float32)
    for model in (stock, ours):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(inputs(1, 9, dtype=torch.float32)).dtype == torch.bfloat16
    assert len(by_peft) == 2
    for model in (stock, ours):
        layer_of(model).base_layer.to(torch.bfloat16)
        assert model(inputs(1, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert len(by_peft) == 4


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of storages that are kept for the backward pass and are no parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [layer(x) for layer in model]
    assert outputs
    return sum(storage.nbytes() for storage in kept.values())


def test_adapters_on_one_input_keep_it_once_and_what_each_has_dropped():
    base = nn.ModuleList([nn.Linear(IN, OUT, bias=False) for _ in range(2)])
    model = get_peft_model(
        base, LoraConfig(target_modules=["0", "1"], r=RANK, lora_dropout=0.3)
    ).base_model.model
    quicken(model)
    x = torch.randn(1, 32, IN, requires_grad=True)
    dropped_inputs = kept_bytes(model, x)
    join_adapters(model)
    places = 8 * len(model[0].lora_dropout["default"].drawn(x))
    low = 32 * RANK * 4
    assert kept_bytes(model, x) == x.nbytes + 2 * (places + low)
    assert dropped_inputs == 2 * (x.nbytes + 4 + places + low)


def test_it_is_how_a_run_adapts_its_layers(tiny_checkpoint, by_peft):
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    model = add_lora(base, {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}).train()
    model(torch.arange(9)[None]).logits.sum().backward()
    assert by_peft == []
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(math.isfinite(p.grad.norm()) for p in trained)
