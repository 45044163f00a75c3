"""Is there room on the disk for everything that a run will write?"""

import math
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import TrainingArguments

from recipe.settings import UserError

_STATES = 1 << 20  # random states, scheduler, log: at most about this much a checkpoint
_OPTIMIZER_BYTES = 8  # a parameter; Adam's two moments in float32 are the most that is usual


def check_space(arguments: TrainingArguments, model: PeftModel, folder: Path, *, rows: int) -> None:
    """Before the first step, as a full disk is found out at the worst time.

    Args:
        folder: of the run; need not be there yet.

    Raises:
        UserError: less is free than checkpoints and adapter will take.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in trainable)
    checkpoint = checkpoint_bytes(adapter, sum(p.numel() for p in trainable))
    kept = kept_checkpoints(arguments, rows)
    needed = adapter + _STATES + kept * checkpoint
    free = shutil.disk_usage(_existing(folder)).free
    if needed <= free:
        return
    raise UserError.single(
        "training.output_dir",
        f"{_in_words(free)} are free in {folder.parent}, and the run will write up to "
        f"{_in_words(needed)}: {kept} checkpoints of {_in_words(checkpoint)} and the adapter. Free "
        "some, or keep fewer checkpoints with training.save_total_limit.",
    )


def checkpoint_bytes(adapter: int, parameters: int) -> int:
    """What a checkpoint takes at most, of an adapter of so many bytes and parameters."""
    return adapter + _STATES + _OPTIMIZER_BYTES * parameters


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    size = arguments.per_device_train_batch_size
    dealt = rows // size if arguments.dataloader_drop_last else math.ceil(rows / size)
    batches = math.ceil(dealt / arguments.world_size)
    an_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    steps: int = math.ceil(arguments.num_train_epochs * an_epoch)
    return steps


def kept_checkpoints(arguments: TrainingArguments, rows: int) -> int:
    """The most that lie on the disk at a time: the new one is whole before an old one goes."""
    strategy, steps = arguments.save_strategy.value, planned_steps(arguments, rows)
    if strategy == "no":
        return 0
    saves = math.ceil(arguments.num_train_epochs)
    if strategy == "best":
        strategy = arguments.eval_strategy.value
    if strategy == "steps":
        best = arguments.save_strategy.value == "best"
        every = arguments.eval_steps if best else arguments.save_steps
        # A share of the steps, where it is below 1.
        saves = math.ceil(steps / (every if every >= 1 else max(every * steps, 1)))
    limit = arguments.save_total_limit
    if not limit:
        return int(saves)
    stay = max(limit, 2) if arguments.load_best_model_at_end else limit  # the best and the last
    return int(min(saves, stay + 1))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _in_words(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
