"""Tokenizer, config and generation config must mean the same tokens by bos and eos."""

from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerBase

from recipe.model.checkpoint import GENERATION, SPECIAL, stored_generation_config
from recipe.settings import ModelSettings, Problem, UserError

_WHERE = "model.name_or_path"


def check_special_ids(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, config: LlamaConfig
) -> None:
    """Tokenizer, config and generation config must mean the same tokens by bos and eos.

    A model that is trained to end with one token and stopped at another never stops. Pad ids may
    differ: nothing is padded here.

    Raises:
        UserError: with one problem for each disagreement and each id outside the vocabulary.
    """
    generation = stored_generation_config(settings)
    files = {"config.json": config, GENERATION: generation}
    problems = [
        Problem(
            _WHERE,
            f"{settings.name_or_path}: {source} has {name} {wrong!r}, which is no token of a "
            f"vocabulary of {config.vocab_size}. In a local copy, correct it, or set it to null.",
        )
        for source, holder in {"the tokenizer": tokenizer, **files}.items()
        for name in SPECIAL
        for wrong in _ids(getattr(holder, name, None))
        if type(wrong) is not int or not 0 <= wrong < config.vocab_size
    ]
    for source, holder in files.items():
        for name in ("bos_token_id", "eos_token_id"):
            ours, theirs = getattr(tokenizer, name), _ids(getattr(holder, name, None))
            if ours is not None and theirs and ours not in theirs:
                token = tokenizer.convert_ids_to_tokens(ours)
                problems.append(
                    _disagreement(settings, name, f"{ours} ({token!r})", source, theirs)
                )
    if problems:
        raise UserError(problems)


def _ids(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _disagreement(
    settings: ModelSettings, name: str, ours: str, source: str, theirs: list[Any]
) -> Problem:
    shown = theirs[0] if len(theirs) == 1 else theirs
    default = getattr(LlamaConfig(), name)
    if source == "config.json" and theirs == [default]:
        shown = f"{shown} (which is also what leaving it out means)"
    return Problem(
        _WHERE,
        f"{settings.name_or_path}: the tokenizer has {name} {ours}, but {source} has {shown}. "
        f"In a local copy, correct whichever is wrong: tokenizer_config.json or {source}.",
    )
