"""What a base is: its weights as they lie in memory, and how they are computed with."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

# Of config.json, what changes the logits of the same weights.
_COMPUTING = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "mlp_bias",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


def weights_sha256(model: nn.Module) -> str:
    """``tensors_sha256`` of every parameter and buffer that would be saved.

    The same for other shardings and copies of a checkpoint in the same dtype.
    """
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor, in the order given.

    Tensors are hashed on all CPU cores (hashlib lets go of the interpreter's lock); those on an
    accelerator are copied one by one. Tied weights are one tensor under several names.
    """
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(_tensor_sha256, tensors.values())
        whole = hashlib.sha256()
        for name, digest in zip(tensors, hashes, strict=True):
            whole.update(name.encode() + digest)
    return whole.hexdigest()


def computing_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields that decide what these weights compute, as they are written to JSON."""
    fields = config.to_dict()
    return {name: fields.get(name) for name in _COMPUTING}


def _tensor_sha256(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # numpy has no bfloat16, so the bytes are taken as what they are.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
