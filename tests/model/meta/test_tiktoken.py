"""The tokenizer of Llama 3: the ids that its ranks define, and special tokens in their places."""

import base64
import inspect
import itertools
import json
from dataclasses import replace

import pytest
import regex
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from recipe import convert
from recipe.model.meta import tokenizer as meta_tokenizer
from recipe.model.meta.tokenizer import check_same_ids, load_tokenizer
from recipe.settings import RunFailed, UserError
from tests.model.meta.files import tiny_llama, write_ranks, write_shards
from tests.model.meta.texts import WORDS, hard_texts

TEXTS = list(hard_texts(3000, seed=1))
# Of the stock converter for Llama 3.
PATTERN = inspect.signature(TikTokenConverter).parameters["pattern"].default


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Ranks in the order in which byte pairs were joined in a text, as they come about."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=list(bytes_to_unicode().values()), show_progress=False
    )
    tokenizer.train_from_iterator([*hard_texts(2000, seed=2), WORDS], trainer)
    number_of = {letter: number for number, letter in bytes_to_unicode().items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes([n]) for n in range(256)]
    tokens += [bytes(number_of[c] for c in word) for word, _ in by_id if len(word) > 1]
    file = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(tokens)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module", params=["trained", "ranks"])
def file(request):
    return request.getfixturevalue(request.param)


def tokens_of(file):
    return [base64.b64decode(line.split()[0]) for line in file.read_bytes().splitlines()]


def slow_ids(text, number_of):
    """For each word, the lowest-ranked pair at its first place, until none is left."""
    ids = []
    for match in regex.finditer(PATTERN, text):
        word = match.group().encode()
        cuts = list(range(len(word) + 1)) if word not in number_of else [0, len(word)]
        while True:
            ranked = [
                (number_of[word[start:end]], middle)
                for start, middle, end in zip(cuts, cuts[1:], cuts[2:], strict=False)
                if word[start:end] in number_of
            ]
            if not ranked:
                break
            cuts.remove(min(ranked)[1])
        ids += [number_of[word[a:b]] for a, b in itertools.pairwise(cuts)]
    return ids


@pytest.fixture(scope="module")
def number_of(file):
    return {token: rank for rank, token in enumerate(tokens_of(file))}


@pytest.fixture(scope="module")
def reloaded(file, number_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    size = len(number_of) + 256
    model = tiny_llama(vocab_size=size, num_hidden_layers=1)
    write_shards(model, folder / "meta", params={"vocab_size": size})
    convert.main([str(folder / "meta"), str(folder / "model"), "--tokenizer", str(file)])
    return AutoTokenizer.from_pretrained(folder / "model")


def load(file, *, later=False, instruct=False):
    return load_tokenizer(file, later=later, instruct=instruct)


def test_texts_have_the_ids_of_a_slow_loop(file, number_of):
    loaded = load(file)
    found = loaded.converted(TEXTS, add_special_tokens=False, split_special_tokens=True)
    for text, ids in zip(TEXTS, found["input_ids"], strict=True):
        expected = slow_ids(text, number_of)
        assert ids == expected, repr(text)
        assert loaded.original(text) == expected, repr(text)


def test_texts_have_them_once_the_folder_is_loaded(reloaded, number_of):
    found = reloaded(TEXTS, split_special_tokens=True)["input_ids"]
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids == [len(number_of), *slow_ids(text, number_of)], repr(text)


def test_ids_become_the_text_again(reloaded, number_of):
    for text in TEXTS:
        assert reloaded.decode(slow_ids(text, number_of)) == text


def test_texts_have_the_ids_of_tiktoken(file, number_of):
    tiktoken = pytest.importorskip("tiktoken")
    stock = tiktoken.Encoding(
        "llama3", pat_str=PATTERN, mergeable_ranks=number_of, special_tokens={}
    )
    loaded = load(file)
    for text in TEXTS:
        assert loaded.original(text) == stock.encode_ordinary(text), repr(text)


def names(file, **options):
    """By their place after the ranks."""
    converted = load(file, **options).converted
    count = len(tokens_of(file))
    return [converted.convert_ids_to_tokens(count + place) for place in range(256)]


# As in the published tokenizer_config.json, of which the first is 128000.
LLAMA_3 = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>", 4: "<|reserved_special_token_2|>",
    5: "<|reserved_special_token_3|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
    8: "<|reserved_special_token_4|>", 9: "<|eot_id|>", 10: "<|reserved_special_token_5|>",
    255: "<|reserved_special_token_250|>",
}  # fmt: skip
LLAMA_3_1 = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>", 4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
    8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>", 11: "<|reserved_special_token_3|>",
    255: "<|reserved_special_token_247|>",
}  # fmt: skip


