"""Does the written folder compute what Meta's files do? One layer at a time is in memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from recipe.model.meta.forward import meta_logits
from recipe.model.meta.layout import Params, Split
from recipe.model.meta.shards import Shard
from recipe.settings import RunFailed

TOLERANCE = 1e-4  # of logits, relative to their standard deviation
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
    ``same_next`` of ``positions`` have the same most likely next token. Deep models round by more
    than ``tolerance`` in float32: where they do, they are ``computed_in`` float64.
    """

    positions: int
    difference: float
    same_next: int
    computed_in: str
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

    def compared(dtype: torch.dtype) -> Proof:
        options = {"embedding": embedding, "scale": scale, "dtype": dtype}
        with torch.no_grad():
            expected = meta_logits(params, shards, sequences, **options)  # type: ignore[arg-type]
            return _compared(expected, converted_logits(folder, config, sequences, dtype), dtype)

    drawn = torch.randint(
        config.vocab_size, (_LONG,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sequences = [*filter(None, map(encode, _TEXTS)), drawn]
    proof = compared(torch.float32)
    if proof.difference > TOLERANCE:
        proof = compared(torch.float64)
    if not proof.difference <= TOLERANCE:  # NaN too
        raise RunFailed(
            "the converted model's logits differ from those of Meta's files by "
            f"{proof.difference:.3g} of their standard deviation, more than {TOLERANCE:g}; nothing "
            "was written"
        )
    return proof


def _compared(
    expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], dtype: torch.dtype
) -> Proof:
    pairs = list(zip(expected, found, strict=True))
    largest = max(float((a - b).abs().max() / a.std()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    name = str(dtype).removeprefix("torch.")
    return Proof(sum(len(a) for a in expected), largest, same, name)


def converted_logits(
    folder: Path,
    config: LlamaConfig,
    sequences: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits by transformers' own modules and the files of ``folder``, (T, vocabulary)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    rotary = LlamaRotaryEmbedding(config)
    weights = _Weights(folder)

    def run(
        module: nn.Module, prefix: str, calls: Sequence[tuple[torch.Tensor, dict[str, object]]]
    ) -> list[torch.Tensor]:
        """One module on all sequences, its weights read once."""
        names = [name for name, _ in module.named_parameters()]
        given = {name: weights.read(f"{prefix}.{name}").to(dtype) for name in names}
        return [torch.func.functional_call(module, given, (x,), kwargs) for x, kwargs in calls]

    inner = model.model
    ids = [torch.tensor([sequence]) for sequence in sequences]
    hidden = run(inner.embed_tokens, "model.embed_tokens", [(one, {}) for one in ids])
    turns = [rotary(x, torch.arange(x.shape[1])[None]) for x in hidden]
    layers = tqdm(inner.layers, "layers as converted", disable=None, leave=False)
    for number, layer in enumerate(layers):
        calls = [
            (x, {"position_embeddings": turn, "attention_mask": None})
            for x, turn in zip(hidden, turns, strict=True)
        ]
        hidden = run(layer, f"model.layers.{number}", calls)
    hidden = run(inner.norm, "model.norm", [(x, {}) for x in hidden])
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return [out[0] for out in run(model.lm_head, head, [(x, {}) for x in hidden])]


class _Weights:
    """Tensors of a folder of safetensors files, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor
