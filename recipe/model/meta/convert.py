"""Meta's checkpoint → a sealed safetensors folder, tensor by tensor, with its proof."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from recipe.model.meta.forward import SCALE
from recipe.model.meta.layout import Entry, Params
from recipe.model.meta.proof import Proof, proven
from recipe.model.meta.source import Source, entries, opened
from recipe.model.meta.tokenizer import check_same_ids
from recipe.model.shapes import published
from recipe.sealed import whole_folder
from recipe.settings import UserError

PROOF = "conversion.json"
_GB = 10**9
_COPIES_APART = 0.01  # of the largest value; the first shard's is taken
_FILE_BYTES = 1 << 30  # of weights in one file, which are in memory at once
_CONTEXT = {"sentencepiece": 4096, "tiktoken": 8192}
_CODE_LLAMA_CONTEXT, _LLAMA_THETA = 16_384, 10_000
_SCALED_CONTEXT, _SCALE_32 = 131_072, 32.0


@dataclass(frozen=True)
class Converted:
    """``notes`` say what the files leave open and how it was taken."""

    parameters: int
    dtype: str
    shards: int
    strings: int
    proof: Proof
    notes: Sequence[str]


def convert_meta(
    source: Path,
    destination: Path,
    *,
    tokenizer: Path | None = None,
    instruct: bool = False,
    context: int | None = None,
) -> Converted:
    """Write ``destination``: weights in their own dtype, tokenizer, config, and the proof.

    Args:
        source: the folder of consolidated.*.pth and params.json.
        tokenizer: tokenizer.model; default: in ``source``, else beside it.
        instruct: the model was trained on conversations.
        context: tokens; default: that of the published model of this shape, else its family's.

    Raises:
        UserError: the files are not whole, or none of a Llama 1, 2 or 3 text model.
        RunFailed: what was written does not compute what Meta's files do.
    """
    found = opened(source, tokenizer, instruct=instruct)
    _check_space(found, destination)
    config, scale, notes = _config(found, instruct=instruct, context=context)
    with whole_folder(destination) as staged:
        config.save_pretrained(staged)
        found.tokenizer.converted.save_pretrained(staged)
        _generation(found).save_pretrained(staged)
        written = AutoTokenizer.from_pretrained(staged, trust_remote_code=False)
        strings = check_same_ids(replace(found.tokenizer, converted=written), source)
        parameters = _write_weights(found, config, staged)
        proof = proven(
            found.params, found.shards, staged, found.tokenizer.original,
            embedding=found.embedding, scale=scale,
        )  # fmt: skip
        dtype = str(found.dtype).removeprefix("torch.")
        converted = Converted(parameters, dtype, len(found.shards), strings, proof, notes)
        facts = {**asdict(converted), "sources": dict(found.sha256), "versions": _versions()}
        (staged / PROOF).write_text(json.dumps(facts, indent=1) + "\n")
    return converted


def _joined(found: Source, entry: Entry) -> torch.Tensor:
    """The whole tensor in the order of a ``LlamaForCausalLM``."""
    parts = [shard.read(entry.name) for shard in found.shards]
    if not all(torch.isfinite(part).all() for part in parts):
        raise UserError.single(
            f"{found.folder}: {entry.name}", "holds values that are not finite. Fetch it again."
        )
    if entry.split.value is None:
        first = parts[0].float()
        apart = max((float((first - part.float()).abs().max()) for part in parts[1:]), default=0.0)
        if apart > _COPIES_APART * float(first.abs().max()):
            raise UserError.single(
                f"{found.folder}: {entry.name}", "differs between shards. Fetch them again."
            )
        whole = parts[0]
    else:
        whole = torch.cat(parts, dim=entry.split.value) if len(parts) > 1 else parts[0]
    return whole if entry.heads is None else halves_of_pairs(whole, entry.heads)


def halves_of_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection, (heads · head_dim, width), as transformers turns them: the first
    half of a head with its second, where Meta's code turns neighbours together.
    """
    rows, width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _write_weights(found: Source, config: LlamaConfig, folder: Path) -> int:
    """As transformers saves them: files, and an index where there are several."""
    limit = min(_FILE_BYTES, max(found.shards[0].nbytes() // 2, 1))
    names: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    parameters = total = 0
    for entry in tqdm(list(entries(found)), "tensors", disable=None, leave=False):
        if entry.name == "output.weight" and config.tie_word_embeddings:
            continue
        tensor = _joined(found, entry)
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > limit:
            names.append(_saved(held, folder / f"part-{len(names)}"))
            held = {}
        held[entry.hugging_face] = tensor
        parameters += tensor.numel()
        total += tensor.nbytes
    names.append(_saved(held, folder / f"part-{len(names)}"))
    _named(names, total, folder)
    return parameters


def _saved(tensors: dict[str, torch.Tensor], file: Path) -> list[str]:
    save_file({name: one.contiguous() for name, one in tensors.items()}, file, {"format": "pt"})
    return list(tensors)


def _named(names: Sequence[Sequence[str]], total: int, folder: Path) -> None:
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, of_file in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        where |= dict.fromkeys(of_file, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _config(
    found: Source, *, instruct: bool, context: int | None
) -> tuple[LlamaConfig, float, list[str]]:
    """The config, the scale of rotary frequencies, and what had to be assumed."""
    params, kind = found.params, found.tokenizer.kind
    tied = _tied(found)
    name = _published(found, tied=tied)
    assumed = _SCALED_CONTEXT if params.use_scaled_rope else _CONTEXT[kind]
    if kind == "sentencepiece" and params.rope_theta > _LLAMA_THETA:
        assumed = _CODE_LLAMA_CONTEXT
    length = context or (published()[name]["max_position_embeddings"] if name else assumed)
    notes = [] if name is None else [f"its shape is that of {name}"]
    if context is None:
        whose = f"as {name} has it" if name else "of its family, assumed"
        if kind == "sentencepiece" and params.rope_theta == _LLAMA_THETA:
            whose += " (Llama 1's is 2,048)"
        notes.append(f"a context of {length:,} tokens, {whose}: --context says another")
    scale = params.rope_scaling_factor or (_SCALE_32 if tied else SCALE)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params.rope_theta)}
    if params.use_scaled_rope:
        rope = {**rope, **_scaled(params, scale)}
        if params.rope_scaling_factor is None:
            whose = "3.2, whose embeddings are tied too" if tied else "3.1"
            notes.append(f"rotary frequencies scaled by {scale:g}, as in Llama {whose}")
    converted = found.tokenizer.converted
    config = LlamaConfig(
        vocab_size=found.vocab_size,
        hidden_size=params.dim,
        intermediate_size=params.hidden_dim,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.kv_heads,
        head_dim=params.head_dim,
        rms_norm_eps=params.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        bos_token_id=converted.bos_token_id,
        eos_token_id=converted.eos_token_id,
        dtype=found.dtype,
        architectures=["LlamaForCausalLM"],
    )
    if instruct:
        notes.append(f"of conversations: turns end with {converted.eos_token}")
    else:
        notes.append("taken for a base model: --instruct, if it was trained on conversations")
    return config, scale, notes


def _scaled(params: Params, scale: float) -> dict[str, Any]:
    from recipe.model.meta.forward import HIGH_FREQUENCY, LOW_FREQUENCY, ORIGINAL_CONTEXT

    return {
        "rope_type": "llama3",
        "factor": scale,
        "low_freq_factor": LOW_FREQUENCY,
        "high_freq_factor": params.rope_high_freq_factor or HIGH_FREQUENCY,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


def _tied(found: Source) -> bool:
    """No output of its own, or one that is the embedding."""
    if "output.weight" not in found.shards[0].names:
        return True
    around = found.params.around(found.vocab_size, found.embedding)
    embedding, _, output = (_joined(found, entry) for entry in around)
    return torch.equal(embedding, output)


def _published(found: Source, *, tied: bool) -> str | None:
    """The published model of this shape; the first of several."""
    params = found.params
    if found.tokenizer.kind == "sentencepiece" and params.rope_theta != _LLAMA_THETA:
        return None  # Code Llama, of the same sizes
    expected = {
        "vocab_size": found.vocab_size,
        "hidden_size": params.dim,
        "intermediate_size": params.hidden_dim,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.kv_heads,
    }
    for name, shape in published().items():
        scaled = shape["max_position_embeddings"] == _SCALED_CONTEXT
        if (
            all(shape[key] == value for key, value in expected.items())
            and bool(shape.get("tie_word_embeddings")) == tied
            and scaled == params.use_scaled_rope
        ):
            return name
    return None


def _generation(found: Source) -> GenerationConfig:
    converted = found.tokenizer.converted
    ends = found.tokenizer.ends
    return GenerationConfig(
        bos_token_id=converted.bos_token_id, eos_token_id=ends if len(ends) > 1 else ends[0]
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}


def _check_space(found: Source, destination: Path) -> None:
    there = next(path for path in destination.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(there).free, sum(shard.nbytes() for shard in found.shards)
    if needed > free:
        raise UserError.single(
            "destination",
            f"{there} has {free / _GB:.1f} GB free, and the weights take {needed / _GB:.1f}. Make "
            "room, or name another disk.",
        )
