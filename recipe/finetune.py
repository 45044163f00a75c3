"""The path of a run, settings to checked adapter, once the settings are valid.

Kept apart from ``train.py`` because commands do not import commands, and whatever proves or
compares runs needs the real one.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed

from recipe.memory.probe import peak_memory
from recipe.model.checkpoint import load_base, loaded_commit
from recipe.model.fingerprint import weights_sha256
from recipe.model.lora import add_lora, save_initial
from recipe.run_account import Run, conclusion, introduction, manifest_facts, receipt
from recipe.run_data import Data, load_data, share_openings
from recipe.settings import Settings, UserError
from recipe.sharing.adapter_folder import save_adapter
from recipe.sharing.probes import Probe, encode_probes, make_probes, next_token_logits
from recipe.training.arguments import autocast_dtype, training_arguments
from recipe.training.checkpoints import (
    LOG_STATE,
    Beginning,
    SealCheckpoints,
    check_same_run,
    find_checkpoint,
)
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss
from recipe.training.machine import check_machine
from recipe.training.plot import plot_loss
from recipe.training.run_folder import (
    check_output_dir,
    make_run_folder,
    write_manifest,
    write_settings,
)
from recipe.training.run_log import RunLog
from recipe.training.trainer import TokenWeightedTrainer, build_trainer


@dataclass(frozen=True)
class _Prepared:
    """Everything that stands before the first step; nothing of it is written yet."""

    arguments: TrainingArguments
    data: Data
    trainer: TokenWeightedTrainer
    log: RunLog
    base_sha256: str
    initial: tempfile.TemporaryDirectory[str] | None


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
    resumed = _checkpoint(settings)
    prepared = _prepare(settings, watchers)
    arguments, trainer, log = prepared.arguments, prepared.trainer, prepared.log
    folder = _run_folder(settings, prepared, resumed)
    arguments.output_dir, log.file = str(folder), folder / "metrics.jsonl"
    trainer.report_into(folder)
    run = Run(settings, arguments, prepared.data, trainer.model, prepared.base_sha256)
    main_process = arguments.process_index == 0
    say = _speaker(main_process=main_process)
    say("\n".join(introduction(run, folder)))
    if main_process and resumed is None:
        write_settings(folder, settings)
        write_manifest(folder, **manifest_facts(run))
    # PiSSA and OLoRA took their start out of the base; only with it is the base whole.
    base_says = _says(run) if prepared.initial else None
    before = _take_up(trainer, log, resumed) if resumed else _held_out_perplexity(trainer)
    if resumed:
        say(f"resumed   from {resumed}")
    elif before is not None:
        say(f"held out  perplexity {before:.2f} before training")
    _train(trainer, resumed)
    after = _held_out_perplexity(trainer)
    if main_process:
        start = Path(prepared.initial.name) if prepared.initial else None
        probes = _probes(run, base_says)
        save_adapter(trainer.model, folder / "adapter", receipt(run, folder, probes), initial=start)
        plot_loss(log.file, folder / "loss.png", title=f"{settings.name} · {folder.name}")
        _note_unchanged(trainer, log)
    seconds = time.perf_counter() - started
    say("\n".join(conclusion(run, log, folder, before=before, after=after, seconds=seconds)))
    return folder


def check(settings: Settings) -> None:
    """Everything up to the first step: rows, model, adapter and the perplexity before training.

    Nothing is written, the token cache aside.

    Raises:
        UserError, RunFailed: as ``finetune``.
    """
    started = time.perf_counter()
    resumed = _checkpoint(settings)
    silent = {**settings.training, "report_to": "none"}  # a reporter would make its folder
    prepared = _prepare(settings.model_copy(update={"training": silent}), ())
    arguments, trainer, data = prepared.arguments, prepared.trainer, prepared.data
    if resumed:
        _check_same_run(settings, prepared, resumed.parent)
    say = _speaker(main_process=arguments.process_index == 0)
    run = Run(settings, arguments, data, trainer.model, prepared.base_sha256)
    say("\n".join(introduction(run, None)))
    if resumed:
        say(f"resume    from {resumed}, which is whole")
    else:
        prepared.log.file = Path(os.devnull)
        before = _held_out_perplexity(trainer)
        if before is not None:
            say(f"held out  perplexity {before:.2f} before training")
    seconds = time.perf_counter() - started
    say(f"checked   ready for the first step, in {seconds:.0f} s; nothing is trained or written")


def _prepare(settings: Settings, watchers: Sequence[TrainerCallback]) -> _Prepared:
    check_machine(settings)
    if not settings.training.get("resume_from_checkpoint"):
        check_output_dir(settings)
    arguments = training_arguments(settings)
    data = load_data(settings)
    set_seed(arguments.seed)  # before the adapter is drawn, not when the Trainer starts
    base = load_base(settings.model)
    base_sha256 = weights_sha256(base)  # before PiSSA or OLoRA change it
    commit = loaded_commit(settings.model)
    model = add_lora(
        base,
        settings.lora,
        mixed_precision=arguments.fp16 or arguments.bf16,
        revision=commit,
    )
    initial = save_initial(model)
    head = OutputHead(model, autocast=autocast_dtype(arguments))
    loss = TokenLoss(head.nll)
    log = RunLog(loss, peak_memory=peak_memory)
    callbacks = [log, SealCheckpoints(log), *watchers]
    trainer = build_trainer(
        model,
        arguments,
        data.train.rows,
        data.held_out.rows,
        callbacks=callbacks,
        loss=loss,
        head=head,
        share_openings=share_openings(settings),
    )
    return _Prepared(arguments, data, trainer, log, base_sha256, initial)


def _speaker(*, main_process: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    return say


def _checkpoint(settings: Settings) -> Path | None:
    asked = settings.training.get("resume_from_checkpoint")
    best = bool(settings.training.get("load_best_model_at_end"))
    return find_checkpoint(asked, best_needed=best) if asked else None


def _run_folder(settings: Settings, prepared: _Prepared, resumed: Path | None) -> Path:
    if resumed is None:
        return make_run_folder(settings)
    _check_same_run(settings, prepared, resumed.parent)
    return resumed.parent


def _check_same_run(settings: Settings, prepared: _Prepared, run: Path) -> None:
    now = Beginning(
        prepared.data.tokens_sha256,
        prepared.base_sha256,
        share_openings(settings),
        prepared.arguments.world_size,
    )
    check_same_run(settings, run, now)


def _take_up(trainer: TokenWeightedTrainer, log: RunLog, resumed: Path) -> float | None:
    """Let the log go on where the checkpoint was written; return the perplexity before step 1."""
    try:
        state = json.loads((resumed / LOG_STATE).read_text())
        log.resume(state, main_process=trainer.args.process_index == 0)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError.single(
            "training.resume_from_checkpoint",
            f"{resumed / LOG_STATE} is not what a run of this version writes. Start anew.",
        ) from error
    return log.first_perplexity


def _train(trainer: TokenWeightedTrainer, resumed: Path | None) -> None:
    if resumed is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(resumed / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(resumed))
        return
    # Stopped behind the last step: with max_steps the Trainer would take one more.
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    weights = load_file(Path(best or resumed) / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)


def _says(run: Run) -> torch.Tensor:
    """The model's logits for the probes, as it is now."""
    _, rows = encode_probes(run.data.template, run.data.tokenizer)
    return next_token_logits(run.model, rows)


