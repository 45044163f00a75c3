"""A GGUF checkpoint → a safetensors folder, counted against the file's own tensors."""

from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

from recipe.sealed import whole_folder
from recipe.settings import RunFailed


def convert_gguf(source: Path, destination: Path) -> int:
    """Dequantise ``source`` to float32 and write model, tokenizer and chat template.

    Returns:
        The number of parameters.

    Raises:
        RunFailed: the folder would hold another number of parameters, or one that is not finite.
    """
    in_file = sum(
        int(tensor.n_elements)
        for tensor in GGUFReader(source).tensors
        if tensor.name != "rope_freqs.weight"  # a constant, no parameter
    )
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    model = LlamaForCausalLM.from_pretrained(
        **where,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
        trust_remote_code=False,
    )
    parameters: int = sum(p.numel() for p in model.parameters())
    if parameters != in_file:
        raise RunFailed(f"{source.name} holds {in_file:,} parameters, {parameters:,} were read")
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise RunFailed(f"{source.name} holds values that are not finite")
    with whole_folder(destination) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return parameters
