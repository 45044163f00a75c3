"""Texts that are hard for a tokenizer, the same each time."""

import random
import unicodedata

WORDS = """the of and that with they Below instruction déjà vu été naïve straße Привет мир שלום
مرحبا नमस्ते สวัสดี 日本語 テキスト 中文 한국어 def return self.x += 1; don't I'LL we've HTTP://a.b/?c=d&e
{'a': [1, 2]} #include <stdio.h> \\n \\u0041 C:\\dir"""
SPECIAL = ["<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "<0xE6>", "<pad>", "s>", "<s", "< s >"]
SPECIAL += ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|", "|>", "[INST]", "<<SYS>>"]
EMOJI = ["🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "☕️", "1️⃣", "❤️‍🔥", "🫠", "\ufe0f", "\u200d"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u2003", "\u3000", "\u200b"]
SPACES += ["▁", "▁▁"]
CONTROL = [chr(code) for code in [*range(1, 32), *range(127, 160), 0xFEFF, 0x202E, 0xFFFD, 0xFFFE]]
MARKS = [chr(code) for code in range(0x300, 0x370)]
SCRIPTS = [
    (0x21, 0x7F), (0xA1, 0x250), (0x370, 0x590), (0x5D0, 0x700), (0x900, 0xE00), (0x1E00, 0x2100),
    (0x2190, 0x2C00), (0x3040, 0x3100), (0x4E00, 0x9FF0), (0xAC00, 0xD7A0), (0xE000, 0xE100),
    (0x10000, 0x10100), (0x1D400, 0x1D800), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
    (0x10FF00, 0x10FFFF),
]  # fmt: skip


def _digits(draw):
    return str(draw.randrange(10 ** draw.randint(1, 15)))


def _script(draw):
    start, end = draw.choice(SCRIPTS)
    return "".join(chr(draw.randrange(start, end)) for _ in range(draw.randint(1, 8)))


def _marked(draw):
    letter = draw.choice("aeioucnAEDйあ")
    whole = letter + "".join(draw.choices(MARKS, k=draw.randint(1, 4)))
    return unicodedata.normalize(draw.choice(["NFC", "NFD"]), whole)


def _anything(draw):
    """Any character but halves of a pair, which no UTF-8 has."""
    codes = [draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)])]
    return "".join(map(chr, codes)) * draw.randint(1, 3)


def _of(several):
    return lambda draw: draw.choice(several)


_KINDS = [
    _of(WORDS.split()), _of(WORDS.split()), _of(SPECIAL), _of(EMOJI), _of(SPACES), _of(CONTROL),
    _digits, _script, _marked, _anything,
    lambda draw: draw.choice(SPACES) * draw.randint(1, 9),
]  # fmt: skip


def hard_texts(count, seed=0):
    draw = random.Random(seed)
    yield from ["", " ", "  ", "\n", "\t", "▁", "\x00", "a\x00b"]
    yield from [*SPECIAL, *EMOJI, *SPACES, *CONTROL]
    for _ in range(count):
        parts = [draw.choice(_KINDS)(draw) for _ in range(draw.randint(1, 15))]
        yield draw.choice(["", "", " ", "   "]) + draw.choice(["", " "]).join(parts)