def _probes(run: Run, base_says: torch.Tensor | None) -> list[Probe]:
    """What base and tuned model answer; ``base_says`` is None where the base is still whole."""
    texts, rows = encode_probes(run.data.template, run.data.tokenizer)
    if base_says is None:
        with run.model.disable_adapter():
            base_says = _says(run)
    return make_probes(texts, rows, base=base_says, tuned=_says(run))


def _note_unchanged(trainer: TokenWeightedTrainer, log: RunLog) -> None:
    row = trainer.train_dataset[0]
    if trainer.answers_unchanged(row):
        line = (
            f"the adapter leaves the base's answers as they are: the logits of row {row.index} "
            "differ by less than a millionth. Raise training.learning_rate (now "
            f"{trainer.args.learning_rate:g}), or train longer."
        )
        log.note("unchanged", line, state=trainer.state, step=trainer.state.global_step)


def _held_out_perplexity(trainer: TokenWeightedTrainer) -> float | None:
    """Evaluate, unless these very weights have just been evaluated."""
    if not trainer.eval_dataset:
        return None
    seen = [record for record in trainer.state.log_history if "eval_perplexity" in record]
    unchanged = bool(seen) and seen[-1]["step"] == trainer.state.global_step
    if unchanged and not trainer.args.load_best_model_at_end:
        return float(seen[-1]["eval_perplexity"])
    return float(trainer.evaluate()["eval_perplexity"])
