"""Shards that would execute code, or lie about where their tensors are."""

import builtins
import os
import pickle
import struct
import zipfile
from contextlib import suppress

import pytest
import torch

from recipe import convert
from tests.model.meta.files import as_torch_1_wrote_it, edit_shard, repack, shard_file
from tests.untrusted.payload import Payload, pickled, watched, zipped

QUERIES = "layers.0.attention.wq.weight"
UNREADABLE = "not readable as a file of tensors alone"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture(autouse=True)
def nothing_runs(marker, monkeypatch):
    with watched(marker, monkeypatch):
        yield


class Called:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_its_pickle(value):
    """A shard whose zip is torch's, and whose table is a pickle by Python itself."""

    def write(file):
        def change(records):
            name = next(name for name in records if name.endswith("/data.pkl"))
            records[name] = pickle.dumps(value, protocol=2)

        repack(file, change)

    return write


def among_tensors(value):
    def write(file):
        tensors = torch.load(file, weights_only=True)
        torch.save({**tensors, "payload": value}, file)

    return write


KINDS = ["pickle", "torch.save", "among tensors", "eval", "exec", "mkdir", "system"]


def payloads(marker):
    text = f"__import__('os').mkdir({str(marker)!r})"
    yield "pickle", lambda file: pickled(file.parent, marker, file.name)
    yield "torch.save", lambda file: zipped(file.parent, marker, file.name)
    yield "among tensors", among_tensors(Payload(marker))
    yield "eval", among_tensors(Called(builtins.eval, text))
    yield "exec", in_its_pickle(Called(builtins.exec, text))
    yield "mkdir", in_its_pickle({QUERIES: Payload(marker)})
    yield "system", in_its_pickle(Called(os.system, f"mkdir {marker}"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_would_run_code_is_refused(small, refused, marker, kind, shard):
    folder = small()
    dict(payloads(marker))[kind](shard_file(folder, shard))
    message = refused(folder, UNREADABLE)
    assert message.startswith(str(shard_file(folder, shard)))


def test_each_payload_would_run(small, marker):
    """The control: without weights_only the marker is there."""
    file = shard_file(small(), 0)
    original = file.read_bytes()
    for _, write in payloads(marker):
        file.write_bytes(original)
        write(file)
        with suppress(RuntimeError):  # a pickle that torch has not written
            torch.load(file, weights_only=False)
        marker.rmdir()


def test_a_tokenizer_that_is_a_pickle_is_refused(small, refused, marker):
    folder = small()
    pickled(folder, marker, "tokenizer.model")
    refused(folder, "tokenizer.model: is no tokenizer of a Llama model")


def record_of(records, name="/data/0"):
    return next(key for key in records if key.endswith(name))


def shortened(name, kept):
    def change(records):
        as_torch_1_wrote_it(records)
        records[record_of(records, name)] = records[record_of(records, name)][:kept]

    return change


@pytest.mark.parametrize("name", ["/data/0", "/data/3", "/data/11"])
@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_tensor_larger_than_its_record_is_refused(small, refused, name, kept):
    """Its bytes would be those of what comes next in the file, or lie behind its end."""
    folder = small()
    repack(shard_file(folder, 1), shortened(name, kept))
    message = refused(folder, "does not lie where torch writes it")
    assert message.startswith(f"{shard_file(folder, 1)}: ")


def test_a_storage_that_claims_more_than_the_file_has_is_refused(small, refused):
    folder = small(shards=1)
    edit_shard(folder, 0, lambda tensors: tensors.update({"norm.weight": torch.ones(40_000)}))

    def change(records):
        as_torch_1_wrote_it(records)
        name = next(key for key, content in records.items() if len(content) == 160_000)
        records[name] = records.pop(name)[:256]  # the last in the file

    repack(shard_file(folder, 0), change)
    refused(folder, "norm.weight: does not lie where torch writes it")


def test_a_zip_that_claims_a_record_beyond_its_end_is_refused(small, refused):
    """In the table at the end of the file, which is what is believed."""
    folder = small(shards=1)
    file = shard_file(folder, 0)
    repack(file, shortened("/data/11", 16))
    with zipfile.ZipFile(file) as archive:
        start, name = archive.start_dir, record_of(archive.namelist(), "/data/11")
    content = bytearray(file.read_bytes())
    entry = content.index(name.encode(), start) - 46
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**30, 2**30)
    file.write_bytes(content)
    refused(folder, f"{UNREADABLE}|does not lie where")


def test_records_that_another_program_packed_are_refused(small, refused):
    """torch counts together where they lie, and is wrong: it would be other numbers."""
    folder = small()
    repack(shard_file(folder, 1))
    refused(folder, "does not lie where torch writes it")


def test_records_in_another_order_are_refused(small, refused):
    folder = small()

    def change(records):
        for name in sorted(records, reverse=True):
            records[name] = records.pop(name)

    repack(shard_file(folder, 0), change)
    refused(folder, "its tensors are not in the order in which torch writes them")


def test_a_missing_record_is_refused(small, refused):
    folder = small()
    repack(shard_file(folder, 0), lambda records: records.pop(record_of(records, "/data/2")))
    refused(folder, UNREADABLE)


def test_numbers_in_the_other_order_of_bytes_are_refused(small, refused):
    """torch would turn them, in memory that is not there, and Python would die."""
    folder = small()
    repack(shard_file(folder, 1), lambda records: records.update({ORDER: b"big"}))
    refused(folder, "not in little-endian order")


ORDER = "consolidated.01/byteorder"
NO_PLAIN_TENSORS = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "turned round": lambda x: x.T.contiguous().T,
    "of negated values": torch._neg_view,
    "without memory": lambda x: x.to("meta"),
    "one value, repeated": lambda x: torch.ones(1, 1).expand(x.shape),
    "complex": lambda x: x + 0j,
    "a number": lambda x: 3.0,
    "a list": lambda x: [x],
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", NO_PLAIN_TENSORS)
def test_what_is_no_plain_tensor_is_refused(small, refused, kind):
    folder = small()
    change = NO_PLAIN_TENSORS[kind]
    edit_shard(folder, 0, lambda tensors: tensors.update({QUERIES: change(tensors[QUERIES])}))
    refused(folder, r"consolidated.00.pth")


@pytest.mark.parametrize("held", [[], {}, [torch.ones(3)], torch.ones(3), {3: torch.ones(3)}, None])
def test_what_is_no_table_of_tensors_is_refused(small, refused, held):
    folder = small()
    torch.save(held, shard_file(folder, 0))
    refused(folder, r"consolidated.00.pth.*(is no table of tensors|is no tensor)")


def test_a_shard_that_is_a_folder_is_refused(small, refused):
    folder = small()
    shard_file(folder, 1).unlink()
    shard_file(folder, 1).mkdir()
    refused(folder, UNREADABLE)


def test_a_whole_one_is_accepted_here_too(small, tmp_path):
    convert.main([str(small()), str(tmp_path / "model")])
