"""Configs with one mistake each: one problem, at the right key and line, that says what to do."""

import re

import pytest

from recipe.settings import UserError, load_settings

# section, lines added to the valid config, key that is blamed, what its message says
TYPES = [
    ("model", "name_or_path: 7", "model.name_or_path", ["text", "the number 7", "'7'"]),
    ("model", "name_or_path: ''", "model.name_or_path", ["not empty", "''"]),
    ("model", "name_or_path:", "model.name_or_path", ["nothing (null)"]),
    ("model", "revision: 1234567", "model.revision", ["Put it in quotes: '1234567'"]),
    ("model", "dtype: fp16", "model.dtype", ["'bfloat16'", "Did you mean 'float16'?"]),
    ("model", "dtype: bf16", "model.dtype", ["Did you mean 'bfloat16'?"]),
    ("model", "attn_implementation: flash", "model.attn_implementation", ["'per_row_sdpa'"]),
    ("model", "quantization: nf4", "model.quantization", ["a mapping or null", "'nf4'"]),
    ("data", "path: [a.json]", "data.path", ["text", "without the brackets"]),
    ("data", "rows: 200", "data.rows", ["'0:200'", "the number 200"]),
    ("data", "rows: -5:10", "data.rows", ["a range of rows", "'-5:10'"]),
    ("data", "rows: 5:5", "data.rows", ["the first below the second"]),
    ("data", "rows: ':'", "data.rows", ["a range of rows"]),
    ("data", "max_length: 4", "data.max_length", ["at least 8", "the number 4"]),
    ("data", "max_length: 512.0", "data.max_length", ["whole number", "Write 512."]),
    ("data", "too_long: cut", "data.too_long", ["'error', 'drop' or 'truncate'"]),
    ("data", "format: sharegpt", "data.format", ["'alpaca' or null"]),
    ("lora", "r: 0", "lora.r", ["of at least 1", "the number 0"]),
    ("lora", "r: '8'", "lora.r", ["whole number", "the string '8'", "Remove the quotes."]),
    ("lora", "r: true", "lora.r", ["whole number", "found true"]),
    ("lora", "lora_alpha: 0", "lora.lora_alpha", ["above 0"]),
    ("lora", "lora_dropout: 1.0", "lora.lora_dropout", ["at least 0 and below 1"]),
    ("lora", "target_modules: [q_proj, 3]", "lora.target_modules", ["each item: text"]),
    ("lora", "bias: some", "lora.bias", ["'none', 'all' or 'lora_only'"]),
    ("lora", "init_lora_weights: pisa", "lora.init_lora_weights", ["Did you mean 'pissa'?"]),
    ("lora", "init_lora_weights: pissa_niter_x", "lora.init_lora_weights", ["pissa_niter_[num"]),
    ("lora", "task_type: SEQ_CLS", "lora.task_type", ["'CAUSAL_LM'"]),
    ("lora", "rank_pattern: {q_proj: 0}", "lora.rank_pattern", ["at least 1", "'q_proj': 0"]),
    ("lora", "modules_to_save: embed", "lora.modules_to_save", ["Write [embed]."]),
    ("training", "learning_rate: abc", "training.learning_rate", ["a number above 0", "'abc'"]),
    ("training", "learning_rate: '3e-4'", "training.learning_rate", ["Remove the quotes."]),
    ("training", "learning_rate: -1", "training.learning_rate", ["above 0", "the number -1"]),
    ("training", "learning_rate: .nan", "training.learning_rate", ["never nan", "number nan"]),
    ("training", "learning_rate: 1e999", "training.learning_rate", ["never nan", "number inf"]),
    ("training", "learning_rate: true", "training.learning_rate", ["found true"]),
    ("training", "seed: 1_000", "training.seed", ["Write 1000."]),
    ("training", "seed: 0x10", "training.seed", ["the string '0x10'", "Write 16."]),
    ("training", "seed: -1", "training.seed", ["from 0 to 4294967295"]),
    ("training", "seed: 1.5", "training.seed", ["a whole number"]),
    ("training", "fp16: yes", "training.fp16", ["true or false", "'yes'", "Write true."]),
    ("training", "fp16: 1", "training.fp16", ["the number 1", "Write true."]),
    ("training", "eval_strategy: false", "training.eval_strategy", ["'no', 'steps'", "Write no."]),
    ("training", "max_steps: 0", "training.max_steps", ["-1 or a whole number of at least 1"]),
    ("training", "max_steps: '10'", "training.max_steps", ["Remove the quotes."]),
    ("training", "num_train_epochs: 0", "training.num_train_epochs", ["above 0"]),
    ("training", "weight_decay: -0.1", "training.weight_decay", ["at least 0"]),
    ("training", "logging_steps: 0", "training.logging_steps", ["above 0"]),
    ("training", "save_total_limit: 0", "training.save_total_limit", ["at least 1"]),
    ("training", "max_grad_norm: -1", "training.max_grad_norm", ["at least 0"]),
    ("training", "warmup_steps: -3", "training.warmup_steps", ["at least 0"]),
    ("training", "optim: adamw_tourch", "training.optim", ["Did you mean 'adamw_torch'?"]),
    ("training", "lr_scheduler_type: cosinus", "training.lr_scheduler_type", ["'cosine'?"]),
    ("training", "log_level: loud", "training.log_level", ["'passive'"]),
    ("training", "lr_scheduler_kwargs: {a: .inf}", "training.lr_scheduler_kwargs", ["never nan"]),
    ("training", "report_to: [tensorboard, 3]", "training.report_to", ["each item: text"]),
    (
        "training",
        "per_device_train_batch_size: 0",
        "training.per_device_train_batch_size",
        ["of at least 1"],
    ),
    (
        "training",
        "gradient_accumulation_steps: 2.5",
        "training.gradient_accumulation_steps",
        ["a whole number of at least 1", "2.5"],
    ),
    ("training", "resume_from_checkpoint: true", "training.resume_from_checkpoint", ["text"]),
]

