"""The models that lessons measure: the one that is given, or a tiny Llama."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.model.checkpoint import load_base
from recipe.settings import ModelSettings, Problem, UserError
from recipe.sharing.adapter_folder import load_adapter

_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "use_cache": False,
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU inside depend on ``seed`` alone; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed a GPU too.
        torch.default_generator.manual_seed(seed)
        yield


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Two layers of width 64 with random float32 weights."""
    with seeded(seed):
        return LlamaForCausalLM(LlamaConfig(**_TINY))


def random_ids(model: LlamaForCausalLM, *, rows: int, tokens: int, seed: int) -> torch.Tensor:
    """int64 (rows, tokens), any of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)


def given_model(folder: Path, *, dtype: Literal["auto", "float32"] = "auto") -> LlamaForCausalLM:
    """The checkpoint in ``folder`` on the CPU, with stock attention.

    Raises:
        UserError: it is no LlamaForCausalLM checkpoint in safetensors.
    """
    with of_option("--model"), seeded(0):
        settings = ModelSettings(name_or_path=str(folder), dtype=dtype, attn_implementation="sdpa")
        return load_base(settings)


def adapted_model(model: Path, adapter: Path) -> PeftModel:
    """The adapter in ``adapter`` on the checkpoint in ``model``.

    Raises:
        UserError: one of the two is not what it should be, or they do not belong together.
    """
    base = given_model(model)
    with of_option("--adapter"), seeded(0):  # peft draws numbers before it reads the adapter's
        return load_adapter(base, adapter)


@contextmanager
def of_option(option: str) -> Iterator[None]:
    """Here folders are named by options, not by keys of a config."""
    try:
        yield
    except UserError as error:
        raise UserError(Problem(option, each.message) for each in error.problems) from error
