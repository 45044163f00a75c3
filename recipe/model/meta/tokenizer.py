"""Meta's tokenizer.model, of either kind, becomes a tokenizer of the tokenizers library."""

import base64
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter

from recipe.settings import RunFailed, UserError

STRINGS = 10_000
_BPE, _NORMAL, _UNKNOWN, _CONTROL, _BYTE = 2, 1, 2, 3, 6
# The pattern by which Llama 3's words are found, in Meta's tokenizer.py.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = 256
# Which of Llama 3's special tokens have a name, by their place, and what 3.1 named beside.
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
# How Meta's code writes conversations, in Jinja.
_CHAT_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_CHAT_2 = (
    "{% set system = messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}[INST] "
    "{% if system and loop.first %}"
    "{{ ('<<SYS>>\n' ~ messages[0]['content'] ~ '\n<</SYS>>\n\n' ~ message['content']) | trim }}"
    "{% else %}{{ message['content'] | trim }}{% endif %} [/INST]"
    "{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
_NAMED_LATER = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


@dataclass(frozen=True)
class MetaTokenizer:
    """``original`` gives the ids of a text, without BOS, as Meta's own tokenizer does."""

    kind: str  # sentencepiece or tiktoken
    converted: PreTrainedTokenizerFast
    original: Callable[[str], list[int]]
    size: int  # ids, special ones included
    ends: Sequence[int]  # ids that end an answer


def load_tokenizer(file: Path, *, later: bool, instruct: bool) -> MetaTokenizer:
    """Read tokenizer.model.

    Args:
        later: Llama 3.1 and what follows, where more of the special tokens have a name.
        instruct: of a model that was trained on conversations, which ends its turns.

    Raises:
        UserError: it is neither a sentencepiece model as Llama 1 and 2 have it nor ranks of byte
            pairs as Llama 3 has them.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError.single(
            str(file), f"cannot be read ({error.strerror}). Name it by --tokenizer."
        ) from None
    ranks = _ranks(content)
    if ranks:
        return _tiktoken(file, ranks, later=later, instruct=instruct)
    return _sentencepiece(file, content, instruct=instruct)


def check_same_ids(tokenizer: MetaTokenizer, file: Path) -> int:
    """Compare on ``STRINGS`` texts; return how many.

    Raises:
        RunFailed: the ids of a text differ.
    """
    texts = list(itertools.islice(varied_texts(tokenizer.converted), STRINGS))
    # What looks like a special token in a text is text.
    found = tokenizer.converted(texts, add_special_tokens=False, split_special_tokens=True)
    for text, ids in zip(texts, found["input_ids"], strict=True):
        if ids != (expected := tokenizer.original(text)):
            raise RunFailed(
                f"{file}: {text[:60]!r} has ids {expected[:8]}…, and {ids[:8]}… once converted"
            )
    return len(texts)


def varied_texts(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Texts without end, the same each time: words of the vocabulary, spaces, newlines, digits,
    many scripts, emoji, what no vocabulary has, and what looks like special tokens.
    """
    draw = random.Random(0)
    words = [tokenizer.decode([n]) for n in range(len(tokenizer))]
    special = list(tokenizer.all_special_tokens)
    while True:
        parts = [_part(draw, words, special) for _ in range(draw.randint(1, 12))]
        yield draw.choice(["", "", " ", "\n"]).join(parts)


def _part(draw: random.Random, words: Sequence[str], special: Sequence[str]) -> str:
    match draw.randrange(9):
        case 0 | 1 | 2:
            return draw.choice(words)
        case 3:
            return draw.choice([" ", "\n", "\t", "\r\n", "▁", "\u00a0", "\u3000"]) * draw.randint(
                1, 5
            )
        case 4:
            return str(draw.randrange(10 ** draw.randint(1, 12)))
        case 5:
            first = draw.choice([0x41, 0xC0, 0x391, 0x410, 0x5D0, 0x627, 0x905, 0x4E00, 0xAC00])
            return "".join(chr(first + draw.randrange(40)) for _ in range(draw.randint(1, 6)))
        case 6:
            return draw.choice(
                ["👩‍👩‍👧", "🇩🇪", "☕️", "𐍈", "\U0010fffd", "\u200b", "e\u0301", "﷽", "\x01"]
            )
        case 7:
            return draw.choice(special) if special else "<s>"
        case _:
            return draw.choice(["don't", "HTTP/1.1", "a=b;", "...", "“ja”", "C:\\x", "{}[]", "x²"])


def _ranks(content: bytes) -> dict[bytes, int]:
    """Of a tiktoken file, a token in base64 and its rank in each line; empty if it is none."""
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return {}
    return ranks


def _tiktoken(file: Path, ranks: dict[bytes, int], *, later: bool, instruct: bool) -> MetaTokenizer:
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([n]) not in ranks for n in range(256)
    ):
        raise UserError.single(
            str(file), "has ranks that are not 0, 1, 2 and so on, or lacks a byte. Fetch it again."
        )
    special = _special_tokens(later=later)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks

    backend = Converter(str(file), pattern=_PATTERN, extra_special_tokens=special).converted()
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begin(special[0], len(ranks))]
    )
    end = special[9] if instruct else special[1]
    converted = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    pattern = regex.compile(_PATTERN)

    def original(text: str) -> list[int]:
        found: list[int] = []
        for word in pattern.findall(text):
            found += _byte_pairs(word.encode(), ranks)
        return found

    if instruct:
        converted.chat_template = _CHAT_3
    # end_of_text, then the end of a message that calls a tool, of a turn
    places = [1, *([8] if later else []), 9] if instruct else [1]
    ends = [len(ranks) + place for place in places]
    return MetaTokenizer("tiktoken", converted, original, len(ranks) + _SPECIAL, ends)


