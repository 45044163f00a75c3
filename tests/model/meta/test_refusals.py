"""What is asserted of shards, broken once each: one line that names it, and no folder."""

import hashlib
import shutil
import zipfile

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe import convert
from tests.model.meta.files import (
    COLUMNS,
    IN_LAYER,
    OUTSIDE,
    ROWS,
    edit_params,
    edit_shard,
    meta_tensors,
    repack,
    shard_file,
    tiny_llama,
    write_ranks,
    write_shards,
)

EACH = pytest.mark.parametrize("name", [*IN_LAYER, *OUTSIDE])
NORMS = ["layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"]
QUERIES = "layers.0.attention.wq.weight"


def change(name, function):
    """For ``edit_shard``: the tensor of this name becomes ``function`` of it."""
    return lambda tensors: tensors.update({name: function(tensors[name])})


def test_what_is_broken_below_is_accepted_whole(small, tmp_path):
    convert.main([str(small()), str(tmp_path / "model")])
    assert (tmp_path / "model/model.safetensors.index.json").is_file()


@EACH
@pytest.mark.parametrize("axis", [0, -1], ids=["longer", "wider"])
def test_another_shape_in_one_shard_is_refused(small, refused, name, axis):
    folder = small()
    edit_shard(folder, 1, change(name, lambda x: torch.cat([x, x.narrow(axis, 0, 1)], axis)))
    message = refused(folder, "is of shape")
    assert message.startswith(f"{shard_file(folder, 1)}: {name}: ")


@pytest.mark.parametrize("name", [*IN_LAYER[:7], "output.weight"])
def test_a_split_along_the_other_axis_is_refused(small, refused, small_llama, name):
    folder = small()
    whole, axis = meta_tensors(small_llama, ROWS)[name]
    for number, part in enumerate(whole.chunk(2, dim=1 - axis)):
        edit_shard(folder, number, lambda tensors, part=part: tensors.update({name: part.clone()}))
    refused(folder, rf"consolidated.00.pth: {name}: is of shape")


@EACH
@pytest.mark.parametrize("shard", [0, 1])
def test_a_missing_tensor_is_refused(small, refused, name, shard):
    folder = small()
    edit_shard(folder, shard, lambda tensors: tensors.pop(name))
    message = refused(folder, f"lacks {name}")
    assert message.startswith(str(shard_file(folder, shard)))


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize(
    "name", ["layers.1.attention.wq.weight", "layers.0.attention.wq.bias", "x", "rope.freqs.weight"]
)
def test_a_tensor_that_no_model_has_is_refused(small, refused, name, shard):
    folder = small()
    edit_shard(folder, shard, lambda tensors: tensors.update({name: torch.ones(2)}))
    message = refused(folder, f"has {name} beside a model's tensors")
    assert message.startswith(str(shard_file(folder, shard)))


@pytest.mark.parametrize("name", [QUERIES, "norm.weight", "output.weight"])
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes_are_refused(small, refused, name, shard, dtype):
    folder = small()
    edit_shard(folder, shard, change(name, lambda x: x.to(dtype)))
    refused(folder, r"is of torch\.\w+, others of torch\.\w+")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool])
def test_a_dtype_of_no_weights_is_refused(small, refused, dtype):
    folder = small()
    edit_shard(folder, 1, change(QUERIES, lambda x: x.to(dtype)))
    message = refused(folder, f"is of {dtype}")
    assert message.startswith(f"{shard_file(folder, 1)}: {QUERIES}: ")


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(small, refused, name, value):
    folder = small(shards=1)

    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    edit_shard(folder, 0, spoil)
    refused(folder, f"{name}: holds values that are not finite")


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_differ_between_shards_are_refused(small, refused, name):
    folder = small(shards=4)
    edit_shard(folder, 3, change(name, lambda x: x + 0.1 * (torch.arange(64) == 63)))
    refused(folder, f"{name}: differs between shards")


def test_norms_that_were_rounded_apart_are_the_first_shards(small, tmp_path):
    folder = small(shards=2)
    name = "layers.0.attention_norm.weight"
    edit_shard(folder, 1, change(name, lambda x: x + 1e-6 * (torch.arange(64) == 63)))
    convert.main([str(folder), str(tmp_path / "model")])
    held = torch.load(shard_file(folder, 0), weights_only=True)[name]
    found = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(found.model.layers[0].input_layernorm.weight, held)


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_missing_shard_is_refused(small, refused, missing):
    folder = small(shards=4)
    shard_file(folder, missing).unlink()
    refused(
        folder,
        f"has 3 shards, but no consolidated.0{missing}.pth" if missing < 3 else "by 3 shards",
    )


def test_a_folder_without_shards_is_refused(small, refused):
    folder = small(shards=1)
    shard_file(folder, 0).unlink()
    refused(folder, "has no consolidated.00.pth")


@pytest.mark.parametrize(("heads", "kv_heads", "shards"), [(8, 1, 2), (8, 2, 4), (2, 2, 4)])
def test_shards_that_would_share_a_head_are_refused(
    tmp_path, ranks, refused, heads, kv_heads, shards
):
    model = tiny_llama(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads)
    params = {"vocab_size": 768, "n_kv_heads": kv_heads}
    folder = write_shards(model, tmp_path / "meta", shards=shards, params=params)
    refused(folder, f"cannot be shared by {shards} shards", "--tokenizer", ranks)


def rope(theta, head_dim=8):
    return torch.tensor([theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)])


