"""The path of a run, settings to checked adapter, once the settings are valid.

Kept apart from ``train.py`` because commands do not import commands, and whatever proves or
compares runs needs the real one.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from recipe.continuation import change, checkpoint_of, take_up, tidy, train
from recipe.data.batch import LAYOUT
from recipe.keeping import keep, says
from recipe.memory.probe import peak_memory
from recipe.memory.watch import MemoryWatch
from recipe.model.checkpoint import load_base, loaded_commit
from recipe.model.fingerprint import weights_sha256
from recipe.model.lora import add_lora, give_memory, save_initial
from recipe.run_account import Run, conclusion, introduction, manifest_facts
from recipe.run_data import Data, load_data, share_openings
from recipe.run_memory import forecasts_told, what_takes_less
from recipe.settings import Settings, dump
from recipe.training.arguments import autocast_dtype, training_arguments
from recipe.training.build import build_trainer
from recipe.training.checkpoints import Checkpoint
from recipe.training.collective import (
    check_all_alike,
    check_all_answer,
    check_seen_by_all,
    of_first,
    own_log,
    told_once,
)
from recipe.training.disk import check_space
from recipe.training.engine import (
    CheckEngine,
    Engine,
    asked_engine,
    load_engine,
    load_whole,
    loads_weights,
)
from recipe.training.faults import faults_told
from recipe.training.flow import FreshFolder, OnTrainBegin, Rehearse
from recipe.training.head import OutputHead
from recipe.training.heartbeat import Heartbeat, loss_told
from recipe.training.loss import TokenLoss, distributed
from recipe.training.machine import check_machine
from recipe.training.meeting import meet
from recipe.training.pace import Pace
from recipe.training.run_folder import (
    PACKAGES,
    alone,
    check_output_dir,
    make_run_folder,
    planned_folder,
    write_manifest,
    write_settings,
)
from recipe.training.run_log import RunLog
from recipe.training.run_log import say as say_line
from recipe.training.same_run import Beginning, check_same_run, flat
from recipe.training.signals import StopOnSignal
from recipe.training.trainer import TokenWeightedTrainer

# The trainer as its first step finds it, what was decided, and how to say a line.
Rehearsal = Callable[[TokenWeightedTrainer, Run, Callable[[str], None]], None]


@dataclass(frozen=True)
class _Prepared:
    """Everything that stands before the first step; nothing of it is written yet."""

    arguments: TrainingArguments
    data: Data
    trainer: TokenWeightedTrainer
    log: RunLog
    stop: StopOnSignal
    base_sha256: str
    engine: Engine
    initial: tempfile.TemporaryDirectory[str] | None


def finetune(
    settings: Settings,
    watchers: Sequence[TrainerCallback] = (),
    *,
    rehearse: Rehearsal | None = None,
    memory: MemoryWatch | None = None,
    allow_changed: bool = False,
) -> Path:
    """Train what ``settings`` describe; return the run's folder with the checked adapter in it.

    Nothing is written before settings, machine, data and model have all been accepted.

    Args:
        watchers: callbacks that look at the run, such as one that captures gradients.
        rehearse: called when the first step could be taken.
        memory: what it saw is told at the end, beside the forecast.
        allow_changed: see ``recipe.training.same_run``.

    Raises:
        UserError: something asked for cannot be done as asked.
        RunFailed: a value became NaN or infinite, memory or disk do not suffice, or the saved
            adapter is not usable.
        Stopped: by a signal, behind a checkpoint.
    """
    started = time.perf_counter()
    resumed = checkpoint_of(settings)
    pace = Pace(_speaker(main_process=os.environ.get("RANK", "0") == "0"))
    prepared = _prepare(settings, [*watchers, pace, *([memory] if memory else [])])
    arguments, trainer, log = prepared.arguments, prepared.trainer, prepared.log
    changed = _check_same_run(settings, prepared, resumed, allow_changed=allow_changed)
    made = not planned_folder(settings).exists()
    folder = _run_folder(settings, resumed)
    arguments.output_dir, log.file = str(folder), folder / "metrics.jsonl"
    trainer.report_into(folder)
    run = Run(settings, arguments, prepared.data, trainer.model, prepared.base_sha256)
    trainer.what_takes_less = what_takes_less(run)
    main_process = arguments.process_index == 0
    say, told = _speaker(main_process=main_process), list[str]()
    check_seen_by_all(folder)
    with alone(folder, needed=main_process), _told(folder), _watched(trainer, folder):
        say("\n".join(introduction(run, folder)))
        if main_process and resumed is None:
            _describe(run, folder)
        # PiSSA and OLoRA took their start out of the base; only with it is the base whole.
        base_says = says(run) if prepared.initial else None
        _begin(settings, prepared, resumed, changed, say)
        if rehearse:
            fresh = FreshFolder(folder, made=made) if resumed is None else None
            trainer.add_callback(Rehearse(partial(rehearse, trainer, run, say), fresh))
        with prepared.stop.listening():
            train(trainer, resumed)
            after = _held_out_perplexity(trainer)
            if main_process:
                told = forecasts_told(run, memory, pace, folder)
            keep(run, trainer, log, folder, initial=prepared.initial, base_says=base_says)
    seconds = time.perf_counter() - started
    perplexities = {"before": log.first_perplexity, "after": after}
    say("\n".join(conclusion(run, log, folder, **perplexities, seconds=seconds, memory=told)))
    prepared.stop.stop_if_received(f"The run is finished, and {folder / 'adapter'} is saved.")
    return folder


def check(settings: Settings) -> None:
    """Everything up to the first step: rows, model, adapter and the perplexity before training.

    Nothing is written, the token cache aside.

    Raises:
        UserError, RunFailed: as ``finetune``.
    """
    started = time.perf_counter()
    resumed = checkpoint_of(settings)
    silent = {**settings.training, "report_to": "none"}  # a reporter would make its folder
    prepared = _prepare(settings.model_copy(update={"training": silent}), ())
    arguments, trainer, data = prepared.arguments, prepared.trainer, prepared.data
    _check_same_run(settings, prepared, resumed, allow_changed=False)
    say = _speaker(main_process=arguments.process_index == 0)
    run = Run(settings, arguments, data, trainer.model, prepared.base_sha256)
    say("\n".join(introduction(run, None)))
    if resumed:
        say(f"resume    from {resumed.folder}, which is whole")
    else:
        prepared.log.file = Path(os.devnull)
        before = None if prepared.engine.shards else _held_out_perplexity(trainer)
        if before is not None:
            say(f"held out  perplexity {before:.2f} before training")
    seconds = time.perf_counter() - started
    say(f"checked   ready for the first step, in {seconds:.0f} s; nothing is trained or written")


def _prepare(settings: Settings, watchers: Sequence[TrainerCallback]) -> _Prepared:
    check_machine(settings)
    if not settings.training.get("resume_from_checkpoint"):
        check_output_dir(settings)
    engine = asked_engine()
    load_engine(engine)
    meet(float(settings.training.get("ddp_timeout") or 1800))
    arguments = training_arguments(settings)
    check_all_answer(arguments.device)
    load_whole(engine)
    data = load_data(settings)
    set_seed(arguments.seed)  # before the adapter is drawn, not when the Trainer starts
    base = load_base(settings.model, weights=loads_weights(engine))
    base_sha256 = _base_sha256(engine, base)  # before PiSSA or OLoRA change it
    commit = loaded_commit(settings.model)
    model = add_lora(
        base,
        settings.lora,
        mixed_precision=arguments.fp16 or arguments.bf16,
        revision=commit,
    )
    if not loads_weights(engine):
        give_memory(model)
    initial = save_initial(model)
    head = OutputHead(model, autocast=autocast_dtype(arguments))
    loss = TokenLoss(head.nll)
    log, stop = RunLog(loss, peak_memory=peak_memory), StopOnSignal()
    callbacks = [log, stop, *watchers]
    trainer = build_trainer(
        model,
        arguments,
        data.train.rows,
        data.held_out.rows,
        callbacks=callbacks,
        loss=loss,
        head=head,
        share_openings=share_openings(settings),
        engine=engine,
    )
    if not settings.training.get("resume_from_checkpoint"):
        check_space(arguments, model, planned_folder(settings), rows=len(data.train.rows))
    prepared = _Prepared(arguments, data, trainer, log, stop, base_sha256, engine, initial)
    check_all_alike(_alike(settings, prepared))
    return prepared


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What ends a run from outside, in one line, and by one process."""
    with told_once(), loss_told(folder), faults_told(folder), own_log(folder):
        yield


