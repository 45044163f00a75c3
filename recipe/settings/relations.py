"""What must hold between keys that are each valid alone.

transformers checks some of this too, but only after seconds of imports and one mistake at a time;
the rest it ignores in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from recipe.settings.library import quantization_options
from recipe.settings.row_range import overlap

# Parameters of BitsAndBytesConfig that only the other width reads.
_UNREAD = {
    "load_in_8bit": ("bnb_4bit_",),
    "load_in_4bit": ("llm_int8_threshold", "llm_int8_has_fp16_weight"),
}

# What transformers (trainer_optimizer.py) reads of optim_args; it ignores all else.
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
_SCHEDULE_FREE = ("weight_lr_power", "r")
_OPTIM_ARGS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "ademamix": _ADEMAMIX,
    "ademamix_8bit": _ADEMAMIX,
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _ADEMAMIX,
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "grokadamw": (
        "alpha_init",
        "lamb",
        "gamma",
        "grokking_signal_decay_rate",
        "gradient_clipping",
    ),
}
_WITHOUT_BETAS = ("sgd", "adagrad", "rmsprop", "adafactor")


@dataclass(frozen=True)
class Relation:
    """``objection`` gets the values of ``keys`` in order; what it returns is said of the first.

    A relation is only asked when none of its keys has a problem already.
    """

    keys: tuple[str, ...]
    objection: Callable[..., str | None]


def _quantization_width(quantization: Mapping[str, Any] | None) -> str | None:
    if quantization is None:
        return None
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if quantization.get(name)]
    if len(bits) != 1:
        both = "both are" if bits else "neither is"
        return (
            f"expected one of load_in_4bit: true and load_in_8bit: true, but {both} set. "
            "Set one, or leave quantization out."
        )
    for name, option in quantization_options().items():
        if name.startswith(_UNREAD[bits[0]]) and quantization.get(name, ...) not in (
            ...,
            option.default,
        ):
            return f"{name} has no effect with {bits[0]}. Leave it out."
    return None


def _held_out_rows(held_out: str | None, rows: str | None) -> str | None:
    if held_out is None:
        return None
    if rows is None:
        return f"{held_out} is held out of which rows? Say data.rows too, such as 0:200."
    if overlap(rows, held_out):
        return f"{held_out} and data.rows {rows} share rows. Make them apart, as 0:200 and 200:300."
    return None


def _evaluation_rows(asked: str | bool, held_out: str | None) -> str | None:
    if asked in ("no", False) or held_out is not None:
        return None
    return "asks for evaluation, but no rows are held out. Set data.held_out, such as 200:300."


def _layers(layers: object, pattern: object, targets: object) -> str | None:
    if pattern is not None and layers is None:
        return "lora.layers_pattern has no effect without it. Set both, or leave both out."
    if (pattern or layers) is not None and isinstance(targets, str):
        return "works with a list in lora.target_modules only. Write [q_proj, v_proj] there."
    return None


def _lora_bias(bias: bool, init: object, dora: bool) -> str | None:
    if bias and (dora or not isinstance(init, bool)):
        return "works without lora.use_dora and lora.init_lora_weights only. Leave those out."
    return None


def _one_precision(fp16: bool, bf16: bool) -> str | None:
    return "true, and so is training.bf16. Keep one of the two." if fp16 and bf16 else None


def _whole_above_one(steps: float | None) -> str | None:
    if steps is None or steps < 1 or float(steps).is_integer():
        return None
    return (
        f"expected a whole number of steps, or a fraction of all steps below 1, found {steps}. "
        f"Write {int(steps)}."
    )


def _plateau(scheduler: str, strategy: str) -> str | None:
    if scheduler in ("reduce_lr_on_plateau", "greedy") and strategy == "no":
        return f"{scheduler} follows the evaluation loss. Set training.eval_strategy."
    return None


def _constant_warmup(warmup: float, scheduler: str) -> str | None:
    if warmup and scheduler == "constant":
        return "no effect with lr_scheduler_type: constant. Use constant_with_warmup."
    return None


def _optim_args(given: str | None, optim: str | None) -> str | None:
    if given is None:
        return None
    known = _OPTIM_ARGS.get(optim or "")
    if known is None:
        return f"no effect with optim: {optim or 'AdamW, the default'}. Leave it out."
    pairs = [pair.partition("=") for pair in given.replace(" ", "").split(",")]
    unread = [key for key, equals, value in pairs if key not in known or not (equals and value)]
    if unread:
        return f"optim: {optim} reads {', '.join(known)}, found {unread[0]!r}. Write key=value,…."
    return None


def _betas(value: float, optim: str | None, default: float) -> str | None:
    if optim in _WITHOUT_BETAS and value != default:
        return f"no effect with optim: {optim}. Leave it out."
    return None


def _prefetch(prefetch: int | None, workers: int) -> str | None:
    if prefetch is not None and workers == 0:
        return "no effect without workers. Set training.dataloader_num_workers, or leave it out."
    return None


def _saved_best(save: str, evaluate: str) -> str | None:
    if save == "best" and evaluate == "no":
        return "'best' is found by evaluating. Set training.eval_strategy."
    return None


def _best_model(
    best: bool, save: str, evaluate: str, save_steps: float, eval_steps: float | None, log: float
) -> str | None:
    if not best or save == "best":
        return None
    if save != evaluate:
        return (
            f"needs equal strategies, found save_strategy '{save}' and eval_strategy "
            f"'{evaluate}'. Make them equal, or write save_strategy: best."
        )
    if evaluate == "no":
        return "the best model is found by evaluating. Set training.eval_strategy."
    between = eval_steps if eval_steps is not None else log
    # Fractions of all steps divide inexactly: 0.3 / 0.1 is 2.9999999999999996.
    saves = round(save_steps / between, 9)
    if save == "steps" and (saves % 1 or (save_steps < 1) != (between < 1)):
        return (
            f"needs save_steps to be a multiple of eval_steps, found {save_steps} and {between}. "
            f"Write save_steps: {between}."
        )
    return None


def _checkpointing_names(new: bool | None, old: bool | None) -> str | None:
    if new is not None and old is not None and new != old:
        return "the old name training.gradient_checkpointing says otherwise. Keep one of the two."
    return None


def _reentrant(kwargs: Mapping[str, Any] | None) -> str | None:
    if kwargs and kwargs.get("use_reentrant"):
        return "use_reentrant: true gives an adapter on a frozen base no gradient. Leave it out."
    return None


def _named_repository(push: bool, repo_id: str | None) -> str | None:
    return "true, but to where? Set hub.repo_id: user/name." if push and not repo_id else None


def _shared_openings(share: bool | None, attention: str) -> str | None:
    if not share or attention == "per_row_sdpa":
        return None
    return f"needs model.attn_implementation: per_row_sdpa, found {attention}. Change one of them."


RELATIONS = (
    Relation(("data.share_openings", "model.attn_implementation"), _shared_openings),
    Relation(("model.quantization",), _quantization_width),
    Relation(("data.held_out", "data.rows"), _held_out_rows),
    Relation(("training.eval_strategy", "data.held_out"), _evaluation_rows),
    Relation(("training.eval_on_start", "data.held_out"), _evaluation_rows),
    Relation(("training.save_strategy", "training.eval_strategy"), _saved_best),
    Relation(("lora.layers_to_transform", "lora.layers_pattern", "lora.target_modules"), _layers),
    Relation(("lora.lora_bias", "lora.init_lora_weights", "lora.use_dora"), _lora_bias),
    Relation(("training.fp16", "training.bf16"), _one_precision),
    Relation(("training.optim_args", "training.optim"), _optim_args),
    Relation(("training.adam_beta1", "training.optim"), partial(_betas, default=0.9)),
    Relation(("training.adam_beta2", "training.optim"), partial(_betas, default=0.999)),
    Relation(("training.adam_epsilon", "training.optim"), partial(_betas, default=1e-8)),
    Relation(("training.logging_steps",), _whole_above_one),
    Relation(("training.eval_steps",), _whole_above_one),
    Relation(("training.save_steps",), _whole_above_one),
    Relation(("training.warmup_steps",), _whole_above_one),
    Relation(("training.lr_scheduler_type", "training.eval_strategy"), _plateau),
    Relation(("training.warmup_steps", "training.lr_scheduler_type"), _constant_warmup),
    Relation(("training.dataloader_prefetch_factor", "training.dataloader_num_workers"), _prefetch),
    Relation(
        (
            "training.load_best_model_at_end",
            "training.save_strategy",
            "training.eval_strategy",
            "training.save_steps",
            "training.eval_steps",
            "training.logging_steps",
        ),
        _best_model,
    ),
    Relation(
        ("training.activation_checkpointing", "training.gradient_checkpointing"),
        _checkpointing_names,
    ),
    Relation(("hub.push", "hub.repo_id"), _named_repository),
    Relation(("training.activation_checkpointing_kwargs",), _reentrant),
    Relation(("training.gradient_checkpointing_kwargs",), _reentrant),
)
