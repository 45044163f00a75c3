"""The tokenizer of Llama 1 and 2: the ids of sentencepiece itself, on texts of another generator
than the converter's own.
"""

import json
from dataclasses import replace

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipe import convert
from recipe.model.meta import tokenizer as meta_tokenizer
from recipe.model.meta.tokenizer import check_same_ids, load_tokenizer
from recipe.settings import RunFailed, UserError
from tests.model.meta.files import COLUMNS, tiny_llama, write_sentencepiece, write_shards
from tests.model.meta.texts import SPECIAL, hard_texts

TEXTS = list(hard_texts(10_000))


@pytest.fixture(scope="module")
def confusing(tmp_path_factory):
    """Pieces that join to what control and byte pieces are called: < and s>, < and 0x41>."""
    more = [f"{letter}s> {letter}unk> {letter}/s> {letter}0x41>" for letter in "abcdefgh"] * 60
    file = tmp_path_factory.mktemp("confusing") / "tokenizer.model"
    return write_sentencepiece(
        file, 640, more=more, split_by_unicode_script=False, split_digits=False,
        hard_vocab_limit=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["pieces", "confusing"])
def file(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def original(file):
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(scope="module")
def reloaded(file, original, tmp_path_factory):
    """As whoever loads the written folder gets it."""
    folder = tmp_path_factory.mktemp("folder")
    size = original.get_piece_size()
    model = tiny_llama(vocab_size=size, num_hidden_layers=1)
    write_shards(model, folder / "meta", embedding=COLUMNS, params={"vocab_size": -1})
    convert.main([str(folder / "meta"), str(folder / "model"), "--tokenizer", str(file)])
    return AutoTokenizer.from_pretrained(folder / "model")


def load(file):
    return load_tokenizer(file, later=False, instruct=False)


def ids_of(tokenizer, texts, **options):
    return tokenizer(texts, split_special_tokens=True, **options)["input_ids"]


def test_texts_have_the_ids_of_sentencepiece(file, original):
    found = ids_of(load(file).converted, TEXTS, add_special_tokens=False)
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids == original.encode(text), repr(text)


def test_texts_have_them_once_the_folder_is_loaded(original, reloaded):
    found = ids_of(reloaded, TEXTS)
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids == [original.bos_id(), *original.encode(text)], repr(text)


def test_ids_become_text_as_sentencepiece_decodes_them(original, reloaded):
    for text in TEXTS:
        ids = original.encode(text)
        assert reloaded.decode(ids) == original.decode(ids)
        assert original.decode(ids) == text.replace("▁", " ")


def test_each_id_has_its_piece(original, reloaded):
    assert len(reloaded) == original.get_piece_size()
    for number in range(len(reloaded)):
        assert reloaded.convert_ids_to_tokens(number) == original.id_to_piece(number)


def test_special_ids_are_those_of_the_model(original, reloaded):
    assert reloaded.bos_token_id == original.bos_id() == 1
    assert reloaded.eos_token_id == original.eos_id() == 2
    assert reloaded.unk_token_id == original.unk_id() == 0
    assert reloaded.pad_token_id is None


def test_what_looks_special_in_a_text_is_text(original, reloaded):
    assert all(original.is_control(n) or original.is_unknown(n) for n in (0, 1, 2))
    for looks in SPECIAL:
        ids = ids_of(reloaded, f"a{looks}b", add_special_tokens=False)
        assert not {0, 1, 2} & set(ids)
    assert original.piece_to_id("<0x41>") not in ids_of(reloaded, "<0x41>")
    assert reloaded("<s>", add_special_tokens=False)["input_ids"] == [1]  # unless it is asked for


def test_pieces_that_join_to_a_control_piece_are_there(confusing):
    """The control of the tests above."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(confusing))
    for first, second in [("<", "s>"), ("<", "/s>"), ("<", "unk>"), ("<", "0x41>")]:
        assert original.encode(f"a{first}{second}", out_type=str)[-2:] == [first, second]
        assert original.piece_to_id(first + second) != original.unk_id() or second == "unk>"
    assert not [pair for pair in merges(load(confusing)) if "".join(pair) in ("<s>", "<0x41>")]


def content_of(loaded):
    return json.loads(loaded.converted.backend_tokenizer.to_str())


def merges(loaded):
    return content_of(loaded)["model"]["merges"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not so that model_type is BPE"),
        ({"model_type": "char"}, "not so that model_type is BPE"),
        ({"byte_fallback": False}, "bytes stand for what is unknown"),
        ({"remove_extra_whitespaces": True}, "spaces are kept"),
        ({"normalization_rule_name": "nmt_nfkc"}, "texts are not normalised"),
        ({"add_dummy_prefix": False}, "a space is put before a text"),
        ({"user_defined_symbols": ["<mask>"]}, "each piece is a normal, unknown, control or byte"),
        ({"bos_id": -1}, "bos and eos have an id"),
        ({"eos_id": -1}, "bos and eos have an id"),
    ],
    ids=str,
)
def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path, options, message):
    file = write_sentencepiece(tmp_path / "other.model", 400, **options)
    with pytest.raises(UserError, match=f"other.model: is a sentencepiece model.*{message}"):
        load(file)


def test_each_difference_of_kind_is_told_at_once(tmp_path):
    file = write_sentencepiece(
        tmp_path / "other.model", 400, add_dummy_prefix=False, remove_extra_whitespaces=True
    )
    with pytest.raises(UserError, match="a space is put before a text, nor that spaces are kept"):
        load(file)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"PK\x03\x04", b"\x80\x02}q\x00.", b"a b c\n", b"\xff" * 99]
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is no tokenizer of a Llama model|of another kind"):
        load(file)


def test_a_cut_model_is_refused(pieces, tmp_path):
    content = pieces.read_bytes()
    file = tmp_path / "tokenizer.model"
    for kept in (0.2, 0.5, 0.9, 0.99):
        file.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(UserError):
            load(file)


def no_prefix(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def a_piece_more(content):
    content["model"]["merges"].append(["<", "s>"])


def two_ids_exchanged(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁of"] = vocabulary["▁of"], vocabulary["▁the"]


def a_word_less(content):
    kept = [pair for pair in content["model"]["merges"] if "".join(pair) != "▁the"]
    content["model"]["merges"] = kept


TAMPERED = {
    "no prefix": no_prefix,
    "no bytes": lambda content: content["model"].update(byte_fallback=False),
    "merges in another order": lambda content: content["model"]["merges"].reverse(),
    "no merges": lambda content: content["model"].update(merges=[]),
    "a word less": a_word_less,
    "two ids exchanged": two_ids_exchanged,
    "a control piece that text can reach": a_piece_more,
    "normalised": lambda content: content.update(normalizer={"type": "NFKC"}),
    "lower case": lambda content: content.update(normalizer={"type": "Lowercase"}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tokenizer_that_gives_other_ids_is_found(confusing, what, monkeypatch):
    monkeypatch.setattr(meta_tokenizer, "STRINGS", 2000)
    loaded = load(confusing)
    content = content_of(loaded)
    TAMPERED[what](content)
    backend = Tokenizer.from_str(json.dumps(content))
    changed = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(RunFailed, match=r"tokenizer.model: '.*' has ids .*, and .* once converted"):
        check_same_ids(replace(loaded, converted=changed), confusing)


def test_one_that_is_not_tampered_with_passes(confusing):
    assert check_same_ids(load(confusing), confusing) == 10_000