# In Llama 2 once, in Llama 1's 7B in each layer.
@pytest.mark.parametrize("name", ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frequencies_that_agree_are_accepted_and_left_out(small, tmp_path, name, dtype):
    folder = small()
    for number in (0, 1):
        edit_shard(folder, number, lambda tensors: tensors.update({name: rope(1e4).to(dtype)}))
    convert.main([str(folder), str(tmp_path / "model")])
    assert b"freqs" not in next((tmp_path / "model").glob("*.safetensors")).read_bytes()


@pytest.mark.parametrize("name", ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs"])
@pytest.mark.parametrize(
    "wrong", [rope(5e5), rope(1.5e4), rope(1e4, 16), rope(1e4)[None], rope(1e4) * float("nan")]
)
def test_frequencies_of_another_theta_are_refused(small, refused, name, wrong):
    folder = small()
    edit_shard(folder, 1, lambda tensors: tensors.update({name: wrong}))
    refused(folder, f"{name}: are not those of rope_theta=10000 in params.json")


def test_frequencies_are_compared_with_the_theta_of_params_json(small, tmp_path):
    folder = small(rope_theta=5e5)
    edit_shard(folder, 0, lambda tensors: tensors.update({"rope.freqs": rope(5e5)}))
    edit_shard(folder, 1, lambda tensors: tensors.update({"rope.freqs": rope(5e5)}))
    convert.main([str(folder), str(tmp_path / "model")])


def listing(folder, form, spoilt=None):
    lines = []
    for file in [*sorted(folder.glob("*.pth")), folder / "params.json"]:
        found = hashlib.md5(file.read_bytes()).hexdigest()
        lines.append(form.format("0" * 32 if file.name == spoilt else found, file.name))
    lines.append(form.format("1" * 32, "absent.model"))
    (folder / "checklist.chk").write_text("\n".join(lines))


@pytest.mark.parametrize("form", ["{}  {}", "{} *{}", "{} {}", "{}  ./{}"])
@pytest.mark.parametrize("spoilt", ["consolidated.00.pth", "consolidated.01.pth", "params.json"])
def test_another_md5_than_that_of_the_checklist_is_refused(small, refused, form, spoilt):
    folder = small()
    listing(folder, form, spoilt)
    refused(folder, rf"{spoilt}: is not the file that checklist.chk lists by its MD5")


def test_the_md5_of_the_checklist_is_accepted(small, tmp_path):
    folder = small()
    listing(folder, "{}  {}")
    convert.main([str(folder), str(tmp_path / "model")])


def test_a_shard_that_the_checklist_lists_must_be_there(small, refused):
    folder = small()
    listing(folder, "{}  {}")
    with (folder / "checklist.chk").open("a") as stream:
        stream.write(f"\n{'2' * 32}  consolidated.02.pth")
    refused(folder, r"consolidated.02.pth: is listed in checklist.chk, but missing")


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_shard_is_refused(small, refused, kept):
    folder = small()
    file = shard_file(folder, 1)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    refused(folder, r"consolidated.01.pth: not readable as a file of tensors alone")


def test_a_compressed_shard_is_refused(small, refused):
    folder = small()
    repack(shard_file(folder, 1), compression=zipfile.ZIP_DEFLATED)
    refused(folder, r"consolidated.01.pth: .*is compressed")


def test_torch_s_old_kind_of_file_is_refused(small, refused):
    folder = small()
    tensors = torch.load(shard_file(folder, 1), weights_only=True)
    torch.save(tensors, shard_file(folder, 1), _use_new_zipfile_serialization=False)
    refused(folder, r"consolidated.01.pth: not readable as a file of tensors alone .*BadZipFile")


def test_a_tokenizer_of_another_size_is_refused(small, refused, pieces, tmp_path):
    folder = small()
    other = write_ranks(tmp_path / "other.model", 500)
    refused(folder, "vocab_size of 768, but the tokenizer has 756 ids", "--tokenizer", other)
    edit_params(folder, vocab_size=-1)
    refused(folder, "tok_embeddings.weight: is of shape", "--tokenizer", other)
    refused(folder, "tok_embeddings.weight: is of shape", "--tokenizer", pieces)


def test_without_a_tokenizer_is_refused(small, refused, tmp_path):
    folder = small()
    (folder / "tokenizer.model").unlink()
    refused(folder, r"tokenizer.model: cannot be read \(No such file")
    refused(folder, r"cannot be read \(Is a directory", "--tokenizer", tmp_path)
    refused(folder, r"absent: cannot be read", "--tokenizer", tmp_path / "absent")


def test_a_tokenizer_in_the_folder_is_taken_before_one_beside_it(small, tmp_path):
    folder = small()
    write_ranks(tmp_path / "tokenizer.model", 500)
    convert.main([str(folder), str(tmp_path / "model")])
    shutil.move(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    convert.main([str(folder), str(tmp_path / "again")])


def test_a_folder_by_columns_is_no_folder_by_rows(tmp_path, small_llama, ranks, refused):
    params = {"vocab_size": 768, "n_kv_heads": 4}
    folder = write_shards(
        small_llama, tmp_path / "meta", shards=2, embedding=COLUMNS, params=params
    )
    edit_shard(folder, 1, change("tok_embeddings.weight", lambda x: x.reshape(384, 64)))
    refused(folder, r"01.pth: tok_embeddings.weight: is of shape", "--tokenizer", ranks)


def test_an_existing_destination_is_not_touched(small, tmp_path, refused):
    folder = small()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("mine")
    refused(folder, "exists. Remove it, or name another")
    assert (tmp_path / "model/mine").read_text() == "mine"
