"""The trained adapter, saved with what proves it."""

import tempfile
from pathlib import Path

import torch

from recipe.model.shards import whole_adapter
from recipe.run_account import Run, receipt
from recipe.sharing.adapter_folder import save_adapter
from recipe.sharing.probes import Probe, encode_probes, make_probes, next_token_logits
from recipe.training.engine import asked_engine
from recipe.training.plot import plot_loss
from recipe.training.run_log import RunLog, say
from recipe.training.trainer import TokenWeightedTrainer


def keep(
    run: Run,
    trainer: TokenWeightedTrainer,
    log: RunLog,
    folder: Path,
    *,
    initial: tempfile.TemporaryDirectory[str] | None,
    base_says: torch.Tensor | None,
) -> None:
    """Save the adapter with what proves it, and draw the losses. With sharded weights every process
    takes part in what the model answers.

    Args:
        initial: see ``recipe.model.lora.save_initial``.
        base_says: ``says`` of a base that PiSSA or OLoRA changed since.
    """
    main_process = trainer.args.process_index == 0
    if not (main_process or asked_engine().shards_weights):
        return
    _note_unchanged(trainer, log)
    probes, state = _probes(run, base_says), whole_adapter(run.model)
    if main_process:
        proof = receipt(run, folder, probes)
        start = Path(initial.name) if initial else None
        save_adapter(run.model, folder / "adapter", proof, initial=start, state=state)
        _plot(run, folder)


def _plot(run: Run, folder: Path) -> None:
    """The adapter is saved: no picture is worth its run."""
    title = f"{run.settings.name} · {folder.name}"
    try:
        plot_loss(folder / "metrics.jsonl", folder / "loss.png", title=title)
    except OSError as error:
        say(f"warning   {folder / 'loss.png'} could not be written: {error.strerror}")


def says(run: Run) -> torch.Tensor:
    """The model's logits for the probes, as it is now."""
    _, rows = encode_probes(run.data.template, run.data.tokenizer)
    return next_token_logits(run.model, rows)


def _probes(run: Run, base_says: torch.Tensor | None) -> list[Probe]:
    """What base and tuned model answer; ``base_says`` is None where the base is still whole."""
    texts, rows = encode_probes(run.data.template, run.data.tokenizer)
    if base_says is None:
        with run.model.disable_adapter():
            base_says = says(run)
    return make_probes(texts, rows, base=base_says, tuned=says(run))


def _note_unchanged(trainer: TokenWeightedTrainer, log: RunLog) -> None:
    row = trainer.train_dataset[0]
    if trainer.answers_unchanged(row):
        line = (
            f"the adapter leaves the base's answers as they are: the logits of row {row.index} "
            "differ by less than a millionth. Raise training.learning_rate (now "
            f"{trainer.args.learning_rate:g}), or train longer."
        )
        log.note("unchanged", line, state=trainer.state, step=trainer.state.global_step)
