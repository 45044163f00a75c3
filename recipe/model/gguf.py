"""A GGUF checkpoint → a safetensors folder, counted against the file's own tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

from recipe.sealed import whole_folder
from recipe.settings import RunFailed, UserError


def convert_gguf(source: Path, destination: Path) -> int:
    """Dequantise ``source`` to float32 and write model, tokenizer and chat template.

    Returns:
        The number of parameters.

    Raises:
        UserError: ``source`` is no readable GGUF file of a Llama model.
        RunFailed: the folder would hold another number of parameters, one that the file does not
            give, or one that is not finite.
    """
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with _reading(source):
        # First, because it alone compares each length that the file claims with the file's end.
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    with _reading(source):
        reader = GGUFReader(source)
        architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise UserError.single(
            str(source), f"holds a {architecture!r} model, no 'llama' one. Use another."
        )
    in_file = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if tensor.name != "rope_freqs.weight"  # a constant, no parameter
    )
    with _reading(source):
        model, loading = LlamaForCausalLM.from_pretrained(
            **where,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # or the model cannot be saved
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers fills what is missing with random values, and only warns.
    made_up = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if made_up:
        raise RunFailed(f"{source.name} does not give {', '.join(made_up[:5])} as a model needs it")
    parameters: int = sum(p.numel() for p in model.parameters())
    if parameters != in_file:
        raise RunFailed(f"{source.name} holds {in_file:,} parameters, {parameters:,} were read")
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise RunFailed(f"{source.name} holds values that are not finite")
    with whole_folder(destination) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return parameters


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """For one call of a library that reads the file; see ``recipe.model.checkpoint``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a library written in Rust is no Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UserError.single(
            str(source),
            f"not readable as a GGUF file of a Llama model ({reason}). Use another.",
        ) from error
