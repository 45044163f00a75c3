"""Names that are no keys today: old ones of the libraries, and what other recipes call things."""

from collections.abc import Mapping

from recipe.settings.refused import (
    COMPILE,
    LAUNCH,
    LENGTH_GROUPING,
    OWN_EVALUATION,
    PUBLISHING,
)

# section -> old or foreign name -> today's key. "" holds names of sections.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "": {
        "dataset": "data",
        "peft": "lora",
        "train": "training",
        "trainer": "training",
        "training_arguments": "training",
    },
    "training": {
        "batch_size": "training.per_device_train_batch_size",
        "cutoff_len": "data.max_length",
        "epochs": "training.num_train_epochs",
        "eval_batch_size": "training.per_device_eval_batch_size",
        "evaluation_strategy": "training.eval_strategy",
        "lr": "training.learning_rate",
        "max_seq_length": "data.max_length",
        "micro_batch_size": "training.per_device_train_batch_size",
        "no_cuda": "training.use_cpu",
        "num_epochs": "training.num_train_epochs",
        "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
        "per_gpu_train_batch_size": "training.per_device_train_batch_size",
        "train_batch_size": "training.per_device_train_batch_size",
        "xpu_backend": "training.ddp_backend",
    },
    "lora": {
        "alpha": "lora.lora_alpha",
        "dropout": "lora.lora_dropout",
        "enable_lora": "lora.target_modules",
        "lora_dim": "lora.r",
        "lora_r": "lora.r",
        "lora_rank": "lora.r",
        "lora_target_modules": "lora.target_modules",
        "rank": "lora.r",
    },
    "model": {
        "base_model": "model.name_or_path",
        "model_max_length": "data.max_length",
        "model_name_or_path": "model.name_or_path",
        "name": "model.name_or_path",
        "path": "model.name_or_path",
        "quantization_config": "model.quantization",
        "torch_dtype": "model.dtype",
        "use_flash_attention_2": "model.attn_implementation",
    },
    "model.quantization": {
        "compute_dtype": "model.quantization.bnb_4bit_compute_dtype",
        "quant_type": "model.quantization.bnb_4bit_quant_type",
    },
    "data": {
        "cutoff_len": "data.max_length",
        "dataset": "data.path",
        "dataset_name": "data.path",
        "max_seq_length": "data.max_length",
        "name_or_path": "data.path",
        "prompt_template": "data.template",
        "prompt_template_name": "data.template",
    },
}

_GONE = "transformers 5 has no such argument. Delete it."
_NO_REMOTE_CODE = "code from a model repository is never run here. Delete it."

# section -> old or foreign name -> what to do, where no key of today does the same.
REMOVED: Mapping[str, Mapping[str, str]] = {
    "": {
        "fsdp": LAUNCH.because,
        "deepspeed": LAUNCH.because,
    },
    "training": {
        "adafactor": "removed from transformers. Write optim: adafactor.",
        "dispatch_batches": _GONE,
        "fp16_backend": _GONE,
        "fp16_opt_level": _GONE,
        "fsdp_min_num_params": LAUNCH.because,
        "fsdp_transformer_layer_cls_to_wrap": LAUNCH.because,
        "group_by_length": f"now part of train_sampling_strategy, but {LENGTH_GROUPING}",
        "half_precision_backend": _GONE,
        "include_inputs_for_metrics": OWN_EVALUATION.because,
        "jit_mode_eval": _GONE,
        "logging_dir": "removed from transformers 5. Set TENSORBOARD_LOGGING_DIR instead.",
        "overwrite_output_dir": "a run never overwrites another. Delete it.",
        "packing": "rows always share one sequence here and never see each other. Delete it.",
        "past_index": _GONE,
        "push_to_hub_model_id": PUBLISHING.because,
        "push_to_hub_organization": PUBLISHING.because,
        "ray_scope": _GONE,
        "save_safetensors": "adapters are always written as safetensors. Delete it.",
        "sharded_ddp": LAUNCH.because,
        "split_batches": _GONE,
        "torchdynamo": COMPILE.because,
        "tpu_num_cores": _GONE,
        "use_ipex": _GONE,
        "use_mps_device": "transformers 5 finds the device itself. Delete it.",
        "warmup_ratio": "removed from transformers 5. Use training.warmup_steps: a value below 1 "
        "is that fraction of all steps, from 1 on it is a number of steps.",
    },
    "lora": {"merge_weights": "merging is a step of its own. Delete it."},
    "model": {"trust_remote_code": _NO_REMOTE_CODE},
    "data": {
        "trust_remote_code": _NO_REMOTE_CODE,
        "val_set_size": "no random split is made here. Name rows: data.held_out: 200:300.",
    },
}
