"""Adapters whose spectrum is known, for what looks into them."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
BASES = {
    "float32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
}


def load(checkpoint, base="float32"):
    return LlamaForCausalLM.from_pretrained(checkpoint, **BASES[base])


def trained(model):
    """As after a training: every trainable number has moved, with spectra that fall off."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ".lora_" in name:
                step = torch.randn(parameter.shape) * 0.05
                if ".lora_B." in name and step.ndim == 2:
                    step *= 0.6 ** torch.arange(step.shape[1])
                parameter += step.to(parameter)
    return model


def adapted(checkpoint, base="float32", **lora):
    return trained(get_peft_model(load(checkpoint, base), LoraConfig(**{**PLAIN, **lora})))


def lora_layers(model):
    """Name in the base model to peft's layer, with the factors in float64."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            factors.double()
    return layers


def chosen(checkpoint, spectra, *, alpha=None, **lora):
    """An adapter on every q_proj with the singular values asked for, layer by layer."""
    r = max(map(len, spectra))
    asked = {**PLAIN, "target_modules": ["q_proj"], "r": r, "lora_alpha": alpha or r, **lora}
    model = get_peft_model(load(checkpoint), LoraConfig(**asked))
    generator = torch.Generator().manual_seed(1)
    for spectrum, layer in zip(spectra, lora_layers(model).values(), strict=True):
        sigma = torch.zeros(r, dtype=torch.float64)
        sigma[: len(spectrum)] = torch.tensor(spectrum, dtype=torch.float64)
        for factor, scale in ((layer.lora_A["default"], 1), (layer.lora_B["default"], sigma)):
            shape = (max(factor.weight.shape), r)
            basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
            basis = basis * scale
            factor.weight.data = basis if factor.weight.shape == basis.shape else basis.T
    return model
