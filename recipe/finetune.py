"""The path of a run, settings to checked adapter, once the settings are valid.

Kept apart from ``train.py`` because commands do not import commands, and whatever proves or
compares runs needs the real one.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState, set_seed

from recipe.data.rows import read_rows
from recipe.data.templates import build_template
from recipe.data.tokens import tokenize_rows
from recipe.memory.probe import peak_memory
from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.model.lora import add_lora, save_initial
from recipe.run_account import Data, Run, conclusion, introduction, manifest_facts, receipt
from recipe.settings import Settings, UserError
from recipe.sharing.adapter_folder import save_adapter
from recipe.training.arguments import training_arguments
from recipe.training.checkpoints import LOG_STATE, SealCheckpoints, check_same_run, find_checkpoint
from recipe.training.loss import TokenLoss
from recipe.training.machine import check_machine
from recipe.training.plot import plot_loss
from recipe.training.run_folder import make_run_folder, write_manifest, write_settings
from recipe.training.run_log import RunLog
from recipe.training.trainer import TokenWeightedTrainer, build_trainer


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
    resumed = _checkpoint(settings)
    arguments = training_arguments(settings)
    data = _load_data(settings)
    set_seed(arguments.seed)  # before the adapter is drawn, not when the Trainer starts
    model = add_lora(
        load_base(settings.model),
        settings.lora,
        mixed_precision=arguments.fp16 or arguments.bf16,
    )
    initial = save_initial(model)
    loss = TokenLoss()
    log = RunLog(loss, peak_memory=peak_memory)
    callbacks = [log, SealCheckpoints(log), *watchers]
    trainer = build_trainer(
        model, arguments, data.train.rows, data.held_out.rows, loss=loss, callbacks=callbacks
    )
    folder = _run_folder(settings, data, resumed)
    arguments.output_dir, log.file = str(folder), folder / "metrics.jsonl"
    run = Run(settings, arguments, data, model, folder)
    main_process = arguments.process_index == 0
    say = _speaker(main_process=main_process)
    say("\n".join(introduction(run)))
    if main_process and resumed is None:
        write_settings(folder, settings)
        write_manifest(folder, **manifest_facts(run))
    before = _take_up(trainer, log, resumed) if resumed else _held_out_perplexity(trainer)
    if resumed:
        say(f"resumed   from {resumed}")
    elif before is not None:
        say(f"held out  perplexity {before:.2f} before training")
    _train(trainer, resumed)
    after = _held_out_perplexity(trainer)
    if main_process:
        plot_loss(log.file, folder / "loss.png", title=f"{settings.name} · {folder.name}")
        start = Path(initial.name) if initial else None
        save_adapter(model, folder / "adapter", receipt(run), initial=start)
    seconds = time.perf_counter() - started
    say("\n".join(conclusion(run, log, before=before, after=after, seconds=seconds)))
    return folder


def _speaker(*, main_process: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    return say


def _checkpoint(settings: Settings) -> Path | None:
    asked = settings.training.get("resume_from_checkpoint")
    return find_checkpoint(asked) if asked else None


def _load_data(settings: Settings) -> Data:
    asked = settings.data
    rows = read_rows(asked)
    tokenizer = load_tokenizer(settings.model)
    template = build_template(asked.template, tokenizer)
    config = load_config(settings.model)
    context = config.max_position_embeddings
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
    vocabulary = config.vocab_size
    largest = max(int(row.input_ids.max()) for row in (*train.rows, *held_out.rows))
    if largest >= vocabulary:
        raise UserError.single(
            "model.name_or_path",
            f"its tokenizer makes token {largest}, but the model knows {vocabulary}. They do not "
            "belong together: use the tokenizer that came with the model.",
        )
    return Data(rows, template, train, held_out)


def _run_folder(settings: Settings, data: Data, resumed: Path | None) -> Path:
    if resumed is None:
        return make_run_folder(settings)
    check_same_run(settings, data.rows.sha256, resumed.parent)
    return resumed.parent


def _take_up(trainer: TokenWeightedTrainer, log: RunLog, resumed: Path) -> float | None:
    """Let the log go on where the checkpoint was written; return the perplexity before step 1."""
    state = json.loads((resumed / LOG_STATE).read_text())
    log.resume(state, main_process=trainer.args.process_index == 0)
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


def _held_out_perplexity(trainer: TokenWeightedTrainer) -> float | None:
    """Evaluate, unless these very weights have just been evaluated."""
    if not trainer.eval_dataset:
        return None
    seen = [record for record in trainer.state.log_history if "eval_perplexity" in record]
    unchanged = bool(seen) and seen[-1]["step"] == trainer.state.global_step
    if unchanged and not trainer.args.load_best_model_at_end:
        return float(seen[-1]["eval_perplexity"])
    return float(trainer.evaluate()["eval_perplexity"])