NAMES = [
    ("training", "learning_rat: 1", "training.learning_rat", ["mean training.learning_rate?"]),
    ("training", "Learning-Rate: 1", "training.Learning-Rate", ["mean training.learning_rate?"]),
    ("training", "zzz: 1", "training.zzz", ["configs/OPTIONS.md lists the keys of training"]),
    ("training", "r: 8", "training.r", ["r belongs to lora: write lora.r."]),
    ("training", "evaluation_strategy: steps", "training.evaluation_strategy", ["eval_strategy"]),
    ("training", "save_safetensors: true", "training.save_safetensors", ["Delete it."]),
    ("training", "overwrite_output_dir: true", "training.overwrite_output_dir", ["Delete it."]),
    ("training", "warmup_ratio: 0.03", "training.warmup_ratio", ["warmup_steps", "below 1"]),
    ("training", "group_by_length: true", "training.group_by_length", ["train_sampling_strategy"]),
    ("training", "no_cuda: true", "training.no_cuda", ["training.use_cpu"]),
    ("training", "lr: 1e-4", "training.lr", ["training.learning_rate"]),
    ("training", "max_seq_length: 512", "training.max_seq_length", ["data.max_length"]),
    (
        "training",
        "per_gpu_train_batch_size: 4",
        "training.per_gpu_train_batch_size",
        ["training.per_device_train_batch_size"],
    ),
    ("lora", "rr: 8", "lora.rr", ["Did you mean lora.r?"]),
    ("lora", "lora_r: 8", "lora.lora_r", ["Use lora.r."]),
    ("lora", "lora_target_modules: [q]", "lora.lora_target_modules", ["lora.target_modules"]),
    ("lora", "learning_rate: 1", "lora.learning_rate", ["belongs to training"]),
    ("lora", "velora_config: {groups: 3}", "lora.velora_config.groups", ["velora_config.num_gr"]),
    ("model", "torch_dtype: float16", "model.torch_dtype", ["Use model.dtype."]),
    ("model", "load_in_4bit: true", "model.load_in_4bit", ["model.quantization.load_in_4bit"]),
    ("model", "trust_remote_code: true", "model.trust_remote_code", ["never run here"]),
    ("model", "what: 1", "model.what", ["Choose among name_or_path, revision, dtype"]),
    ("model", "token: hf_secret", "model.token", ["must never stand in a file"]),
    ("data", "val_set_size: 0.1", "data.val_set_size", ["data.held_out"]),
    ("data", "dataset: x", "data.dataset", ["Use data.path."]),
    ("rest", "trainin:\n  seed: 1\n", "trainin", ["Did you mean training?"]),
    ("rest", "learning_rate: 1\n", "learning_rate", ["write training.learning_rate"]),
    ("rest", "hub:\n  id: x\n", "hub", ["publishing is a separate step"]),
    ("rest", "zzz: 1\n", "zzz", ["Choose among model, data, lora, training."]),
    ("rest", "name: ../up\n", "name", ["'../up' cannot name the run folder"]),
    ("rest", "name: 3\n", "name", ["'3'"]),
    (
        "model",
        "quantization: {load_in_4bit: true, bnb_4bit_quant_typ: nf4}",
        "model.quantization.bnb_4bit_quant_typ",
        ["Did you mean model.quantization.bnb_4bit_quant_type?"],
    ),
    (
        "model",
        "quantization: {load_in_4bit: true, bnb_4bit_compute_dtype: half}",
        "model.quantization.bnb_4bit_compute_dtype",
        ["'float32', 'float16', 'bfloat16' or null"],
    ),
]

