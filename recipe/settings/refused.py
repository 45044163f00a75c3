"""Library keys that this recipe does not honour.

Each would otherwise be ignored, or change the result without a word. A value equal to the library's
default is never refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from recipe.settings.option import Option


@dataclass(frozen=True)
class Refusal:
    """Why, and what to do instead. ``values`` limits it to some values."""

    because: str
    values: tuple[object, ...] | None = None


PUBLISHING = Refusal(
    "the Trainer would push what nobody has checked. Leave it out and write hub.push: true and "
    "hub.repo_id: user/name."
)
LAUNCH = Refusal("sharding is not proven here, and not done by this version. Leave it out.")
COMPILE = Refusal(
    "torch.compile is not proven with LoRA dropout here, and costs more than it gains on a CPU "
    "(`make bench-compile`). Leave it out."
)
_LIGER = Refusal("its kernels replace the loss that is proven exact here. Leave it out.")
_OWN_LOADING = Refusal("the recipe builds its own batches and labels. Leave it out.")
OWN_EVALUATION = Refusal("evaluation here is one token-weighted loss. Leave it out.")
_FULL_EVAL = Refusal(
    "casts the model itself when evaluation runs after training, the adapter included. Leave it "
    "out; training.bf16 or training.fp16 also hold while evaluating."
)
_FLAG = Refusal("a flag for example scripts, which changes nothing here. Leave it out.")
_LOW_RANK_OPTIMIZER = Refusal(
    "serves optimizers that project full matrices (GaLore, APOLLO); an adapter has none. "
    "Leave it out."
)
LENGTH_GROUPING = (
    "grouping by length cannot be resumed exactly, and rows are not padded here, so it would save "
    "nothing. Leave it out."
)

TRAINING: Mapping[str, Refusal] = {
    "accelerator_config": Refusal(
        "changes how rows are dealt to processes, and resuming is proven with accelerate's "
        "defaults only. Leave it out."
    ),
    "auto_find_batch_size": Refusal(
        "changes the effective batch without a word. Leave it out and lower "
        "training.per_device_train_batch_size."
    ),
    "average_tokens_across_devices": Refusal(
        "without it the loss on N processes is not the loss on one. Leave it out."
    ),
    "batch_eval_metrics": OWN_EVALUATION,
    "bf16_full_eval": _FULL_EVAL,
    "dataloader_in_order": Refusal(
        "batches in the order in which workers finish cannot be resumed exactly. Leave it out."
    ),
    "dataloader_persistent_workers": Refusal(
        "changes the order of the rows, so resuming is not exact. Leave it out."
    ),
    "deepspeed": LAUNCH,
    "disable_tqdm": Refusal("the recipe shows its own progress. Leave it out."),
    "do_eval": Refusal("follows from training.eval_strategy. Leave it out and set that."),
    "do_predict": _FLAG,
    "do_train": _FLAG,
    "enable_jit_checkpoint": Refusal(
        "its checkpoint is written inside a step, so resuming is not exact. Leave it out and set "
        "training.save_steps."
    ),
    "eval_accumulation_steps": OWN_EVALUATION,
    "eval_do_concat_batches": OWN_EVALUATION,
    "eval_use_gather_object": OWN_EVALUATION,
    "fp16_full_eval": _FULL_EVAL,
    "fsdp": LAUNCH,
    "fsdp_config": LAUNCH,
    "hub_always_push": PUBLISHING,
    "hub_model_id": PUBLISHING,
    "hub_private_repo": PUBLISHING,
    "hub_revision": PUBLISHING,
    "hub_strategy": PUBLISHING,
    "hub_token": Refusal(
        "a token must never stand in a file or on a command line. Delete it, revoke it if the "
        "file was shared, and run hf auth login or set HF_TOKEN."
    ),
    "ignore_data_skip": Refusal("a resumed run would see rows twice. Leave it out."),
    "include_for_metrics": OWN_EVALUATION,
    "label_names": _OWN_LOADING,
    "label_smoothing_factor": Refusal(
        "not implemented by the token-exact loss, which would ignore it. Leave it out."
    ),
    "length_column_name": Refusal(LENGTH_GROUPING),
    "liger_kernel_config": _LIGER,
    "local_rank": Refusal("set by the launcher. Leave it out."),
    "logging_nan_inf_filter": Refusal(
        "a NaN or infinite loss stops the run here, so nothing is left to filter. Leave it out."
    ),
    "optim_target_modules": _LOW_RANK_OPTIMIZER,
    "parallelism_config": LAUNCH,
    "prediction_loss_only": OWN_EVALUATION,
    "push_to_hub": PUBLISHING,
    "remove_unused_columns": _OWN_LOADING,
    "save_only_model": Refusal(
        "a checkpoint without optimizer and random state cannot be resumed exactly. Leave it out; "
        "the adapter is written on its own at the end anyway."
    ),
    "neftune_noise_alpha": Refusal(
        "its noise shrinks with the length of the flattened batch, so 1x8 and 8x1 rows would be "
        "trained differently. Leave it out."
    ),
    "torch_compile": COMPILE,
    "torch_compile_backend": COMPILE,
    "torch_compile_mode": COMPILE,
    "train_sampling_strategy": Refusal(LENGTH_GROUPING, ("group_by_length", "batch_rebalance")),
    "use_cache": Refusal(
        "with a cache transformers lets the rows of a flattened batch see each other. Leave it out."
    ),
    "use_liger_kernel": _LIGER,
}

# Every field of TrainingArguments 5.17 to 5.23 stands here or above, in exactly one place. A field
# that a later version adds is refused until somebody has tried it and written it down.
TRAINING_HONOURED = frozenset(
    [
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "eval_delay",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "fp16",
        "full_determinism",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "include_num_input_tokens_seen",
        "learning_rate",
        "load_best_model_at_end",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "metric_for_best_model",
        "num_train_epochs",
        "optim",
        "optim_args",
        "output_dir",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "project",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "save_on_each_node",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "seed",
        "skip_memory_metrics",
        "tf32",
        "torch_empty_cache_steps",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "use_cpu",
        "warmup_steps",
        "weight_decay",
    ]
)

_WRITTEN_BY_PEFT = Refusal("written by peft when it saves the adapter. Leave it out.")
_CALIBRATION = "needs a calibration pass over data before training. Leave it out, or use pissa."
_MEGATRON = Refusal("for models of Megatron-LM. Leave it out.")
_EXTRA_LOSS = Refusal(
    "needs a second term in the loss, which the token-exact loss does not have. Leave it out."
)
_QALORA = Refusal("peft implements it for GPTQ models only. Leave it out.")

LORA: Mapping[str, Refusal] = {
    "alora_invocation_tokens": Refusal(
        "is looked for once in each row of a batch, but rows are laid end to end here. "
        "Leave it out."
    ),
    "arrow_config": Refusal("routes between trained adapters and trains none. Leave it out."),
    "auto_mapping": _WRITTEN_BY_PEFT,
    "base_model_name_or_path": _WRITTEN_BY_PEFT,
    "bias": Refusal(
        "trains biases of the base, which stay changed when the adapter is switched off, merged "
        "or compared; Llama has none. Leave it out.",
        ("all", "lora_only"),
    ),
    "corda_config": Refusal(_CALIBRATION),
    "eva_config": Refusal(_CALIBRATION),
    "fan_in_fan_out": Refusal("for Conv1D layers as in GPT-2; Llama has none. Leave it out."),
    "inference_mode": _WRITTEN_BY_PEFT,
    "init_lora_weights": Refusal(_CALIBRATION, ("corda", "eva", "loftq", "lora_ga")),
    "kasa_config": _EXTRA_LOSS,
    "layer_replication": Refusal(
        "repeats layers of the base, and the adapter would fit no published model. Leave it out."
    ),
    "loftq_config": Refusal(_CALIBRATION),
    "lora_ga_config": Refusal(_CALIBRATION),
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": _EXTRA_LOSS,
    "peft_type": _WRITTEN_BY_PEFT,
    "peft_version": _WRITTEN_BY_PEFT,
    "qalora_group_size": _QALORA,
    "revision": _WRITTEN_BY_PEFT,
    "runtime_config": Refusal("peft takes it as a Python object only. Leave it out."),
    "use_qalora": _QALORA,
}

_REFUSED = {"training": TRAINING, "lora": LORA}
_NEW = Refusal("new in this transformers, and not tried with this recipe yet. Leave it out.")


def refusal(section: str, option: Option, value: object) -> str | None:
    """Why and what to do instead, or None. ``value`` is never repeated: it may be a token."""
    if value == option.default and isinstance(value, bool) == isinstance(option.default, bool):
        return None
    entry = _REFUSED.get(section, {}).get(option.name)
    if entry is None and section == "training" and option.name not in TRAINING_HONOURED:
        entry = _NEW
    if entry is None or (entry.values is not None and value not in entry.values):
        return None
    return entry.because
