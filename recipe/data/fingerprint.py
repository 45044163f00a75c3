"""What turns a prompt into token ids, in two hashes: the tokenizer and the template."""

import hashlib
import json
from typing import TYPE_CHECKING

from recipe.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two tokenizers of one vocabulary can still cut text differently.
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces,\ta tab\n\n and blank lines\r\n",
    "3.14159 2026-11-25 1,000,000 0xFF",
    "def f(x):\n    return x**2  # comment",
    "naïve café, Straße, Ωmega, привет, 你好, こんにちは, 안녕",
    "🙂👩‍🔬 → ≠ ½",
    "<s></s> [INST] <|im_start|> ### Response:",
)


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over vocabulary, merges, special ids and the ids of a few awkward texts.

    Over what the tokenizer does and not over its file, whose form changes with the library that
    wrote it.
    """
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": _merges(tokenizer),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "ids": [
            tokenizer(text, add_special_tokens=special)["input_ids"]
            for text in _TEXTS
            for special in (False, True)
        ],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _merges(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Of BPE, in order; a vocabulary does not show one that is missing."""
    if not tokenizer.is_fast:
        return []
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def template_sha256(template: Template) -> str:
    """sha256 over everything that the bytes of a prompt depend on."""
    facts = [template.name, template.add_special_tokens, template.source]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
