"""Text that has nothing to do with any instruction data, to see what a model does elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = Path(__file__).with_name("neutral.txt")
TOKENS = 2000
WINDOWS = 4


def neutral_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The first 2,000 tokens of the shipped text; fewer where a tokenizer makes fewer of it."""
    text = _TEXT.read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    return ids


def bos_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The BOS id if the tokenizer puts one in front of text, which its model then expects there."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def neutral_windows(tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """``neutral_ids`` as four windows of 500, or shorter ones."""
    ids = neutral_ids(tokenizer)
    length = len(ids) // WINDOWS
    return [ids[start : start + length] for start in range(0, WINDOWS * length, length)]