@contextmanager
def _watched(trainer: TokenWeightedTrainer, folder: Path) -> Iterator[None]:
    """A run of several processes that hangs is ended."""
    if not distributed():
        yield
        return
    heart = Heartbeat(folder)
    trainer.add_callback(heart)
    with heart.watching(trainer.args.ddp_timeout):
        yield


def _base_sha256(engine: Engine, base: nn.Module) -> str:
    """Of each process's own copy, so that another one on another host is noticed."""
    told = of_first(weights_sha256, base) if engine.name == "fsdp2" else weights_sha256(base)
    return str(told)


def _speaker(*, main_process: bool) -> Callable[[str], None]:
    return say_line if main_process else lambda line: None


def _run_folder(settings: Settings, resumed: Checkpoint | None) -> Path:
    return resumed.folder.parent if resumed else make_run_folder(settings)


def _check_same_run(
    settings: Settings, prepared: _Prepared, resumed: Checkpoint | None, *, allow_changed: bool
) -> list[str]:
    """Of a run that goes on, what is allowed to differ and does, a line each."""
    if resumed is None:
        return []
    before = resumed.folder.parent
    return check_same_run(
        settings, before, _beginning(settings, prepared), allow_changed=allow_changed
    )


def _alike(settings: Settings, prepared: _Prepared) -> dict[str, Any]:
    """What every process must have the same of."""
    packages = {f"package {name}": version(name) for name in PACKAGES}
    found = {
        "data.path (rows and tokens)": prepared.data.tokens_sha256,
        "model.name_or_path (weights)": prepared.base_sha256,
    }
    return {**flat(yaml.safe_load(dump(settings))), **packages, **found}


