"""What a folder of Meta's holds, opened and checked, before anything is written."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from recipe.model.meta.forward import SCALE, frequencies
from recipe.model.meta.layout import Entry, Params, Split, load_params
from recipe.model.meta.shards import Shard, open_shards
from recipe.model.meta.tokenizer import MetaTokenizer, load_tokenizer
from recipe.settings import UserError

_FREQUENCIES = "rope.freqs"  # of Llama 1's 7B, in each layer
_LIST = "checklist.chk"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Source:
    folder: Path
    params: Params
    shards: Sequence[Shard]
    tokenizer: MetaTokenizer
    vocab_size: int
    embedding: Split
    sha256: Mapping[str, str]  # of each file, by its name

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype("norm.weight")


def opened(folder: Path, tokenizer: Path | None, *, instruct: bool) -> Source:
    """Everything that ``folder`` has, checked against its own params.json.

    Raises:
        UserError: the files are not whole, or none of a Llama 1, 2 or 3 text model.
    """
    params = load_params(folder / "params.json")
    shards = open_shards(folder)
    files = [shard.file for shard in shards]
    beside = next(
        (path for path in (folder, folder.parent) if (path / "tokenizer.model").is_file()), folder
    )
    named = tokenizer or beside / "tokenizer.model"
    loaded = load_tokenizer(named, later=params.use_scaled_rope, instruct=instruct)
    vocab_size = loaded.size if params.vocab_size == -1 else params.vocab_size
    if vocab_size != loaded.size:
        raise UserError.single(
            str(folder / "params.json"),
            f"has a vocab_size of {vocab_size:,}, but the tokenizer has {loaded.size:,} ids. Name "
            "the tokenizer of this model by --tokenizer.",
        )
    embedding = _embedding(params, shards, vocab_size)
    found = Source(folder, params, shards, loaded, vocab_size, embedding, {})
    _check_tensors(found)
    # Last, as it reads every byte.
    return replace(found, sha256=_checked_sums(folder, [folder / "params.json", named, *files]))


def _listed(folder: Path) -> Mapping[str, str]:
    """Meta's own list, where it was fetched too: a file's name → its MD5, or SHA-256."""
    file = folder / _LIST
    if not file.is_file():
        return {}
    listed = {}
    for line in file.read_text(errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        listed[Path(name.lstrip(" *")).name] = digest.lower()
    for name in listed:
        # tokenizer.model may lie beside the folder.
        if name.endswith(".pth") and not (folder / name).is_file():
            raise UserError.single(
                str(folder / name), f"is listed in {_LIST}, but missing. Fetch it."
            )
    return listed


def _checked_sums(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file; those that are listed are the ones that the list means."""
    listed, found = _listed(folder), {}
    for file in tqdm(files, "files hashed", disable=None, leave=False):
        sha256, md5 = _digests(file)
        expected = listed.get(file.name) if file.parent == folder else None
        if expected not in (None, md5, sha256):
            kind = "SHA-256" if len(expected or "") == len(sha256) else "MD5"
            raise UserError.single(
                str(file), f"is not the file that {_LIST} lists by its {kind}. Fetch it again."
            )
        found[file.name] = sha256
    return found


def _digests(file: Path) -> tuple[str, str]:
    """SHA-256 and MD5, in one reading."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            md5.update(chunk)
    return sha256.hexdigest(), md5.hexdigest()


def _embedding(params: Params, shards: Sequence[Shard], vocab_size: int) -> Split:
    name = "tok_embeddings.weight"
    shape = shards[0].shape(name) if name in shards[0].names else None
    by_rows = (vocab_size // len(shards), params.dim)
    return Split.ROWS if shape == by_rows else Split.COLUMNS


def entries(found: Source) -> Iterator[Entry]:
    """Each tensor of a model with these params.json, an output of its own included."""
    for number in range(found.params.n_layers):
        yield from found.params.layer(number)
    yield from found.params.around(found.vocab_size, found.embedding)


def _check_tensors(found: Source) -> None:
    """Every name and every shape in every shard, before anything is written."""
    count, layers = len(found.shards), found.params.n_layers
    if layers > len(found.shards[0].names):
        raise UserError.single(
            str(found.folder / "params.json"),
            f"has {layers:,} layers, the shards have fewer. Use the params.json of this model.",
        )
    expected = {entry.name: entry for entry in entries(found)}
    tied = not any("output.weight" in shard.names for shard in found.shards)
    if tied:
        del expected["output.weight"]
    for shard in found.shards:
        where, names = str(shard.file), set(shard.names) - set(_frequency_names(shard))
        missing, more = sorted(set(expected) - names), sorted(names - set(expected))
        if missing or more:
            said = f"lacks {missing[0]}" if missing else f"has {more[0]} beside a model's tensors"
            raise UserError.single(where, f"{said}. Use another copy, with its own params.json.")
        for name, entry in expected.items():
            wanted, shape = entry.of_shard(count), shard.shape(name)
            if any(n % count for n in _split_sizes(entry)):
                raise UserError.single(
                    f"{where}: {name}",
                    f"of shape {entry.shape} by params.json cannot be shared by {count} shards. "
                    "Fetch those that are missing.",
                )
            if shape != wanted:
                raise UserError.single(
                    f"{where}: {name}",
                    f"is of shape {shape}, but by params.json shards of {count} have {wanted}. Use "
                    "the params.json and the tokenizer of this model, and all of its shards.",
                )
            if shard.dtype(name) != found.dtype:
                raise UserError.single(
                    f"{where}: {name}",
                    f"is of {shard.dtype(name)}, others of {found.dtype}. Use Meta's own files.",
                )
    _check_frequencies(found)


def _split_sizes(entry: Entry) -> tuple[int, ...]:
    """What is shared out evenly: a side of the tensor, and its heads."""
    if entry.split.value is None:
        return ()
    size = entry.shape[entry.split.value]
    return (size,) if entry.heads is None else (size, entry.heads)


def _check_frequencies(found: Source) -> None:
    """Where a shard brings them, they tell whether params.json has the right rope_theta."""
    # They are kept before or after they are scaled.
    plain = frequencies(replace(found.params, use_scaled_rope=False), SCALE)
    either = plain, frequencies(found.params, SCALE)
    for shard in found.shards:
        for name in _frequency_names(shard):
            held = shard.read(name).float()
            if held.shape != plain.shape or not any(
                torch.allclose(held, one, rtol=0.02, atol=1e-8) for one in either
            ):
                raise UserError.single(
                    f"{shard.file}: {name}",
                    f"are not those of rope_theta={found.params.rope_theta:g} in params.json. "
                    "Correct it.",
                )


def _frequency_names(shard: Shard) -> list[str]:
    return [name for name in shard.names if f".{name}".endswith(f".{_FREQUENCIES}")]
