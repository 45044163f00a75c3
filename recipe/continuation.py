"""Where a run begins: with its first step, or behind a checkpoint."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState

from recipe.sealed import damage, remove_unfinished
from recipe.settings import Settings, UserError
from recipe.training.checkpoints import LOG_STATE, Checkpoint, checkpoints, find_checkpoint
from recipe.training.disk import planned_steps
from recipe.training.flow import GoOnLogging, OnFirstSave
from recipe.training.run_folder import note_changes, write_settings
from recipe.training.run_log import RunLog
from recipe.training.same_run import Beginning
from recipe.training.sharded_trainer import ShardedTrainer
from recipe.training.trainer import TokenWeightedTrainer

_WHERE = "training.resume_from_checkpoint"


def checkpoint_of(settings: Settings) -> Checkpoint | None:
    """The checkpoint that ``settings`` ask for.

    Raises:
        UserError: there is none that is whole.
    """
    asked = settings.training.get("resume_from_checkpoint")
    best = bool(settings.training.get("load_best_model_at_end"))
    return find_checkpoint(asked, best_needed=best) if asked else None


def tidy(resumed: Checkpoint, say: Callable[[str], None]) -> None:
    """Make the checkpoint the run's newest: what a kill left behind goes, and whole ones of steps
    that will be run again are set aside, or the next resume would take those.
    """
    run = resumed.folder.parent
    remove_unfinished(run)
    for folder in checkpoints(run):
        if folder == resumed.folder or folder.name == resumed.folder.name:
            return
        if not damage(folder):
            aside = folder.with_name(f"superseded-{folder.name}")
            number = 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"superseded-{folder.name}-{number}")
            folder.rename(aside)
            say(f"set aside {aside}: its steps are run again")


def take_up(
    trainer: TokenWeightedTrainer, log: RunLog, resumed: Checkpoint, say: Callable[[str], None]
) -> float | None:
    """Let the log go on where the checkpoint was written; return the perplexity before step 1."""
    for line in resumed.left_out:
        say(f"left out  {line}")
    say(f"resumed   from {resumed.folder}")
    try:
        state = json.loads((resumed.folder / LOG_STATE).read_text())
        log.resume(state, main_process=trainer.args.process_index == 0)
        trainer.add_callback(GoOnLogging(trainer, state["open_loss"], state["logged_step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError.single(
            _WHERE,
            f"{resumed.folder / LOG_STATE} is not what a run of this version writes. Start anew.",
        ) from error
    return log.first_perplexity


def change(
    trainer: TokenWeightedTrainer,
    settings: Settings,
    now: Beginning,
    resumed: Checkpoint,
    changed: Sequence[str],
) -> None:
    """With ``--allow-changed``: what differs becomes the run's own with its first new checkpoint.

    Raises:
        UserError: nothing would be trained any more.
    """
    state = _state(resumed)
    planned = planned_steps(trainer.args, len(trainer.train_dataset))
    if state.global_step >= planned and planned != state.max_steps:
        raise UserError.single(
            _WHERE,
            f"with these settings the run ends with step {planned}, and {resumed.folder} is "
            f"behind step {state.global_step}. Ask for more, such as training.num_train_epochs.",
        )
    if trainer.args.process_index == 0:
        run = resumed.folder.parent
        write = partial(_write_changes, run, settings, now, changed, state.global_step)
        # Before the others: one of them may end the run.
        trainer.callback_handler.callbacks.insert(0, OnFirstSave(write))


def _write_changes(
    run: Path, settings: Settings, now: Beginning, changed: Sequence[str], step: int
) -> None:
    write_settings(run, settings)
    note_changes(run, now, changed, step=step)


def train(trainer: TokenWeightedTrainer, resumed: Checkpoint | None) -> None:
    """Take the steps that are left."""
    if resumed is None:
        trainer.train()
        return
    trainer.args.eval_on_start = False  # it was
    state = _state(resumed)
    if state.global_step < planned_steps(trainer.args, len(trainer.train_dataset)):
        trainer.train(resume_from_checkpoint=str(resumed.folder))
        return
    # Stopped behind the last step: with max_steps the Trainer would take one more.
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if isinstance(trainer, ShardedTrainer):
        trainer.take_up(resumed.folder, best=Path(best) if best else None)
        if trainer.args.should_save:
            trainer.remove_old_checkpoints(at_the_end=True)
        return
    weights = load_file(Path(best or resumed.folder) / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)
    if trainer.args.should_save:
        trainer.remove_old_checkpoints(at_the_end=True)


def _state(resumed: Checkpoint) -> TrainerState:
    return TrainerState.load_from_json(str(resumed.folder / "trainer_state.json"))
