"""Runs are killed at random instants and resumed; each must end as one that nobody killed.

    make torture N=100                                   a tiny model, every scenario
    make torture N=100 ARGS="--seed 7 --scenarios one-checkpoint best-at-end"
    make torture N=10 ARGS="--model starter"
    make torture N=10 ARGS="--processes 2"
    make torture ARGS="--signals 20"                     SIGTERM by each way of starting

A kill is SIGKILL to the run's whole group, at an instant that counts from its first step. The same
seed draws the same runs and instants. Exit 3 if any run differs; its folder stays.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from tests.faults.board import PHASES
from tests.faults.jobs import Server
from tests.faults.scenarios import SCENARIOS, STARTER, TWO_PROCESSES, Scenario
from tests.faults.torment import Outcome, Reference, Tormentor, cores, draw_aims

Prepared = tuple[Scenario, Tormentor, Reference]


def main() -> int:
    args = parse()
    # Its environment reaches every run: a token cache of our own, no hub, no network.
    from tests import conftest

    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.folder))
    print(f"seed {args.seed} · {folder}", flush=True)
    if args.signals:
        from tests.faults.signals_table import signal_table

        return signal_table(folder, args.signals, seed=args.seed)
    started = time.monotonic()
    model = str(conftest.STARTER) if args.model == "starter" else str(tiny_checkpoint(folder))
    rows = folder / "rows.json"
    rows.write_text(json.dumps(conftest.ROWS))
    with Server() as server:
        prepared = list(prepare(server, args, folder=folder, model=model, rows=rows))
        outcomes = torture(prepared, args, folder=folder)
    report(outcomes, time.monotonic() - started)
    failed = [outcome for outcome in outcomes if outcome.problems]
    if not failed:
        shutil.rmtree(folder)
    return 3 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--model", choices=("tiny", "starter"), default="tiny")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as cores")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--signals", type=int, metavar="N", help="N SIGTERMs by each way instead")
    args = parser.parse_args()
    args.jobs = args.jobs or max(1, cores() // args.processes)
    known = {s.name: s for s in (*SCENARIOS, *STARTER, *TWO_PROCESSES)}
    unknown = set(args.scenarios or ()) - set(known)
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}. Choose among {', '.join(known)}.")
    usual = STARTER if args.model == "starter" else SCENARIOS
    usual = TWO_PROCESSES if args.processes == 2 else usual
    args.scenarios = [known[name] for name in args.scenarios or ()] or usual
    return args


def tiny_checkpoint(folder: Path) -> Path:
    """The model of the tests' fixture; the fixture itself is pytest's."""
    from transformers.utils import logging

    from tests import conftest

    logging.disable_progress_bar()

    class Factory:
        def mktemp(self, name: str) -> Path:
            return folder / name

    return conftest.tiny_checkpoint.__wrapped__(Factory())


def prepare(
    server: Server, args: argparse.Namespace, *, folder: Path, model: str, rows: Path
) -> Iterator[Prepared]:
    """Each scenario with its uninterrupted run."""
    for scenario in args.scenarios:
        config = scenario.write_config(folder, model=model, rows=rows)
        tormentor = Tormentor(server, config, processes=args.processes)
        reference = tormentor.reference(folder / f"reference-{scenario.name}")
        measured = reference.measured
        print(
            f"{scenario.name:<30} {measured.seconds:5.2f} s · {measured.entries['save']} saves of "
            f"{1000 * measured.mean_seconds['save']:.0f} ms, each up to "
            f"{measured.operations['save']} touches of the disk",
            flush=True,
        )
        yield scenario, tormentor, reference


def torture(prepared: list[Prepared], args: argparse.Namespace, *, folder: Path) -> list[Outcome]:
    """Go round the scenarios until so many kills have hit; a run that was too quick counts none."""
    numbers = count()
    outcomes: list[Outcome] = []

    def one(number: int) -> Outcome:
        scenario, tormentor, reference = prepared[number % len(prepared)]
        chance = random.Random(f"{args.seed}/{number}")
        aims = draw_aims(chance, reference.measured)
        place = folder / f"{number:04d}-{scenario.name}"
        outcome = tormentor.torment(reference, place, aims=aims)
        if outcome.problems:
            print(f"DIFFERS run {number}: {outcome}", flush=True)
        else:
            shutil.rmtree(place)
        return outcome

    with ThreadPoolExecutor(args.jobs) as pool:
        while (missing := args.kills - sum(len(o.kills) for o in outcomes)) > 0:
            # Never more runs than kills are missing, so that few come in excess.
            some = max(1, min(missing * 2 // 3, 26))
            outcomes += pool.map(one, [next(numbers) for _ in range(some)])
            kills = sum(len(o.kills) for o in outcomes)
            failed = sum(bool(o.problems) for o in outcomes)
            print(f"{kills} kills in {len(outcomes)} runs, {failed} differ", flush=True)
    return outcomes


def report(outcomes: list[Outcome], seconds: float) -> None:
    where = Counter(kill.phase for outcome in outcomes for kill in outcome.kills)
    kills = sum(where.values())
    equal = sum(len(outcome.kills) for outcome in outcomes if not outcome.problems)
    names = {"between": "between micro-batches"}
    print("\n| scenario | runs | kills | of those in equal runs |\n|---|---|---|---|")
    for name in dict.fromkeys(outcome.scenario for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scenario == name]
        struck = sum(len(outcome.kills) for outcome in mine)
        good = sum(len(outcome.kills) for outcome in mine if not outcome.problems)
        print(f"| {name} | {len(mine)} | {struck} | {good} |")
    print("\n| killed in | kills | |\n|---|---|---|")
    for phase in PHASES:
        print(f"| {names.get(phase, phase)} | {where[phase]} | {where[phase] / kills:.0%} |")
    print(f"\n{kills} kills in {len(outcomes)} runs, {equal} equal, {seconds:.0f} s")
    if where["save"] < kills / 3:
        print("less than a third of the kills fell inside a save")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the runs
    sys.exit(main())
