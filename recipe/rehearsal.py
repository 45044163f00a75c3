"""Before step 1, in seconds: whatever a run will do later, done once.

What does not fit, cannot be written or cannot answer is found out now, and not in the last hour.
"""

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recipe.memory.probe import in_words, peak_memory
from recipe.memory.tried import DEVICES, Trial, circumstances
from recipe.memory.watch import MemoryWatch
from recipe.model.shards import saved_state, whole_adapter
from recipe.run_account import Run
from recipe.run_data import Data
from recipe.sealed import damage, seal
from recipe.settings import RunFailed
from recipe.sharing.adapter_folder import unlike
from recipe.sharing.probes import as_generation_sees, encode_probes
from recipe.training.engine import asked_engine
from recipe.training.finite import in_words as rows_in_words
from recipe.training.trainer import TokenWeightedTrainer

_NEW_TOKENS = 4


def rehearse(
    trainer: TokenWeightedTrainer,
    run: Run,
    say: Callable[[str], None],
    *,
    memory: MemoryWatch | None = None,
    known: Path | None = None,
) -> None:
    """The longest micro-batch of the run forward and backward, an evaluation batch, a checkpoint
    saved and reopened, and a few generated tokens. Nothing of it stays in the run: no gradient, no
    file, and the random numbers that training draws are the same.

    Args:
        trainer: ready to take its first step; every process calls this.
        memory: sees the longest micro-batch.
        known: folder that tells which longest micro-batches went through before, with ``memory``.
            A fresh run of one process does not try one again while nothing has changed. None: each
            is tried.

    Raises:
        RunFailed: what cannot be done, and what to do about it.
    """
    started = time.perf_counter()
    said: list[str] = []

    def longest() -> None:
        said.append(_longest(trainer, run, memory, known))

    def evaluation() -> None:
        if trainer.eval_dataset:
            trainer.rehearse_evaluation()
            said.append("evaluation")

    def saving() -> None:
        _save_and_reopen(trainer)
        said.append("checkpoint saved and reopened")

    def generation() -> None:
        _generate(trainer, run.data)
        said.append("generation")

    parts = (longest, evaluation, saving, generation)
    visible = trainer.args.process_index == 0 and sys.stderr.isatty()
    with _undone(trainer):
        for part in tqdm(parts, desc="rehearsing", leave=False, disable=not visible):
            part()
    seconds = time.perf_counter() - started
    say(f"rehearsed {', '.join(said)} · {seconds:.1f} s · {in_words(peak_memory())}")


def _longest(
    trainer: TokenWeightedTrainer, run: Run, memory: MemoryWatch | None, known: Path | None
) -> str:
    """Try it, or find that it has been tried; which of these, in words."""
    rows = trainer.longest_micro_batch()
    many = rows_in_words([rows[0].index]) if len(rows) == 1 else f"{len(rows)} rows"
    if memory is None:
        return f"longest micro-batch ({many}, {trainer.rehearse_step(rows, None):,} tokens)"
    trial = _trial(trainer, run, known) if known else None
    if trial and (before := trial.before()):
        memory.recall(rows, before.saved)
        went = f"it went through on {before.date}, and nothing has changed"
        return f"longest micro-batch ({many}, {before.tokens:,} tokens; {went})"
    tokens = trainer.rehearse_step(rows, memory.saving(rows, trainer.model))
    if trial:
        trial.note(tokens, memory.saved)
    return f"longest micro-batch ({many}, {tokens:,} tokens)"


def _trial(trainer: TokenWeightedTrainer, run: Run, known: Path) -> Trial | None:
    """None where each start tries: with several processes, which would have to agree, and for a run
    that goes on. The longest may lie behind it, and the peak that it is held to would not be met.
    """
    device = run.arguments.device.type
    if run.arguments.world_size > 1 or trainer.state.global_step or device not in DEVICES:
        return None
    facts = {
        "rows": run.data.tokens_sha256,
        "base": run.base_sha256,
        "config": run.model.config.to_dict(),
        "engine": asked_engine().name,
        "device": device,
    }
    return Trial(known, device, circumstances(run.settings, facts))


@contextmanager
def _undone(trainer: TokenWeightedTrainer) -> Iterator[None]:
    drawn = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])


def _save_and_reopen(trainer: TokenWeightedTrainer) -> None:
    folder = Path(trainer.args.output_dir) / ".rehearsal.partial"
    trained = saved_state(trainer.model, whole_adapter(trainer.model))
    if trainer.args.process_index:
        trainer.write_states(folder)
        return
    folder.mkdir()
    try:
        trainer.write_states(folder)
        seal(folder)
        problems = damage(folder) + unlike(trained, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if problems:
        raise RunFailed(
            "a checkpoint that was written and read again is not what it was:\n"
            + "\n".join(problems)
        )


def _generate(trainer: TokenWeightedTrainer, data: Data) -> None:
    plain = trainer.model.get_base_model()
    _, (ids, *_) = encode_probes(data.template, data.tokenizer)
    with torch.no_grad(), as_generation_sees(plain):
        prompt = torch.tensor([ids], device=plain.device)
        found = plain.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=plain.config.eos_token_id,
        )
    if found.shape[-1] <= len(ids):
        raise RunFailed("the model generates nothing. Use another checkpoint.")