@pytest.mark.parametrize(("later", "expected"), [(False, LLAMA_3), (True, LLAMA_3_1)])
def test_special_tokens_are_in_their_places(ranks, later, expected):
    found = names(ranks, later=later)
    assert {place: found[place] for place in expected} == expected
    assert len(set(found)) == 256
    loaded = load(ranks, later=later)
    assert loaded.size == len(loaded.converted) == 512 + 256
    for place, name in enumerate(found):
        assert loaded.converted(name, add_special_tokens=False).input_ids == [512 + place]
        assert loaded.converted.decode([512 + place], skip_special_tokens=True) == ""


def test_bos_and_eos_are_those_of_llama_3(ranks):
    base, instruct = load(ranks), load(ranks, instruct=True)
    assert (base.converted.bos_token_id, base.converted.eos_token_id) == (512, 513)
    assert (instruct.converted.bos_token_id, instruct.converted.eos_token_id) == (512, 521)


def test_what_looks_special_in_a_text_is_text(reloaded, number_of):
    for name in [*LLAMA_3.values(), *LLAMA_3_1.values()]:
        ids = reloaded(f"a{name}b", split_special_tokens=True).input_ids
        assert ids[0] == len(number_of)
        assert max(ids[1:]) < len(number_of)


def rewritten(file, tmp_path, change):
    lines = file.read_bytes().splitlines()
    other = tmp_path / "other.model"
    other.write_bytes(b"\n".join(change(lines)))
    return other


BROKEN = {
    "a rank twice": lambda lines: [*lines, lines[-1].split()[0][:-4] + b"QUJD 511"],
    "a rank left out": lambda lines: [*lines[:300], *lines[301:]],
    "a byte left out": lambda lines: [*lines[:65], *lines[66:]],
    "a negative rank": lambda lines: [*lines[:-1], lines[-1].split()[0] + b" -1"],
    "another beginning": lambda lines: lines[5:],
    "a token twice": lambda lines: [*lines, lines[300].split()[0] + b" 512"],
}


@pytest.mark.parametrize("what", BROKEN)
def test_ranks_that_are_not_whole_are_refused(ranks, tmp_path, what):
    other = rewritten(ranks, tmp_path, BROKEN[what])
    with pytest.raises(UserError, match=r"other.model: has ranks that are not 0, 1, 2"):
        load(other)


@pytest.mark.parametrize("line", [b"Kg==", b"*** 512", b"Kg== x", b"Kg== 1 2", b"Kg 512"])
def test_a_line_that_is_no_rank_is_refused(ranks, tmp_path, line):
    other = rewritten(ranks, tmp_path, lambda lines: [*lines, line])
    with pytest.raises(UserError, match=r"other.model: is no tokenizer of a Llama model"):
        load(other)


def test_a_byte_can_have_any_rank(ranks, tmp_path):
    lines = [line.split()[0] for line in ranks.read_bytes().splitlines()]
    lines[10:256] = reversed(lines[10:256])
    other = tmp_path / "other.model"
    other.write_bytes(b"".join(b"%b %d\n" % (line, rank) for rank, line in enumerate(lines)))
    number_of = {token: rank for rank, token in enumerate(tokens_of(other))}
    assert load(other).converted("the in", add_special_tokens=False).input_ids == slow_ids(
        "the in", number_of
    )


def two_ids_exchanged(content):
    vocabulary = content["model"]["vocab"]
    one, other = (next(k for k, n in vocabulary.items() if n == rank) for rank in (260, 261))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


TAMPERED = {
    "merges in another order": lambda content: content["model"]["merges"].reverse(),
    "no merges": lambda content: content["model"].update(merges=[], ignore_merges=False),
    "two ids exchanged": two_ids_exchanged,
    "digits together": lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"Regex": PATTERN.replace(r"\p{N}{1,3}", r"\p{N}+")}
    ),
    "a space before": lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(
        add_prefix_space=True
    ),
    "normalised": lambda content: content.update(normalizer={"type": "NFC"}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tokenizer_that_gives_other_ids_is_found(trained, what, monkeypatch):
    monkeypatch.setattr(meta_tokenizer, "STRINGS", 2000)
    loaded = load(trained)
    content = json.loads(loaded.converted.backend_tokenizer.to_str())
    TAMPERED[what](content)
    backend = Tokenizer.from_str(json.dumps(content))
    changed = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    with pytest.raises(RunFailed, match=r"tokenizer.model: .* has ids .*, and .* once converted"):
        check_same_ids(replace(loaded, converted=changed), trained)


def test_ranks_of_the_size_of_a_published_vocabulary_load(tmp_path):
    file = write_ranks(tmp_path / "tokenizer.model", 48_896)
    loaded = load(file)
    assert loaded.size == 49_152
    number_of = {token: rank for rank, token in enumerate(tokens_of(file))}
    for text in TEXTS[:300]:
        found = loaded.converted(text, add_special_tokens=False, split_special_tokens=True)
        assert found.input_ids == slow_ids(text, number_of)