def _special_tokens(*, later: bool) -> list[str]:
    named = {**_NAMED, **(_NAMED_LATER if later else {})}
    numbers = itertools.count()
    return [
        named.get(place) or f"<|reserved_special_token_{next(numbers)}|>"
        for place in range(_SPECIAL)
    ]


def _byte_pairs(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The pair of the lowest rank is joined, again and again: how tiktoken is defined."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[n : n + 1] for n in range(len(word))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest == len(ranks):
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def _sentencepiece(file: Path, content: bytes, *, instruct: bool) -> MetaTokenizer:
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
        extractor = SentencePieceExtractor(str(file))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError.single(
            str(file), f"is no tokenizer of a Llama model ({reason}). Fetch it again."
        ) from error
    proto = extractor.proto
    _check_like_llama(file, proto)
    # Control and byte pieces are never joined out of what a text says.
    apart = {piece.piece for piece in proto.pieces if piece.type != _NORMAL}
    parts = extractor.extract(models.BPE)
    merges = [pair for pair in parts["merges"] if not apart & {*pair, "".join(pair)}]
    unknown = original.id_to_piece(original.unk_id())
    backend = Tokenizer(
        models.BPE(parts["vocab"], merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = {
        "unk_token": unknown,
        "bos_token": original.id_to_piece(original.bos_id()),
        "eos_token": original.id_to_piece(original.eos_id()),
    }
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names.values()]
    )
    backend.post_processor = _begin(names["bos_token"], original.bos_id())
    converted = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
    if instruct:
        converted.chat_template = _CHAT_2
    size, ends = original.get_piece_size(), [original.eos_id()]
    return MetaTokenizer("sentencepiece", converted, original.encode, size, ends)


def _begin(name: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, number)]
    )


def _check_like_llama(file: Path, proto: object) -> None:
    """What is built below follows these choices of Llama's sentencepiece model, and no others."""
    trainer, normal = proto.trainer_spec, proto.normalizer_spec  # type: ignore[attr-defined]
    kinds = {piece.type for piece in proto.pieces}  # type: ignore[attr-defined]
    asked = {
        "model_type is BPE": trainer.model_type == _BPE,
        "bytes stand for what is unknown": trainer.byte_fallback,
        "bos and eos have an id": min(trainer.bos_id, trainer.eos_id, trainer.unk_id) >= 0,
        "a space is put before a text": normal.add_dummy_prefix,
        "spaces are kept": not normal.remove_extra_whitespaces,
        "texts are not normalised": not normal.precompiled_charsmap,
        "each piece is a normal, unknown, control or byte one": kinds
        <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
    }
    missing = [what for what, is_so in asked.items() if not is_so]
    if missing:
        raise UserError.single(
            str(file),
            f"is a sentencepiece model of another kind: not so that {', nor that '.join(missing)}. "
            "Convert it with its own family's tool.",
        )
