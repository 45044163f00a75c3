"""A GGUF checkpoint → a safetensors folder, counted against the file's own tensors."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from transformers import AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from recipe.sealed import whole_folder
from recipe.settings import RunFailed, UserError

# Types whose weights lie on even steps, and how many share them.
_EVEN = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), 32),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 16),
}
_ROPE, _FREQUENCIES = "llama.rope", "rope_freqs.weight"
# Of Llama 3.1 and 3.3, and of 3.2.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SAMPLED = 1 << 16  # weights of a tensor, from which its steps are estimated


def convert_gguf(source: Path, destination: Path) -> tuple[int, list[str]]:
    """Dequantise ``source`` to float32 and write model, tokenizer and chat template.

    Returns:
        The number of parameters, and a line on each kind of quantisation in the file.

    Raises:
        UserError: ``source`` is no readable GGUF file of a Llama model.
        RunFailed: the folder would hold another number of parameters, one that the file does not
            give, or one that is not finite.
    """
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with _reading(source):
        # First, because it alone compares each length that the file claims with the file's end.
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    with _reading(source):
        reader = GGUFReader(source)
        architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise UserError.single(
            str(source), f"holds a {architecture!r} model, no 'llama' one. Use another."
        )
    tensors = [tensor for tensor in reader.tensors if tensor.name != _FREQUENCIES]
    rope = _scaled_rope(source, reader)
    in_file = sum(int(tensor.n_elements) for tensor in tensors)
    with _reading(source):
        model, loading = LlamaForCausalLM.from_pretrained(
            **where,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # or the model cannot be saved
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers fills what is missing with random values, and only warns.
    made_up = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if made_up:
        raise RunFailed(f"{source.name} does not give {', '.join(made_up[:5])} as a model needs it")
    parameters: int = sum(p.numel() for p in model.parameters())
    if parameters != in_file:
        raise RunFailed(f"{source.name} holds {in_file:,} parameters, {parameters:,} were read")
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise RunFailed(f"{source.name} holds values that are not finite")
    if rope is not None:
        model.config.rope_parameters = rope
    told = quantization_told(tensors)
    with whole_folder(destination) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return parameters, told


def _scaled_rope(source: Path, reader: GGUFReader) -> dict[str, Any] | None:
    """``rope_parameters`` where rotary frequencies are scaled; transformers reads nothing of it.

    llama.cpp keeps Llama 3.1's as divisors of each frequency, without the rule that made them.

    Raises:
        UserError: they are scaled by a rule that is not known here.
    """
    kind = reader.fields.get(f"{_ROPE}.scaling.type")
    named = None if kind is None else str(kind.contents())
    divisors = next((tensor for tensor in reader.tensors if tensor.name == _FREQUENCIES), None)
    if divisors is None and named in (None, "none"):
        return None
    values = None if divisors is None else torch.from_numpy(np.array(divisors.data)).float()
    if values is not None and named in (None, "none"):
        if bool((values == 1).all()):
            return None
        theta = float(reader.fields[f"{_ROPE}.freq_base"].contents())
        for factor in _LLAMA3_FACTORS:
            rope = {**_LLAMA3, "rope_theta": theta, "factor": factor}
            if torch.allclose(values, _divisors(rope, 2 * len(values)), rtol=1e-3):
                return rope
    raise UserError.single(
        str(source),
        f"scales its rotary frequencies ({named or _FREQUENCIES}) by a rule that is not known "
        "here. Use the checkpoint in safetensors.",
    )


def _divisors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Of transformers' own rule, (head_dim / 2,)."""

    def frequencies(parameters: dict[str, Any]) -> torch.Tensor:
        config = LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
            rope_parameters=parameters,
        )  # fmt: skip
        found: torch.Tensor = LlamaRotaryEmbedding(config).inv_freq
        return found

    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return frequencies(plain) / frequencies(dict(rope))


def quantization_told(tensors: Sequence[ReaderTensor]) -> list[str]:
    """Bits a weight, and how far rounding has moved weights: for each type, a line.

    Weights that were rounded to steps of d are off by d / √12 in the root mean square. Steps are
    estimated from the gaps between the values of a block; the weights before rounding are not in
    the file.
    """
    by_type: dict[GGMLQuantizationType, list[ReaderTensor]] = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.tensor_type].append(tensor)
    return [_told(kind, held) for kind, held in sorted(by_type.items())]


def _told(kind: GGMLQuantizationType, tensors: Sequence[ReaderTensor]) -> str:
    weights, (block, size) = sum(int(one.n_elements) for one in tensors), GGML_QUANT_SIZES[kind]
    bits = 8 * size / block
    held = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"
    said = f"note      {kind.name}: {held}, {weights:,} weights of {bits:.3g} bits"
    if kind.name not in _EVEN:
        return said + ("" if kind.name in ("F32", "F16", "BF16") else ", of uneven steps")
    matrices = [one for one in tensors if len(one.shape) > 1]
    if not matrices:
        return said
    errors = [_rounding(one, _EVEN[kind.name]) for one in matrices]
    counts = [int(one.n_elements) for one in matrices]
    return (
        f"{said}; rounding has moved them by about {np.average(errors, weights=counts):.1%} of "
        "their size, which no conversion undoes"
    )


def _rounding(tensor: ReaderTensor, block: int) -> float:
    """Root mean square of the rounding over that of the weights; blocks lie along a row."""
    values = dequantize(tensor.data[: max(_SAMPLED // int(tensor.shape[0]), 1)], tensor.tensor_type)
    blocks = np.sort(values.reshape(-1, block).astype(np.float64), axis=-1)
    gaps = np.diff(blocks, axis=-1)
    # Values on the same step differ by nothing, or by what float32 rounds.
    gaps[gaps <= 1e-5 * np.abs(blocks).max(-1, keepdims=True)] = np.inf
    steps = gaps.min(-1)
    steps[np.isinf(steps)] = 0
    return math.sqrt((steps**2).mean() / 12 / max(float((blocks**2).mean()), 1e-30))


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """For one call of a library that reads the file; see ``recipe.model.checkpoint``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a library written in Rust is no Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UserError.single(
            str(source),
            f"not readable as a GGUF file of a Llama model ({reason}). Use another.",
        ) from error
