"""The hash of a base changes with every bit of it, and with nothing else."""

import hashlib

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from recipe.model.fingerprint import weights_sha256


def base(checkpoint, **named):
    return LlamaForCausalLM.from_pretrained(checkpoint, **named)


def test_loaded_twice_is_the_same_and_in_another_dtype_is_not(tiny_checkpoint):
    once = weights_sha256(base(tiny_checkpoint))
    assert once == weights_sha256(base(tiny_checkpoint))
    assert once != weights_sha256(base(tiny_checkpoint, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_last_bit_of_any_tensor_counts(tiny_checkpoint, dtype):
    model = base(tiny_checkpoint, dtype=dtype)
    seen = {weights_sha256(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1).view(torch.uint8)[-2] ^= 1
        seen.add(weights_sha256(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_it_is_this_hash():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.zero_()
    weight = hashlib.sha256(b"torch.float32 (1, 2)" + bytes.fromhex("0000803f00000040"))
    bias = hashlib.sha256(b"torch.float32 (1,)" + bytes(4))
    whole = hashlib.sha256(b"weight" + weight.digest() + b"bias" + bias.digest())
    assert weights_sha256(layer) == whole.hexdigest()
