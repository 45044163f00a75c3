"""A GGUF file becomes a whole folder or one line, whatever its metadata and lengths claim."""

import json
import struct

import numpy as np
import pytest
from gguf import GGUFWriter

from recipe.convert import main as convert
from recipe.data.templates import build_template
from recipe.model.checkpoint import load_base, load_tokenizer
from recipe.settings import ModelSettings, RunFailed
from tests.conftest import build_tokenizer

pytestmark = pytest.mark.usefixtures("nothing_runs")
TEMPLATE = "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}"
WIDTH, HEADS = 32, 2


def tensors(vocabulary):
    ones = np.ones(WIDTH, dtype=np.float32)
    rows = np.random.default_rng(0).normal(size=(vocabulary, WIDTH)).astype(np.float32)
    square, wide = rows[:WIDTH], rows[: 2 * WIDTH]
    return {
        "token_embd.weight": rows,
        "output.weight": rows,
        "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": wide,
        "blk.0.ffn_up.weight": wide,
        "blk.0.ffn_down.weight": np.ascontiguousarray(wide.T),
    }


def write(
    file,
    *,
    architecture="llama",
    template="{{ messages }}",
    change=lambda tensors: None,
    more=lambda writer: None,
):
    """A Llama model of one layer with the tests' tokenizer."""
    tokenizer = json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer = GGUFWriter(file, architecture)
    writer.add_name("../../evil")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(template)
    more(writer)
    content = tensors(len(tokens))
    change(content)
    for name, values in content.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_template_in_the_metadata_stays_text(tmp_path, marker, refused):
    template = TEMPLATE.replace("MARK", repr(str(marker)))
    file = write(tmp_path / "evil.gguf", template=template)
    convert([str(file), str(tmp_path / "model")])
    settings = ModelSettings(name_or_path=str(tmp_path / "model"))
    tokenizer = load_tokenizer(settings)
    assert tokenizer.chat_template == template
    assert load_base(settings).config.num_hidden_layers == 1
    refused(lambda: build_template("chat", tokenizer).prompt("hello"))
    assert {path.name for path in tmp_path.iterdir()} == {"evil.gguf", "model"}


@pytest.mark.parametrize("architecture", ["qwen2", "evil", "../llama", "bert"])
def test_another_architecture_is_refused(tmp_path, refused, architecture):
    file = write(tmp_path / "evil.gguf", architecture=architecture)
    refused(convert, [str(file), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def header(*pairs, tensors=0, count=None):
    number = len(pairs) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, number) + b"".join(pairs)


LLAMA = pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
LIES = {
    "empty": b"",
    "only its magic": b"GGUF",
    "another magic": b"PK\x03\x04" + b"\0" * 100,
    "2**63 pairs": header(LLAMA, count=2**63),
    "2**63 tensors": header(LLAMA, tensors=2**63),
    "a text of 2**63 letters": header(pair(b"a", 8, struct.pack("<Q", 2**63))),
    "2**62 numbers": header(LLAMA, pair(b"a", 9, struct.pack("<IQ", 0, 2**62))),
    "2**62 texts": header(LLAMA, pair(b"a", 9, struct.pack("<IQ", 8, 2**62))),
    "lists in lists": header(LLAMA, pair(b"a", 9, struct.pack("<IQ", 9, 1) * 2000)),
    "another kind of value": header(LLAMA, pair(b"a", 99, b"")),
    "a key that is no UTF-8": header(pair(b"\xff", 4, struct.pack("<I", 1))),
    "no architecture": header(pair(b"a", 4, struct.pack("<I", 1))),
    "an architecture that is a number": header(
        pair(b"general.architecture", 4, struct.pack("<I", 1))
    ),
    "nothing but an architecture": header(LLAMA),
    "a tensor of 2**31 dimensions": header(
        LLAMA, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31), tensors=1, count=1
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_lengths_is_refused(tmp_path, refused, lie):
    (tmp_path / "evil.gguf").write_bytes(LIES[lie])
    refused(convert, [str(tmp_path / "evil.gguf"), str(tmp_path / "model")])
    assert {path.name for path in tmp_path.iterdir()} == {"evil.gguf"}


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, 0.99])
def test_a_cut_file_is_refused(tmp_path, refused, kept):
    file = write(tmp_path / "evil.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    refused(convert, [str(file), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


Q = "blk.0.attn_q.weight"


def renamed(content):
    content["blk.0.evil.weight"] = content.pop(Q)


def not_finite(content):
    content[Q] = np.full_like(content[Q], np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(Q), "does not give .*q_proj"),
        (renamed, "does not give .*q_proj"),  # as many parameters, and one of them made up
        (lambda content: content.update({"blk.0.evil.weight": content[Q]}), "parameters"),
        (not_finite, "not finite"),
    ],
)
def test_a_parameter_is_never_made_up(tmp_path, change, message):
    file = write(tmp_path / "evil.gguf", change=change)
    with pytest.raises(RunFailed, match=message):
        convert([str(file), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()
