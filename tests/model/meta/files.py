"""Checkpoints in Meta's layout, made out of transformers models, as a test needs them."""

import base64
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROWS, COLUMNS = 0, 1
# Meta's name → transformers' name within a layer, and the axis that is split; None is copied.
LAYER = {
    "attention.wq": ("self_attn.q_proj", ROWS),
    "attention.wk": ("self_attn.k_proj", ROWS),
    "attention.wv": ("self_attn.v_proj", ROWS),
    "attention.wo": ("self_attn.o_proj", COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", ROWS),
    "feed_forward.w2": ("mlp.down_proj", COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", ROWS),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
OUTSIDE = ("tok_embeddings.weight", "norm.weight", "output.weight")
IN_LAYER = tuple(f"layers.0.{name}.weight" for name in LAYER)
_WORDS = "the of and to in a is that it was for on are as with his they be at one"
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
SCALED_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def neighbours(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row 2i of a head is transformers' row i, row 2i + 1 its row i + head_dim / 2."""
    rows = []
    for start in range(0, len(weight), head_dim):
        for pair in range(head_dim // 2):
            rows += [weight[start + pair], weight[start + pair + head_dim // 2]]
    return torch.stack(rows)


def meta_tensors(
    model: LlamaForCausalLM, embedding: int
) -> dict[str, tuple[torch.Tensor, int | None]]:
    """Whole tensors by Meta's names, each with the axis that is split."""
    state, config = model.state_dict(), model.config
    head_dim = config.hidden_size // config.num_attention_heads
    found: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], embedding),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], ROWS),
    }
    for number in range(config.num_hidden_layers):
        for meta, (name, axis) in LAYER.items():
            tensor = state[f"model.layers.{number}.{name}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                tensor = neighbours(tensor, head_dim)
            found[f"layers.{number}.{meta}.weight"] = tensor, axis
    return found


def write_shards(
    model: LlamaForCausalLM,
    folder: Path,
    *,
    shards: int = 1,
    embedding: int = ROWS,
    params: dict[str, object] | None = None,
) -> Path:
    """consolidated.*.pth and params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = meta_tensors(model, embedding)
    for number in range(shards):
        part = {
            name: (whole if axis is None else whole.chunk(shards, dim=axis)[number]).clone()
            for name, (whole, axis) in tensors.items()
        }
        torch.save(part, shard_file(folder, number))
    config = model.config
    content = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "multiple_of": 32,
        **(params or {}),
    }
    (folder / "params.json").write_text(json.dumps(content))
    return folder


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"consolidated.{number:02d}.pth"


def edit_shard(
    folder: Path, number: int, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """Let ``change`` work on the tensors of one shard."""
    file = shard_file(folder, number)
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def edit_params(folder: Path, **values: object) -> None:
    """Set keys of params.json; ``...`` takes one out."""
    file = folder / "params.json"
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def repack(
    file: Path,
    change: Callable[[dict[str, bytes]], object] = lambda records: None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write the zip that torch wrote once more, as another program packs it."""
    with zipfile.ZipFile(file) as archive:
        records = {one.filename: archive.read(one) for one in archive.infolist()}
    change(records)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def as_torch_1_wrote_it(records: dict[str, bytes]) -> None:
    """Without the record that lets torch compute where tensors lie."""
    for name in [name for name in records if name.endswith((".format_version", "_alignment"))]:
        del records[name]


def write_ranks(file: Path, count: int) -> Path:
    """A tokenizer.model as Llama 3 has it: bytes, words of a text, and what fills the rest."""
    tokens = dict.fromkeys(itertools.islice(_tokens(), count * 2))
    lines = (
        base64.b64encode(token) + f" {rank}\n".encode()
        for rank, token in enumerate(itertools.islice(tokens, count))
    )
    file.write_bytes(b"".join(lines))
    return file


def _tokens() -> Iterator[bytes]:
    """Each is a byte, or two of those before it."""
    yield from (bytes([n]) for n in range(256))
    words = "th he in er an ␣t ␣a the ␣the ing ␣in er␣ aa aaa ab aba ␣␣ ␣␣␣␣ \n\n 日 本"
    yield from (word.replace("␣", " ").encode() for word in words.split(" "))
    for first in range(97, 123):
        yield from (bytes([first, second]) for second in range(256))
    for first, second in itertools.product(range(97, 123), range(256)):
        yield from (bytes([first, second, third]) for third in range(97, 123))


def write_sentencepiece(
    file: Path, size: int = 448, *, more: Sequence[str] = (), **options: object
) -> Path:
    """Trained on a text of many kinds and ``more``, with the options of Llama's own."""
    words = _WORDS.split()
    text = [
        " ".join(words[(n * k) % len(words)] + str(n % 13) * (n % 2) for k in range(1, 9))
        + " déjà vu été"
        for n in range(400)
    ]
    text += ["日本語のテキスト", "Привет мир", "def f(x):\n  return x", "s> </ <s <0x41>"] * 20
    text += more
    prefix = str(file).removesuffix(".model")
    given = {
        "vocab_size": size, "model_type": "bpe", "byte_fallback": True, "num_threads": 1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": True, "split_digits": True, "unk_surface": " \u2047 ",
        "allow_whitespace_only_pieces": True, "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=prefix, **{**given, **options}
    )
    Path(f"{prefix}.vocab").unlink()
    return file


def tiny_llama(**shape: object) -> LlamaForCausalLM:
    """Random weights, large enough that no logit is near another."""
    torch.manual_seed(0)
    given = {
        "vocab_size": 768, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**given, **shape}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def greedy(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """``ids`` and 20 more, by stock generate; no id is the end."""
    model.generation_config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids))
