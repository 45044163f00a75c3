"""A run's memory: forecast beside measured at its end, and what takes less where it lacked."""

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from recipe.data.batch import largest_batch
from recipe.data.tokens import TokenizedRow
from recipe.memory.account import account, lines
from recipe.memory.forecast import Forecast, Plan, forecast
from recipe.memory.remedies import Remedy, smaller
from recipe.memory.sharding import sharded
from recipe.memory.watch import MemoryWatch
from recipe.run_account import Run
from recipe.run_data import share_openings
from recipe.training.engine import asked_engine
from recipe.training.pace import Pace
from recipe.training.run_folder import note_in_manifest

_SHOWN = 4


def forecasts_told(run: Run, memory: MemoryWatch | None, pace: Pace, folder: Path) -> list[str]:
    """What was forecast of memory and time beside what was measured, into the manifest; and lines
    for the screen. The run is trained, and not saved yet: nothing here may end it.
    """
    try:
        said = _memory(run, memory, folder) if memory else []
        if (seconds := pace.account()) is not None:
            note_in_manifest(folder, time=seconds)
        return [*said, *pace.lines()]
    except Exception as error:
        said_of_it = " ".join(str(error).split())[:120]
        return [f"memory    no forecast: {type(error).__name__}: {said_of_it}"]


def _memory(run: Run, memory: MemoryWatch, folder: Path) -> list[str]:
    found = memory.measured(run.model)
    if found is None:
        return []
    evaluated = largest_batch(run.data.held_out.rows, run.arguments.per_device_eval_batch_size)
    ahead = forecast(_plan(run, memory.rows, evaluated, imported=memory.imported))
    processes = run.arguments.world_size
    if processes > 1:
        shares = sharded(ahead, processes=processes, strategy=asked_engine().name)
        parts = processes if asked_engine().shards else 1
        ahead = replace(ahead, items=shares.items, gradients=-(-ahead.gradients // parts))
    note_in_manifest(folder, memory=account(ahead, found))
    return lines(ahead, found)


def what_takes_less(run: Run) -> Callable[[Collection[int], bool, int], str]:
    """What to do where the memory did not suffice for rows, by their ``index``: whether they were
    evaluated, and behind which step.
    """

    def told(indices: Collection[int], evaluating: bool, step: int) -> str:
        asked = set(indices)
        rows = [row for row in _rows(run, evaluating) if row.index in asked]
        trained = rows[:1] if evaluating else rows
        plan = _plan(run, trained, rows if evaluating else [], imported=0)
        ahead = forecast(plan)
        ways = [way for way in smaller(plan, ahead) if not step or _may_change(way)][:_SHOWN]
        if not ways:
            return "Use a smaller model, or data.max_length to leave out long rows"
        return "What takes less, first what trains the same: " + "; ".join(
            f"{shlex.join(way.overrides)} ({_saved(ahead, way):.2f} GiB less "
            f"by forecast, {way.time:.2f} of the time{'' if way.same else ', trains otherwise'})"
            for way in ways
        )

    return told


def _saved(ahead: Forecast, way: Remedy) -> float:
    """GiB of what is allocated, which needs no assumption."""
    return (ahead.allocated - way.forecast.allocated) / 2**30


def _may_change(way: Remedy) -> bool:
    """Whether a run that has begun may go on so: checkpoints hold what fits base and optimizer."""
    return not any(one.startswith(("model.", "training.optim=")) for one in way.overrides)


def _rows(run: Run, evaluating: bool) -> Sequence[TokenizedRow]:
    return run.data.held_out.rows if evaluating else run.data.train.rows


def _plan(
    run: Run, rows: Sequence[TokenizedRow], evaluated: Sequence[TokenizedRow], *, imported: int
) -> Plan:
    return Plan(
        run.settings,
        run.model.config,
        rows,
        evaluated,
        device=run.arguments.device.type,
        share_openings=share_openings(run.settings),
        imported=imported,
    )
