"""Does the written folder compute what Meta's files do? One layer at a time is in memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from recipe.model.meta.forward import meta_logits
from recipe.model.meta.layout import Params, Split
from recipe.model.meta.shards import Shard
from recipe.settings import RunFailed

TOLERANCE = 1e-4  # of logits, float32, relative to their standard deviation
_TEXTS = (
    "The capital of France is",
    "Below is an instruction that describes a task. Write a response that completes it.",
    "def add(a, b):\n    return",
    "1, 2, 3, 5, 8, 13,",
    "Übermut tut selten gut. 日本語 🙂",
)
_LONG = 300  # tokens drawn at random, where a wrong frequency shows


@dataclass(frozen=True)
class Proof:
    """``difference`` is the largest of any logit, over the standard deviation of Meta's;
    ``same_next`` of ``positions`` have the same most likely next token.
    """

    positions: int
    difference: float
    same_next: int
    tolerance: float = TOLERANCE


def proven(
    params: Params,
    shards: Sequence[Shard],
    folder: Path,
    encode: Callable[[str], list[int]],
    *,
    embedding: Split,
    scale: float,
) -> Proof:
    """Compare the logits of both for a few texts.

    Raises:
        RunFailed: they differ by more than ``TOLERANCE``.
    """
    config = LlamaConfig.from_pretrained(folder, trust_remote_code=False)
    drawn = torch.randint(
        config.vocab_size, (_LONG,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sequences = [*filter(None, map(encode, _TEXTS)), drawn]
    with torch.no_grad():
        expected = meta_logits(params, shards, sequences, embedding=embedding, scale=scale)
        found = converted_logits(folder, config, sequences)
    largest = max(
        float((a - b).abs().max() / a.std()) for a, b in zip(expected, found, strict=True)
    )
    same = sum(
        int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True)
    )
    proof = Proof(sum(map(len, sequences)), largest, same)
    if not largest <= TOLERANCE:  # NaN too
        raise RunFailed(
            f"the converted model's logits differ from those of Meta's files by {largest:.1e} of "
            f"their standard deviation, more than {TOLERANCE:.0e}; nothing was written"
        )
    return proof


def converted_logits(
    folder: Path, config: LlamaConfig, sequences: Iterable[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits by transformers' own modules and the files of ``folder``, (T, vocabulary) float32."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    rotary = LlamaRotaryEmbedding(config)
    weights = _Weights(folder)

    def run(
        module: nn.Module, prefix: str, calls: Sequence[tuple[torch.Tensor, dict[str, object]]]
    ) -> list[torch.Tensor]:
        """One module on all sequences, its weights read once."""
        given = {name: weights.read(f"{prefix}.{name}") for name, _ in module.named_parameters()}
        return [torch.func.functional_call(module, given, (x,), kwargs) for x, kwargs in calls]

    inner = model.model
    ids = [torch.tensor([sequence]) for sequence in sequences]
    hidden = run(inner.embed_tokens, "model.embed_tokens", [(one, {}) for one in ids])
    turns = [rotary(x, torch.arange(x.shape[1])[None]) for x in hidden]
    for number, layer in enumerate(inner.layers):
        calls = [
            (x, {"position_embeddings": turn, "attention_mask": None})
            for x, turn in zip(hidden, turns, strict=True)
        ]
        hidden = run(layer, f"model.layers.{number}", calls)
    hidden = run(inner.norm, "model.norm", [(x, {}) for x in hidden])
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return [out[0] for out in run(model.lm_head, head, [(x, {}) for x in hidden])]


class _Weights:
    """Tensors of a folder of safetensors files, float32, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.float()