REFUSED = [
    ("training", "label_smoothing_factor: 0.1", "training.label_smoothing_factor", ["token-exact"]),
    ("training", "auto_find_batch_size: true", "training.auto_find_batch_size", ["effective"]),
    ("training", "save_only_model: true", "training.save_only_model", ["resumed exactly"]),
    ("training", "ignore_data_skip: true", "training.ignore_data_skip", ["see rows twice"]),
    ("training", "push_to_hub: true", "training.push_to_hub", ["publishing is a separate step"]),
    ("training", "hub_model_id: me/x", "training.hub_model_id", ["publishing"]),
    ("training", "hub_token: hf_secret", "training.hub_token", ["must never stand in a file"]),
    ("training", "deepspeed: ds.json", "training.deepspeed", ["not done by this version"]),
    ("training", "fsdp: full_shard", "training.fsdp", ["not done by this version"]),
    ("training", "torch_compile: true", "training.torch_compile", ["not proven"]),
    ("training", "use_liger_kernel: true", "training.use_liger_kernel", ["proven exact"]),
    ("training", "remove_unused_columns: false", "training.remove_unused_columns", ["own batches"]),
    ("training", "prediction_loss_only: true", "training.prediction_loss_only", ["token-weighted"]),
    ("training", "local_rank: 0", "training.local_rank", ["launcher"]),
    (
        "training",
        "average_tokens_across_devices: false",
        "training.average_tokens_across_devices",
        ["N processes"],
    ),
    (
        "training",
        "train_sampling_strategy: group_by_length",
        "training.train_sampling_strategy",
        ["resumed exactly"],
    ),
    ("lora", "init_lora_weights: eva", "lora.init_lora_weights", ["calibration", "pissa"]),
    ("lora", "init_lora_weights: lora_ga", "lora.init_lora_weights", ["calibration", "pissa"]),
    ("lora", "inference_mode: true", "lora.inference_mode", ["written by peft"]),
    ("lora", "peft_type: LORA", "lora.peft_type", ["written by peft"]),
    ("lora", "base_model_name_or_path: x", "lora.base_model_name_or_path", ["written by peft"]),
    ("lora", "alora_invocation_tokens: [1]", "lora.alora_invocation_tokens", ["end to end"]),
    ("lora", "runtime_config: {}", "lora.runtime_config", ["Python object"]),
]

RELATIONS = [
    ("model", "quantization: {}", "model.quantization", ["neither is set"]),
    (
        "model",
        "quantization: {load_in_4bit: true, load_in_8bit: true}",
        "model.quantization",
        ["both are set"],
    ),
    (
        "model",
        "quantization: {load_in_8bit: true, bnb_4bit_quant_type: nf4}",
        "model.quantization",
        ["bnb_4bit_quant_type has no effect with load_in_8bit"],
    ),
    ("data", "rows: 0:201", "data.held_out", ["share rows", "data.rows 0:201"]),
    ("data", "rows: '100:'", "data.held_out", ["share rows"]),
    ("data", "rows:", "data.held_out", ["Say data.rows too"]),
    ("data", "held_out: ':10'", "data.held_out", ["share rows"]),
    ("lora", "layers_pattern: layers", "lora.layers_to_transform", ["layers_pattern"]),
    (
        "lora",
        "target_modules: all-linear\nlayers_to_transform: [0]",
        "lora.layers_to_transform",
        ["a list in lora.target_modules"],
    ),
    ("lora", "lora_bias: true\nuse_dora: true", "lora.lora_bias", ["use_dora"]),
    ("training", "fp16: true\nbf16: true", "training.fp16", ["training.bf16", "Keep one"]),
    ("training", "logging_steps: 1.5", "training.logging_steps", ["Write 1."]),
    ("training", "warmup_steps: 2.5", "training.warmup_steps", ["Write 2."]),
    (
        "training",
        "lr_scheduler_type: constant\nwarmup_steps: 5",
        "training.warmup_steps",
        ["constant_with_warmup"],
    ),
    (
        "training",
        "lr_scheduler_type: reduce_lr_on_plateau",
        "training.lr_scheduler_type",
        ["training.eval_strategy"],
    ),
    (
        "training",
        "dataloader_prefetch_factor: 2",
        "training.dataloader_prefetch_factor",
        ["dataloader_num_workers"],
    ),
    (
        "training",
        "load_best_model_at_end: true\neval_strategy: epoch",
        "training.load_best_model_at_end",
        ["save_strategy 'steps' and eval_strategy 'epoch'"],
    ),
    (
        "training",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 10\nsave_steps: 15",
        "training.load_best_model_at_end",
        ["multiple of eval_steps"],
    ),
    ("training", "save_strategy: best", "training.save_strategy", ["Set training.eval_strategy"]),
    (
        "training",
        "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}",
        "training.gradient_checkpointing_kwargs",
        ["no gradient"],
    ),
    (
        "training",
        "gradient_checkpointing: true\nactivation_checkpointing: false",
        "training.activation_checkpointing",
        ["Keep one of the two"],
    ),
]

