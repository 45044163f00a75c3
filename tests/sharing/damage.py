"""Ways to damage an adapter, or the base that it is put on."""

import json
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.model.fingerprint import tensors_sha256
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT
from recipe.sharing.tensors import WEIGHTS
from tests.untrusted.payload import edit, reseal

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


def tensors(change: Callable[[Tensors], Tensors], file: str = WEIGHTS) -> Damage:
    """Write the tensors that ``change`` makes of those in the folder's file."""

    def damage(folder: Path) -> None:
        made = change(load_file(folder / file))
        whole = {name: tensor.contiguous().clone() for name, tensor in made.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})

    return damage


def each(part: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS) -> Damage:
    """Change every tensor whose name holds ``part``."""
    return tensors(lambda old: {n: change(t) if part in n else t for n, t in old.items()}, file)


def first_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put ``value`` where the first one is."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def next_float(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest change that one value can have."""
    return first_value(torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0)).item())(tensor)


def noise(tensor: torch.Tensor) -> torch.Tensor:
    """As large as what was there."""
    generator = torch.Generator().manual_seed(0)
    return tensor.std() * torch.randn(tensor.shape, generator=generator)


def rounded(tensor: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Each value to ``bits`` significant bits."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def renamed(pattern: str, by: str) -> Damage:
    return tensors(lambda old: {re.sub(pattern, by, name): t for name, t in old.items()})


def exchanged(one: str, other: str, among: str = "") -> Damage:
    """Swap the names ``one`` and ``other`` in every name that holds ``among``."""
    swap = {one: other, other: one}

    def name_of(name: str) -> str:
        if among not in name:
            return name
        return re.sub(f"{one}|{other}", lambda found: swap[found[0]], name)

    return tensors(lambda old: {name_of(name): tensor for name, tensor in old.items()})


def without(part: str) -> Damage:
    return tensors(lambda old: {name: t for name, t in old.items() if part not in name})


def cropped(rank: int) -> Damage:
    """A and B of a lower rank."""
    return tensors(
        lambda old: {n: t[:rank] if "lora_A" in n else t[:, :rank] for n, t in old.items()}
    )


def config(**values: Any) -> Damage:
    return lambda folder: edit(folder / ADAPTER_CONFIG, **values)


def config_and_proof(**values: Any) -> Damage:
    """What was trained is rewritten too, so that only the answers can tell."""

    def damage(folder: Path) -> None:
        config(**values)(folder)
        receipt(lambda held: held["proof"]["lora"].update(values))(folder)

    return damage


def receipt(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = json.loads((folder / RECEIPT).read_text())
        change(held)
        (folder / RECEIPT).write_text(json.dumps(held))

    return damage


def of_proof(**values: Any) -> Damage:
    return receipt(lambda held: held["proof"].update(values))


def of_base(**values: Any) -> Damage:
    return receipt(lambda held: held["base"].update(values))


def probe(change: Callable[[dict[str, Any]], object], number: int = -1) -> Damage:
    """Change one of the probes; the last unless said, because the first is seen most easily."""
    return receipt(lambda held: change(held["proof"]["probes"][number]))


def moved(key: str, by: float) -> Damage:
    """Move one stored logit of the last probe."""
    return probe(lambda held: held.update({key: [held[key][0] + by, *held[key][1:]]}))


def reseal_with_proof(folder: Path) -> None:
    """All hashes made anew, the proof's of the tensors too: only what it answers is left."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        found = tensors_sha256(dict(sorted(load_file(folder / WEIGHTS).items())))
        of_proof(weights_sha256=found)(folder)
    reseal(folder)


def also(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str, at: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:at])


def flipped_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def removed(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(pickle.dumps({}))


def as_pickle_only(folder: Path) -> None:
    """The same tensors, as peft wrote them long ago."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def another_base(seed: int = 0, **values: Any) -> Damage:
    """The weights of a base made anew, with the tokenizer that was there."""

    def damage(folder: Path) -> None:
        held = LlamaConfig.from_pretrained(folder)
        held.update(values)
        torch.manual_seed(seed)
        LlamaForCausalLM(held).save_pretrained(folder)

    return damage


def base_saved_as(dtype: torch.dtype) -> Damage:
    """In another precision, which its config says."""

    def damage(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(folder)
        model.to(dtype).save_pretrained(folder)

    return damage


def base_config(**values: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", **values)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        change(held)
        (folder / "tokenizer.json").write_text(json.dumps(held))

    return damage


def permuted(held: dict[str, Any]) -> None:
    """Two tokens of the vocabulary change places."""
    ids = held["model"]["vocab"]
    one, other = (token for token, number in ids.items() if number in (300, 301))
    ids[one], ids[other] = ids[other], ids[one]
