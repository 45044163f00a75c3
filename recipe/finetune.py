"""The path of a run, settings to checked adapter, once the settings are valid.

Kept apart from ``train.py`` because commands do not import commands, and whatever proves or
compares runs needs the real one.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments, set_seed

import recipe
from recipe.data.rows import Rows, read_rows
from recipe.data.templates import Template, build_template
from recipe.data.tokens import TokenizedRows, tokenize_rows
from recipe.memory.probe import in_words, peak_memory
from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.model.lora import (
    add_lora,
    dtype_plan,
    save_initial,
    total_parameters,
    trainable_parameters,
)
from recipe.settings import Settings, UserError, plain
from recipe.sharing.adapter_folder import save_adapter
from recipe.training.arguments import training_arguments
from recipe.training.checkpoints import (
    LOG_STATE,
    SealCheckpoints,
    check_same_run,
    find_checkpoint,
)
from recipe.training.loss import TokenLoss
from recipe.training.machine import check_machine, device_name
from recipe.training.plot import plot_loss
from recipe.training.run_folder import make_run_folder, write_manifest, write_settings
from recipe.training.run_log import RunLog
from recipe.training.trainer import TokenWeightedTrainer, build_trainer


@dataclass(frozen=True)
class _Data:
    rows: Rows
    template: Template
    train: TokenizedRows
    held_out: TokenizedRows


def finetune(settings: Settings, watchers: Sequence[TrainerCallback] = ()) -> Path:
    """Train what ``settings`` describe; return the run's folder with the checked adapter in it.

    Nothing is written before settings, machine, data and model have all been accepted.

    Args:
        watchers: callbacks that look at the run, such as one that captures gradients.

    Raises:
        UserError: something asked for cannot be done as asked.
        RunFailed: a value became NaN or infinite, or the saved adapter is not usable.
    """
    started = time.perf_counter()
    check_machine(settings)
    arguments = training_arguments(settings)
    data = _load_data(settings)
    set_seed(arguments.seed)  # before the adapter is drawn, not when the Trainer starts
    model = add_lora(load_base(settings.model), settings.lora)
    initial = save_initial(model)
    folder = _run_folder(settings, data)
    arguments.output_dir = str(folder)
    say = _speaker(arguments)
    _introduce(say, settings, folder, model, data, arguments)
    resumed = _checkpoint(settings)
    if arguments.process_index == 0 and resumed is None:
        write_settings(folder, settings)
        write_manifest(folder, **_facts(settings, model, data, arguments))
    loss = TokenLoss()
    log = RunLog(folder, loss, peak_memory=peak_memory)
    trainer = build_trainer(
        model,
        arguments,
        data.train.rows,
        data.held_out.rows,
        loss=loss,
        callbacks=[log, SealCheckpoints(log), *watchers],
    )
    before = _begin(trainer, log, resumed, say)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    after = _held_out_perplexity(trainer)
    if arguments.process_index == 0:
        plot_loss(log.file, folder / "loss.png", title=f"{settings.name} · {folder.name}")
        receipt = _receipt(settings, model, data)
        save_adapter(
            model, folder / "adapter", receipt, initial=Path(initial.name) if initial else None
        )
    _conclude(say, folder, log, before=before, after=after, seconds=time.perf_counter() - started)
    return folder


def _load_data(settings: Settings) -> _Data:
    asked = settings.data
    rows = read_rows(asked)
    tokenizer = load_tokenizer(settings.model)
    template = build_template(asked.template, tokenizer)
    context = load_config(settings.model).max_position_embeddings
    if asked.max_length and asked.max_length > context:
        raise UserError.single(
            "data.max_length",
            f"{asked.max_length} is beyond this model's context of {context}. Lower it.",
        )
    train, held_out = (
        tokenize_rows(
            part,
            template,
            tokenizer,
            max_length=asked.max_length or context,
            too_long=asked.too_long,
        )
        for part in (rows.train, rows.held_out)
    )
    return _Data(rows, template, train, held_out)


def _checkpoint(settings: Settings) -> Path | None:
    asked = settings.training.get("resume_from_checkpoint")
    return find_checkpoint(asked) if asked else None


def _run_folder(settings: Settings, data: _Data) -> Path:
    checkpoint = _checkpoint(settings)
    if checkpoint is None:
        return make_run_folder(settings)
    check_same_run(settings, data.rows.sha256, checkpoint.parent)
    return checkpoint.parent


def _begin(
    trainer: TokenWeightedTrainer, log: RunLog, resumed: Path | None, say: Any
) -> float | None:
    """Judge the untrained adapter, or take up the log of the run that is resumed."""
    if resumed is None:
        before = _held_out_perplexity(trainer)
        if before:
            say(f"held out  perplexity {before:.2f} before training")
        return before
    state = json.loads((resumed / LOG_STATE).read_text())
    log.resume(state, main_process=trainer.args.process_index == 0)
    say(f"resumed   after step {state['step']}, from {resumed}")
    first = json.loads(log.file.read_text().split("\n", 1)[0])
    return first.get("eval_perplexity") if first["step"] == 0 else None


def _speaker(arguments: TrainingArguments) -> Any:
    def say(line: str) -> None:
        if arguments.process_index == 0:
            print(line, flush=True)

    return say


def _introduce(
    say: Any,
    settings: Settings,
    folder: Path,
    model: PeftModel,
    data: _Data,
    arguments: TrainingArguments,
) -> None:
    plan = dtype_plan(model, fp16=arguments.fp16, bf16=arguments.bf16)
    total, trainable = total_parameters(model), trainable_parameters(model)
    lora = model.peft_config["default"]
    asked = settings.data
    say(f"run       {settings.name} → {folder} · {device_name(arguments)}")
    say(f"base      {settings.model.name_or_path} · {total:,} parameters in {plan['base']}")
    say(
        f"adapter   LoRA r={lora.r} alpha={lora.lora_alpha} dropout={lora.lora_dropout} · "
        f"{trainable:,} trainable of {total + trainable:,} in {plan['adapter']} · "
        f"compute {plan['compute']}"
    )
    say(
        f"data      {len(data.train.rows)} rows of {asked.path} · {data.train.tokens:,} tokens, "
        f"{data.train.trained_tokens:,} of them trained · {data.template.name} template"
        + (f" · {len(data.held_out.rows)} rows held out" if asked.held_out else "")
    )
    for note in _left_out(data):
        say(f"          {note}")
    processes = arguments.world_size
    rows_per_step = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    )
    say(
        f"step      {rows_per_step} rows = {arguments.per_device_train_batch_size} × "
        f"{arguments.gradient_accumulation_steps} accumulated × {processes} process"
        + ("es" if processes > 1 else "")
    )


def _left_out(data: _Data) -> list[str]:
    notes = []
    if data.rows.ignored_columns:
        notes.append(f"columns not used: {', '.join(data.rows.ignored_columns)}")
    for indices, what in (
        (data.rows.empty, "dropped, their output is empty"),
        (data.train.dropped + data.held_out.dropped, "dropped, longer than max_length"),
        (data.train.truncated + data.held_out.truncated, "cut at max_length, EOS not trained"),
    ):
        if indices:
            shown = ", ".join(map(str, indices[:10])) + (", …" if len(indices) > 10 else "")
            notes.append(f"{len(indices)} rows {what}: {shown}")
    return notes


def _held_out_perplexity(trainer: TokenWeightedTrainer) -> float | None:
    if not trainer.eval_dataset:
        return None
    return float(trainer.evaluate()["eval_perplexity"])


def _facts(
    settings: Settings, model: PeftModel, data: _Data, arguments: TrainingArguments
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return {
        "device": device_name(arguments),
        "base": settings.model.name_or_path,
        "dtypes": dtype_plan(model, fp16=arguments.fp16, bf16=arguments.bf16),
        "parameters": {"base": total_parameters(model), "trainable": trainable_parameters(model)},
        "data": {
            "sha256": data.rows.sha256,
            "rows": len(data.train.rows),
            "held_out": len(data.held_out.rows),
            "tokens": data.train.tokens,
            "trained_tokens": data.train.trained_tokens,
            "dropped_empty": data.rows.empty,
            "dropped_long": data.train.dropped + data.held_out.dropped,
            "truncated": data.train.truncated + data.held_out.truncated,
        },
        "initial_adapter_sha256": digest.hexdigest(),
    }


def _receipt(settings: Settings, model: PeftModel, data: _Data) -> dict[str, Any]:
    """What a later load needs to answer as the run was trained."""
    return {
        "recipe": recipe.__version__,
        "base": {
            "name_or_path": settings.model.name_or_path,
            "revision": settings.model.revision,
            "dtype": settings.model.dtype,
            "quantization": plain(settings.model.quantization),
        },
        "template": data.template.name,
        "trainable_parameters": trainable_parameters(model),
        "data_sha256": data.rows.sha256,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _conclude(
    say: Any,
    folder: Path,
    log: RunLog,
    *,
    before: float | None,
    after: float | None,
    seconds: float,
) -> None:
    losses = log.epoch_losses
    learned = f"training loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else "nothing"
    if before is not None and after is not None:
        learned = f"held-out perplexity {before:.2f} → {after:.2f} · {learned}"
    say(f"learned   {learned}")
    say(
        f"cost      {seconds:.0f} s in all, {log.seconds:.0f} s of them training · peak memory "
        f"{in_words(peak_memory())} · {log.skipped_steps} skipped steps"
    )
    say(f"saved     {folder / 'adapter'} (reopened: whole, finite, as trained)")
    say(f"          {folder / 'loss.png'}, {folder / 'metrics.jsonl'}")
    say('next      make infer PROMPT="…"            ask it; ADAPTER=none asks the base')
    say(f"          make train CONFIG={folder / 'settings.yaml'}   repeat this run")
