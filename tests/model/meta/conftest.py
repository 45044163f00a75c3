"""Tokenizers of both kinds, and a small checkpoint to break."""

import pytest
import sentencepiece

from recipe import convert
from recipe.model.meta import tokenizer as meta_tokenizer
from recipe.settings import UserError
from tests.model.meta.files import tiny_llama, write_ranks, write_sentencepiece, write_shards


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A sentencepiece model of 448 pieces."""
    file = write_sentencepiece(tmp_path_factory.mktemp("pieces") / "tokenizer.model", 448)
    assert sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size() == 448
    return file


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """512 ranks, which with Llama 3's special tokens are 768 ids."""
    return write_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model", 512)


@pytest.fixture
def fewer_texts(monkeypatch):
    """For tests of something else than the tokenizer."""
    monkeypatch.setattr(meta_tokenizer, "STRINGS", 100)


@pytest.fixture(scope="session")
def small_llama():
    """One layer of grouped heads, for 768 ids."""
    return tiny_llama(num_hidden_layers=1, num_key_value_heads=4)


@pytest.fixture
def small(tmp_path, small_llama, ranks, fewer_texts):
    """Write it in Meta's layout, its tokenizer beside."""

    def write(shards=2, **params):
        folder = tmp_path / "meta"
        params = {"vocab_size": 768, "n_kv_heads": 4, **params}
        write_shards(small_llama, folder, shards=shards, params=params)
        (folder / "tokenizer.model").write_bytes(ranks.read_bytes())
        return folder

    return write


@pytest.fixture
def refused(tmp_path):
    """Convert as a user does: one error is told, and nothing is left behind."""

    def refused(folder, message, *options, error=UserError):
        before = set(tmp_path.rglob("*"))
        with pytest.raises(error, match=message) as raised:
            convert.main([str(folder), str(tmp_path / "model"), *map(str, options)])
        assert set(tmp_path.rglob("*")) == before
        return str(raised.value)

    return refused