def _beginning(settings: Settings, prepared: _Prepared) -> Beginning:
    return Beginning(
        prepared.data.tokens_sha256,
        prepared.base_sha256,
        share_openings(settings),
        LAYOUT,
        prepared.arguments.world_size,
        prepared.engine.name,
    )


def _begin(
    settings: Settings,
    prepared: _Prepared,
    resumed: Checkpoint | None,
    changed: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Say where the run begins, and the held-out perplexity before step 1."""
    trainer, log = prepared.trainer, prepared.log
    trainer.add_callback(CheckEngine(trainer, prepared.engine))
    if resumed is None:
        if prepared.engine.shards:  # only training puts the model where it computes
            trainer.add_callback(OnTrainBegin(partial(_evaluate_first, trainer, say)))
        else:
            _evaluate_first(trainer, say)
        return
    if changed:
        change(trainer, settings, _beginning(settings, prepared), resumed, changed)
    if trainer.args.process_index == 0:
        tidy(resumed, say)
    take_up(trainer, log, resumed, say)
    for line in changed:
        say(f"changed   {line}")


def _evaluate_first(trainer: TokenWeightedTrainer, say: Callable[[str], None]) -> None:
    before = _held_out_perplexity(trainer)
    if before is not None:
        say(f"held out  perplexity {before:.2f} before training")


def _describe(run: Run, folder: Path) -> None:
    write_settings(folder, run.settings)
    write_manifest(folder, **manifest_facts(run))


def _held_out_perplexity(trainer: TokenWeightedTrainer) -> float | None:
    """Evaluate, unless these very weights have just been evaluated."""
    if not trainer.eval_dataset:
        return None
    seen = [record for record in trainer.state.log_history if "eval_perplexity" in record]
    unchanged = bool(seen) and seen[-1]["step"] == trainer.state.global_step
    if unchanged and not trainer.args.load_best_model_at_end:
        return float(seen[-1]["eval_perplexity"])
    return float(trainer.evaluate()["eval_perplexity"])
