"""Checkpoints of hundreds of megabytes: the starter, there and back, and the memory it takes."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe import convert
from recipe.model.meta import tokenizer as meta_tokenizer
from recipe.sealed import damage
from tests.conftest import REPOSITORY
from tests.model.meta.files import (
    COLUMNS,
    ROWS,
    edit_shard,
    greedy,
    shard_file,
    tiny_llama,
    write_ranks,
    write_shards,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(starter):
    return LlamaForCausalLM.from_pretrained(starter, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[(1, ROWS, "twice"), (3, COLUMNS, "once")], ids=str)
def folder(request, original, tmp_path_factory):
    """9 heads of queries and 3 of keys in 3 shards; the tied embedding written once or twice."""
    shards, embedding, written = request.param
    place, config = tmp_path_factory.mktemp("starter"), original.config
    params = {
        "vocab_size": config.vocab_size,
        "n_kv_heads": config.num_key_value_heads,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    meta = write_shards(original, place / "meta", shards=shards, embedding=embedding, params=params)
    if written == "once":
        for number in range(shards):
            edit_shard(meta, number, lambda tensors: tensors.pop("output.weight"))
    write_ranks(meta / "tokenizer.model", config.vocab_size - 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_tokenizer, "STRINGS", 1000)
        convert.main([str(meta), str(place / "model")])
    return place / "model"


def test_the_starter_comes_back_as_it_was(folder, original):
    assert damage(folder) == []
    found = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    expected = original.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert found.config.tie_word_embeddings
    assert found.config.rope_parameters == original.config.rope_parameters
    assert found.config.max_position_embeddings == 8192
    facts = json.loads((folder / "conversion.json").read_text())
    assert facts["parameters"] == 134_515_008
    assert "its shape is that of HuggingFaceTB/SmolLM2-135M-Instruct" in facts["notes"]
    assert facts["proof"]["same_next"] == facts["proof"]["positions"]


def test_the_starter_says_the_same(folder, original):
    ids = torch.randint(49_152, (100, 6), generator=torch.Generator().manual_seed(0))
    found = LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ours, theirs = greedy(found, ids), greedy(original, ids)
    assert ours.shape == (100, 26)
    assert torch.equal(ours, theirs)


AT_THE_END = """
import sys
from pathlib import Path
from recipe import convert
from recipe.model.meta import tokenizer
tokenizer.STRINGS = 500
convert.main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def peak(meta, destination):
    """Resident bytes, at most, of a process that converts."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, str(meta), str(destination)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is of Linux")
@pytest.mark.parametrize("embedding", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_one_shard_and_not_four_is_in_memory(tmp_path, embedding):
    write_ranks(tmp_path / "tokenizer.model", 512)
    peaks = {}
    for name, shape in {
        "tiny": {"hidden_size": 64, "intermediate_size": 192},
        "large": {
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 9,
            "initializer_range": 0.02,
        },
    }.items():
        meta = write_shards(
            tiny_llama(**shape), tmp_path / name, shards=4, embedding=embedding,
            params={"vocab_size": 768},
        )  # fmt: skip
        peaks[name] = peak(meta, tmp_path / f"{name}-model")
    shard = shard_file(tmp_path / "large", 0).stat().st_size
    more = peaks["large"] - peaks["tiny"]
    print(
        f"shard {shard / 1e6:.0f} MB, difference {more / 1e6:.0f} MB of {peaks['large'] / 1e6:.0f}"
    )
    assert shard > 110e6
    assert more < 1.5 * shard
