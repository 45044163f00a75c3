"""A run's memory: forecast beside measured at its end, and what takes less where it lacked."""

from collections.abc import Callable, Sequence
from pathlib import Path

from recipe.data.batch import largest_batch
from recipe.data.tokens import TokenizedRow
from recipe.memory.account import account, lines
from recipe.memory.forecast import Plan, forecast
from recipe.memory.remedies import smaller
from recipe.memory.watch import MemoryWatch
from recipe.run_account import Run
from recipe.run_data import share_openings
from recipe.training.run_folder import note_in_manifest

_SHOWN = 4


def memory_told(run: Run, memory: MemoryWatch | None, folder: Path) -> list[str]:
    """Forecast beside measured, into the manifest; and lines for the screen."""
    found = memory.measured(run.model) if memory else None
    if memory is None or found is None:
        return []
    evaluated = largest_batch(run.data.held_out.rows, run.arguments.per_device_eval_batch_size)
    try:
        ahead = forecast(_plan(run, memory.rows, evaluated, imported=memory.imported))
    except Exception as error:  # the run is trained, and not saved yet: nothing here may end it
        return [
            f"memory    no forecast: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        ]
    note_in_manifest(folder, memory=account(ahead, found))
    return lines(ahead, found)


def what_takes_less(run: Run) -> Callable[[Sequence[int], bool], str]:
    """What to do where the memory did not suffice for rows, by their ``index``."""

    def told(indices: Sequence[int], evaluating: bool) -> str:
        rows = [row for row in _rows(run, evaluating) if row.index in set(indices)]
        trained = rows[:1] if evaluating else rows
        plan = _plan(run, trained, rows if evaluating else [], imported=0)
        ahead = forecast(plan)
        ways = smaller(plan, ahead)[:_SHOWN]
        if not ways:
            return "Use a smaller model"
        return "What takes less, quickest first: " + "; ".join(
            f"{' '.join(way.overrides)} ({(ahead.peak - way.forecast.peak) / 2**30:.2f} GiB less "
            f"by forecast, {way.time:.2f} of the time{'' if way.same else ', trains otherwise'})"
            for way in ways
        )

    return told


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
