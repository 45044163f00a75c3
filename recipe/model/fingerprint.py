"""What a base is, in one hash: its weights as they lie in memory, not the name they came by."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer that would be saved.

    Tensors are hashed on all CPU cores (hashlib lets go of the interpreter's lock); those on an
    accelerator are copied one by one. Tied weights are one tensor under several names.
    """
    tensors = model.state_dict()
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(_tensor_sha256, tensors.values())
        whole = hashlib.sha256()
        for name, digest in zip(tensors, hashes, strict=True):
            whole.update(name.encode() + digest)
    return whole.hexdigest()


def _tensor_sha256(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # numpy has no bfloat16, so the bytes are taken as what they are.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
