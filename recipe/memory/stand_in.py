"""A run's model without its weights: tensors that have a shape and a dtype, and no memory.

Built by the code that builds the real one, then given torch's fake tensors. These choose the
operations that real ones would on a CPU; what a GPU does otherwise is exchanged here.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from recipe.model import attention
from recipe.model.feed_forward import checkpoint_feed_forward
from recipe.model.lora import add_lora
from recipe.model.lora_linear import JoinedLinear
from recipe.model.swiglu import SwiGLU
from recipe.settings import Settings, plain

_4BIT_BLOCK = 64  # weights that share a scale
_SCALE_BLOCK = 256  # scales that share one, with double quantization
_CPU = torch.device("cpu")


def stand_in(
    config: LlamaConfig, settings: Settings, *, mode: FakeTensorMode, device: str, layers: int
) -> PeftModel:
    """The model that ``settings`` train, in training mode, cut to ``layers`` layers.

    Args:
        mode: what its tensors belong to.
        device: ``cpu`` or ``cuda``, which decides on kernels; all tensors say that they are on the
            CPU, because torch without CUDA can index no others.

    Raises:
        UserError: LoraConfig's fields do not fit the model.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    config.use_cache = False
    attention.register()
    config._attn_implementation = settings.model.attn_implementation
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        for parameter in base.parameters():  # rotary frequencies stay in float32
            parameter.data = parameter.data.to(base_dtype(config, settings))
        if settings.model.quantization:
            _quantize(base, plain(settings.model.quantization))
        mixed = bool(settings.training.get("fp16") or settings.training.get("bf16"))
        # A start that is computed from the weights has none to compute from, and no other size.
        lora = {**settings.lora, "init_lora_weights": True}
        model = add_lora(base, lora, mixed_precision=mixed)
    if device == "cuda":
        _adapt_as_on_cuda(model)
    _make_fake(model, mode)
    if checkpoints_activations(settings):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.study.checkpoint == "feed_forward":
        checkpoint_feed_forward(model)
    model.get_base_model().disable_input_require_grads()
    model.train()
    return model


def base_dtype(config: LlamaConfig, settings: Settings) -> torch.dtype:
    """What ``model.dtype`` comes to; ``auto`` is the checkpoint's own."""
    name = settings.model.dtype
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return config.dtype or torch.float32


def checkpoints_activations(settings: Settings) -> bool:
    """Whether layers are computed again in the backward pass."""
    asked = settings.training
    return bool(asked.get("gradient_checkpointing") or asked.get("activation_checkpointing"))


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    convert = mode.fake_tensor_converter.from_meta_and_device
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay one
                    fake = convert(mode, parameter.detach(), _CPU)
                    made[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = convert(mode, buffer.detach(), _CPU)


class _FusedDropout(nn.Dropout):
    """As on CUDA; what is there on a CPU takes memory for the bits that it draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        dropped: torch.Tensor = torch.native_dropout(x, self.p, True)[0]
        return dropped


def _adapt_as_on_cuda(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is JoinedLinear:
            module.__class__ = Linear
        if isinstance(module, LlamaAttention):
            module.__class__ = LlamaAttention
        if isinstance(module, SwiGLU):
            module.one_node = False
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[name] = _FusedDropout(dropout.p)


def _quantize(base: LlamaForCausalLM, asked: dict[str, Any]) -> None:
    """As transformers does: all linear layers but the head, or those that are to be skipped."""
    skipped = asked.get("llm_int8_skip_modules") or ["lm_head"]
    make = _Int8 if asked.get("load_in_8bit") else _FourBit
    for name, layer in list(_linear_layers(base)):
        if not any(part in name for part in skipped):
            base.set_submodule(name, make(layer, asked))


def _linear_layers(base: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


class _FourBit(nn.Linear):
    """bitsandbytes' Linear4bit: weights are made whole for each product, forward and backward."""

    def __init__(self, layer: nn.Linear, asked: dict[str, Any]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        weights = layer.weight.numel()
        packed = torch.empty((weights + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.compute_dtype = _compute_dtype(asked)
        blocks = -(-weights // _4BIT_BLOCK)
        if asked.get("bnb_4bit_use_double_quant"):
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
            self.register_buffer("absmax_scales", torch.empty(-(-blocks // _SCALE_BLOCK)))
        else:
            self.register_buffer("absmax", torch.empty(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        out: torch.Tensor = _Dequantised.apply(x.to(self.compute_dtype), self.weight, shape)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return outer @ torch.empty(ctx.shape, dtype=outer.dtype), None, None


class _Int8(nn.Linear):
    """bitsandbytes' Linear8bitLt, which keeps its input in 16 bit until the backward pass."""

    def __init__(self, layer: nn.Linear, asked: dict[str, Any]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(
            torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False
        )
        self.register_buffer("SCB", torch.empty(layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Int8Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        quantised = flat.to(torch.float16).to(torch.int8)
        product = torch._int_mm(quantised, weight.t())
        ctx.tensors = (flat, weight)  # not by save_for_backward: no hook sees it
        del quantised
        return product.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, weight = ctx.tensors
        return outer @ weight.to(outer.dtype), None


def _compute_dtype(asked: dict[str, Any]) -> torch.dtype:
    named = asked.get("bnb_4bit_compute_dtype") or "float32"
    return getattr(torch, str(named).removeprefix("torch."))  # type: ignore[no-any-return]