CASES = [*TYPES, *NAMES, *REFUSED, *RELATIONS]


@pytest.mark.parametrize(
    ("section", "lines", "key", "fragments"),
    CASES,
    ids=[f"{case[0]}: {' & '.join(case[1].split())}" for case in CASES],
)
def test_one_mistake_is_one_problem(
    write_config, section: str, lines: str, key: str, fragments: list[str]
) -> None:
    config = write_config(**{section: lines})
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    (problem,) = error.value.problems
    assert re.fullmatch(r"c\.yaml(:\d+)?", problem.where.removesuffix(f": {key}"))
    assert str(problem) == f"{problem.where}: {problem.message}"
    assert problem.message.isprintable()
    assert problem.message[-1] in ".?"
    assert "secret" not in problem.message
    for fragment in fragments:
        assert fragment in problem.message


@pytest.mark.parametrize("section", ["model", "data", "lora"])
def test_missing_section(tmp_path, section: str) -> None:
    sections = {"model": "{name_or_path: x}", "data": "{path: x}", "lora": "{r: 8}"}
    del sections[section]
    config = tmp_path / "c.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    assert str(error.value).startswith(f"c.yaml: {section}: missing.")


@pytest.mark.parametrize("key", ["model.name_or_path", "data.path"])
def test_missing_key(tmp_path, key: str) -> None:
    section, name = key.split(".")
    config = tmp_path / "c.yaml"
    text = "model: {name_or_path: x}\ndata: {path: x}\nlora: {r: 8}\n"
    config.write_text(text.replace(f"{section}: {{{name}: x}}", f"{section}:"))
    with pytest.raises(UserError) as error:
        load_settings(str(config))
    assert str(error.value).startswith(f"c.yaml: {key}: missing, expected text")


def test_section_that_is_no_mapping(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {name_or_path: x}\ndata: {path: x}\nlora: 8\n")
    with pytest.raises(
        UserError, match=r"c\.yaml:3: lora: expected keys below it, found the number"
    ):
        load_settings(str(config))


def test_the_example_of_the_design(write_config) -> None:
    with pytest.raises(UserError) as error:
        load_settings(str(write_config(training="learning_rat: 1e-4")))
    assert str(error.value) == (
        "c.yaml:12: training.learning_rat: unknown key. Did you mean training.learning_rate?"
    )


def test_everything_wrong_is_one_report(write_config) -> None:
    config = write_config(
        model="dtype: fp16",
        lora="r: 010\nlora_alpha: 1\nlora_alpha: 2",
        training="seed: x",
        rest="a: 1",
    )
    with pytest.raises(UserError) as error:
        load_settings(str(config), ["lora.rr=1", "training.bf16=maybe", "--fp16"])
    blamed = [problem.where for problem in error.value.problems]
    assert blamed == [
        "c.yaml:10: lora.r",
        "c.yaml:12: lora.lora_alpha",
        "override --fp16",
        "c.yaml:15: a",
        "c.yaml:3: model.dtype",
        "override lora.rr",
        "c.yaml:14: training.seed",
        "override training.bf16",
    ]
