"""Killed at any instant and resumed, a run is the run that nobody killed. `make torture` does more.

The saves are where it is hard, so some runs wait just before the n-th time that a save touches the
disk; nothing here depends on how quick the machine is.
"""

import pytest

from tests.faults.aims import Aim

# Where the run is held for the kill, and the phase in which it then must be.
KILLS = {
    "before anything of the first save": ("evaluation-by-epoch", [Aim("save", 1, operation=1)]),
    "between micro-batches": ("evaluation-by-epoch", [Aim("between", 5, operation=0)]),
    "in a step": ("evaluation-by-epoch", [Aim("step", 12, operation=0)]),
    "in an evaluation": ("evaluation-by-epoch", [Aim("evaluation", 3, operation=0)]),
    "in the adapter": ("evaluation-by-epoch", [Aim("adapter", operation=4)]),
    "in a save, then at its end": (
        "one-checkpoint",
        [Aim("save", 3, operation=6), Aim("save", 2, operation=99)],
    ),
    "where old ones are removed": ("one-checkpoint", [Aim("save", 5, operation=98)]),
    "with data workers": ("data-workers", [Aim("save", 3, operation=3)]),
    "between two records": ("records-span-windows", [Aim("save", 5, operation=8)]),
    "the best one stays": ("best-at-end", [Aim("save", 3, operation=9)]),
}


@pytest.mark.parametrize(
    "name",
    [
        name if number % 2 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(KILLS)
    ],
)
def test_a_killed_run_ends_as_if_nobody_had(prepare, tmp_path, name):
    scenario, aims = KILLS[name]
    tormentor, reference = prepare(scenario)
    most = reference.measured.operations
    aims = [
        # 99 is the last touch of the disk, 98 the one before.
        Aim(a.phase, a.entry, operation=most[a.phase] - 99 + a.operation)
        if (a.operation or 0) >= 98
        else a
        for a in aims
    ]
    outcome = tormentor.torment(reference, tmp_path / "killed", aims=aims)
    assert outcome.problems == [], outcome
    assert [kill.phase for kill in outcome.kills] == [aim.phase for aim in aims]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["one-checkpoint", "best-at-end"])
def test_a_save_survives_a_kill_before_each_touch_of_the_disk(prepare, tmp_path, scenario):
    tormentor, reference = prepare(scenario)
    for operation in range(1, reference.measured.operations["save"] + 1):
        aim = Aim("save", 3, operation=operation)
        outcome = tormentor.torment(reference, tmp_path / f"killed-{operation}", aims=[aim])
        assert outcome.problems == [], outcome
