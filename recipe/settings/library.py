"""The keys of the three library sections: TrainingArguments, LoraConfig, BitsAndBytesConfig.

Names, types and defaults come from the installed source; the tables below add what the libraries
forget to check (they accept a learning rate of -1, a batch of 0 rows and "optim: bogus").
"""

import functools
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from recipe.settings.annotation import Resolved, literal, resolve, union
from recipe.settings.option import Absent, Option
from recipe.settings.source import Declared, Module, dataclass_fields, init_parameters, installed

_ANNOTATED: Any = Annotated
_POSITIVE = (Gt(0),)
_NOT_NEGATIVE = (Ge(0),)
_AT_LEAST_ONE = (Ge(1),)
_FRACTION_BELOW_ONE = (Ge(0), Lt(1))
# numpy and random take no larger one.
_SEED = (Ge(0), Le(2**32 - 1))

_TRAINING_LIMITS: Mapping[str, tuple[Any, ...]] = {
    "adam_beta1": _FRACTION_BELOW_ONE,
    "adam_beta2": _FRACTION_BELOW_ONE,
    "adam_epsilon": _POSITIVE,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _AT_LEAST_ONE,
    "ddp_bucket_cap_mb": _AT_LEAST_ONE,
    "ddp_timeout": _AT_LEAST_ONE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_steps": _POSITIVE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "learning_rate": _POSITIVE,
    "logging_steps": _POSITIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "neftune_noise_alpha": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "save_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_ONE,
    "seed": _SEED,
    "torch_empty_cache_steps": _AT_LEAST_ONE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
}
_LOG_LEVELS = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]
_TRAINING_TYPES: Mapping[str, Any] = {
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    # -1 means "by epochs"; 0 trains nothing.
    "max_steps": Literal[-1] | Annotated[int, Ge(1)],
    # The string form is a JSON text for the command line.
    "activation_checkpointing_kwargs": dict[str, Any] | None,
    "gradient_checkpointing_kwargs": dict[str, Any] | None,
    "lr_scheduler_kwargs": dict[str, Any] | None,
}
_LORA_LIMITS: Mapping[str, tuple[Any, ...]] = {
    "r": _AT_LEAST_ONE,
    "lora_alpha": _POSITIVE,
    "lora_dropout": _FRACTION_BELOW_ONE,
}
_LORA_TYPES: Mapping[str, Any] = {
    "task_type": Literal["CAUSAL_LM"] | None,
    "rank_pattern": dict[str, Annotated[int, Ge(1)]] | None,
    "alpha_pattern": dict[str, Annotated[float, Gt(0)]] | None,
    "layers_to_transform": list[Annotated[int, Ge(0)]] | Annotated[int, Ge(0)] | None,
}
_DTYPES = Literal["float32", "float16", "bfloat16"]
_QUANTIZATION_TYPES: Mapping[str, Any] = {
    "llm_int8_skip_modules": list[str] | None,
    "llm_int8_threshold": Annotated[float, Ge(0)],
    "bnb_4bit_compute_dtype": _DTYPES | None,
    "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    "bnb_4bit_quant_storage": _DTYPES | Literal["float64", "int8", "uint8"] | None,
}


@functools.cache
def training_options() -> Mapping[str, Option]:
    """Every field of the installed ``transformers.TrainingArguments``."""
    module = installed("transformers", "training_args.py")
    return _options(module, "TrainingArguments", limits=_TRAINING_LIMITS, types=_TRAINING_TYPES)


@functools.cache
def lora_options() -> Mapping[str, Option]:
    """Every field of the installed ``peft.LoraConfig``."""
    module = installed("peft", "tuners/lora/config.py")
    return _options(module, "LoraConfig", limits=_LORA_LIMITS, types=_LORA_TYPES)


@functools.cache
def quantization_options() -> Mapping[str, Option]:
    """Every parameter of the installed ``transformers.BitsAndBytesConfig``.

    It only logs names that it does not know, so checking them is ours altogether.
    """
    module = installed("transformers", "utils/quantization_config.py")
    declared = init_parameters(module, "BitsAndBytesConfig")
    return {
        name: _option(item, limits=(), override=_QUANTIZATION_TYPES.get(name))
        for name, item in declared.items()
    }


def _options(
    module: Module, name: str, *, limits: Mapping[str, Any], types: Mapping[str, Any]
) -> Mapping[str, Option]:
    return {
        field: _option(declared, limits=limits.get(field, ()), override=types.get(field))
        for field, declared in dataclass_fields(module, name).items()
    }


def _option(declared: Declared, *, limits: tuple[Any, ...], override: Any) -> Option:
    resolved = _resolved(declared)
    inner = None
    if resolved.dataclass_name is not None:
        inner = _options(declared.module, resolved.dataclass_name, limits={}, types={})
    kind = resolved.type if override is None else override
    if declared.choices and override is None:
        kind = _chosen(kind, declared.choices)
    kind = _limited(kind, limits) if limits else kind
    return Option(declared.name, kind, declared.default, " ".join(declared.help.split()), inner)


def _resolved(declared: Declared) -> Resolved:
    if declared.annotation is not None:
        return resolve(declared.annotation, declared.module)
    if declared.default is None or isinstance(declared.default, Absent):
        return Resolved(Any)
    return Resolved(type(declared.default))


def _chosen(kind: Any, choices: tuple[object, ...]) -> Any:
    """``choices`` of a field's metadata instead of its ``str``."""
    members = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    return union([literal(choices) if member is str else member for member in members])


def _limited(kind: Any, limits: tuple[Any, ...]) -> Any:
    """The same type with limits on its numbers."""
    if get_origin(kind) in (Union, UnionType):
        return union([_limited(member, limits) for member in get_args(kind)])
    return _ANNOTATED[kind, *limits] if kind in (int, float) else kind
