"""How quick training is, against stock Trainer and TRL with the same rows, model and LoRA.

    make bench
    make bench ARGS="--rows 0:64 --rounds 1"
    make bench ARGS="--growth"                          draws docs/speed-growth.png

Each subject runs in a fresh process, all of them once a round, in an order that moves on by one
from round to round; the round's number is the seed. Training is timed from on_train_begin to
on_train_end and counted in the tokens of the rows, padding not, shared openings and the ends of
rows in full. This process imports no torch: on Linux a child's peak memory begins with that of its
parent.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
ALPACA = REPOSITORY.parent / "shared/data/alpaca_first1000.json"  # as in tests/conftest.py
STARTER_ROWS = REPOSITORY / "configs/data/starter.json"
PLOT = REPOSITORY / "docs/speed-growth.png"
# Name → what it changes in `data:`; the peers do not read it.
SUBJECTS: dict[str, dict[str, Any]] = {
    "recipe": {"share_openings": False},
    "recipe, shared openings": {"share_openings": True},
    "trainer": {},
    "trainer, length grouped": {},
    "trl": {},
}
REFERENCE = "trainer"
SAME_LOSS = 0.02
VOID = 3
Result = dict[str, Any]


def config(args: argparse.Namespace, data: dict[str, Any], *, seed: int, folder: Path) -> Result:
    return {
        "model": {"name_or_path": args.model, "dtype": args.dtype},
        "lora": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": args.dropout,
            "target_modules": ["q_proj", "v_proj"],
        },
        "data": {"path": str(args.data), "rows": args.rows, **data},
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
        },
    }


def run(
    subject: str, args: argparse.Namespace, *more: str, seed: int = 0, data: Result | None = None
) -> Result:
    """One subject in a process of its own; a line on stderr when it is through."""
    environment = {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="recipe-bench-") as name:
        folder = Path(name)
        given = config(args, data or {}, seed=seed, folder=folder)
        (folder / "bench.yaml").write_text(yaml.safe_dump(given))
        result = folder / "result.json"
        command = [sys.executable, "-m", "tests.benchmarks.peers", subject]
        done = subprocess.run(
            [*command, str(folder / "bench.yaml"), str(result), *more],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(
                f"{subject} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
            )
        found: Result = json.loads(result.read_text())
    said = f"{found['seconds']:.1f} s of training" if "seconds" in found else ""
    said = said or f"{found['flops'] / 1e9:.1f} GFLOP/s"
    print(f"{subject}: {said}, {time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    return found


def measure(args: argparse.Namespace, names: Sequence[str]) -> tuple[list[Result], list[Result]]:
    """Of each round every subject's result, and all bounds.

    The bound is measured before and after each subject, as a machine that others use as well gives
    another rate from minute to minute; ``bound_tokens_per_second`` of a result is their mean.
    """
    rounds: list[Result] = []
    bounds = [run("bound", args)]
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        first = number % len(names)
        rounds.append({})
        for name in [*names[first:], *names[:first]]:
            judged = ("--judged", args.judged)
            result = run(name, args, *judged, seed=number, data=SUBJECTS[name])
            bounds.append(run("bound", args))
            around = statistics.fmean(one["tokens_per_second"] for one in bounds[-2:])
            rounds[-1][name] = {**result, "bound_tokens_per_second": around}
    return rounds, bounds


def speed(result: Result) -> float:
    return float(result["tokens"] / result["seconds"])


def spread(values: Sequence[float], form: str) -> str:
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def versions() -> str:
    told = []
    for name in ("torch", "transformers", "peft", "trl"):
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            told.append(f"no {name}")
    return ", ".join(told)


def table(names: Sequence[str], rounds: list[Result], bounds: list[Result]) -> None:
    any_result, most = rounds[0][names[0]], bounds[0]
    bound = statistics.median(one["tokens_per_second"] for one in bounds)
    rates = [one["flops"] / 1e9 for one in bounds]
    print(
        f"\n{any_result['device']} ({platform.machine()}), {any_result['threads']} threads · "
        f"{versions()} · {datetime.now(UTC):%Y-%m-%d}\n"
        f"{any_result['rows']} rows, {any_result['tokens']:,} tokens, {any_result['trained']:,} of "
        f"them trained; rounds: {len(rounds)}; median (min–max)\n\n"
        f"bound: {spread(rates, ',.0f')} GFLOP/s of matrix products in this model's shapes / "
        f"(4 · {most['weights']:,} weights) = {bound:,.1f} tokens/s; a run's share is taken of the "
        f"mean of the two measured right before and after it.\n"
        "  4 FLOP a weight and token: 2 forward, 2 backward to the inputs; every position goes "
        "through the head; frozen weights need no gradient.\n"
    )
    print(
        "| | real tokens/s | times the best peer | share of bound | peak GiB | "
        "held-out perplexity | logged loss, last quarter |"
    )
    print("|---|---|---|---|---|---|---|")
    peers = [name for name in names if not name.startswith("recipe")]
    for name in names:
        mine = [one[name] for one in rounds]
        ratio = "–"
        if peers:
            best = [max(speed(one[peer]) for peer in peers) for one in rounds]
            ratio = spread([speed(a) / b for a, b in zip(mine, best, strict=True)], ".2f")
        speeds = [speed(one) for one in mine]
        shares = [speed(one) / one["bound_tokens_per_second"] for one in mine]
        middle = {
            key: statistics.median(one[key] for one in mine)
            for key in ("bytes", "last_quarter_loss")
        }
        print(
            f"| {name} | {spread(speeds, ',.0f')} | {ratio} | "
            f"{spread(shares, '.0%')} | {middle['bytes'] / 2**30:.2f} | "
            f"{spread([math.exp(one['loss']) for one in mine], '.3f')} | "
            f"{middle['last_quarter_loss']:.4f} |"
        )


def verdict(names: Sequence[str], rounds: list[Result]) -> bool:
    """Whether all did the same work, said line by line."""
    valid = True
    for name in names:
        for number, one in enumerate(rounds, 1):
            wrong = other_work(name, one[name], one[names[0]])
            if wrong:
                print(f"comparison void: {name}, round {number}: {wrong}")
                valid = False
        if name == REFERENCE or REFERENCE not in names:
            continue
        away = statistics.median(one[name]["loss"] / one[REFERENCE]["loss"] - 1 for one in rounds)
        if abs(away) < SAME_LOSS:
            print(f"{name}: held-out loss {away:+.2%} from {REFERENCE}'s")
        else:
            print(f"comparison void: {name}: held-out loss {away:+.2%} from {REFERENCE}'s")
            valid = False
    if valid:
        print("all saw the same tokens and trained the same ones")
    return valid


def other_work(name: str, result: Result, first: Result) -> str:
    if result["tokens_sha256"] != first["tokens_sha256"]:
        return "other token ids or another mask"
    if result["trained_seen"] != result["trained"]:
        return f"{result['trained_seen']} trained tokens seen, not {result['trained']}"
    if result["tokens_seen"] != result["tokens"]:
        return f"{result['tokens_seen']} tokens seen, not {result['tokens']}"
    return ""


def grow(args: argparse.Namespace) -> list[Result]:
    """The table and the picture of how a step grows with its micro-batch."""
    found = []
    for tokens in args.sizes:
        # Nothing shared: repeated rows have more in common than rows do.
        found.append(run("growth", args, "--tokens", str(tokens), data=SUBJECTS["recipe"]))
    first = found[0]
    print(
        f"\n{first['device']} ({platform.machine()}), {first['threads']} threads · {versions()} · "
        f"{datetime.now(UTC):%Y-%m-%d}; openings not shared\n\n"
        "| tokens of a micro-batch | rows | s a step | tokens/s | peak GiB | before training |\n"
        "|---|---|---|---|---|---|"
    )
    for one in found:
        print(
            f"| {one['tokens']:,} | {one['rows']} | {one['step_seconds']:.2f} | "
            f"{one['tokens'] / one['step_seconds']:,.0f} | {one['bytes'] / 2**30:.2f} | "
            f"{one['bytes_before'] / 2**30:.2f} |"
        )
    draw(found, args.plot)
    print(f"\n{args.plot}")
    return found


def draw(found: list[Result], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [one["tokens"] for one in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    seconds = [one["step_seconds"] for one in found]
    left.plot(tokens, seconds, "o-", label="measured")
    straight = [seconds[0] * count / tokens[0] for count in tokens]
    left.plot(tokens, straight, ":", color="grey", label="in proportion to tokens")
    left.set(ylabel="seconds a step")
    right.plot(tokens, [one["bytes"] / 2**30 for one in found], "o-", label="peak")
    before = [one["bytes_before"] / 2**30 for one in found]
    right.plot(tokens, before, ":", color="grey", label="before training")
    right.set(ylabel="memory, GiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=45)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="tokens of a micro-batch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("RECIPE_ALPACA")
    data = Path(given) if given else ALPACA if ALPACA.is_file() else STARTER_ROWS
    parser.add_argument("--data", type=Path, default=data, help="JSON rows; also RECIPE_ALPACA")
    parser.add_argument("--rows", default="0:200")
    parser.add_argument("--judged", default="200:300", help="held-out rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--peers", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--json", type=Path, default=REPOSITORY / "build/bench.json")
    parser.add_argument("--growth", action="store_true", help="of a step with its micro-batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**n for n in range(8, 14)])
    parser.add_argument("--plot", type=Path, default=PLOT, help="where --growth draws")
    args = parser.parse_args()
    args.data = args.data.resolve()
    return args


def main() -> None:
    args = asked()
    if args.growth:
        grow(args)
        return
    names = list(args.peers)
    if "trl" in names and find_spec("trl") is None:
        names.remove("trl")
        print("trl is left out: it is not installed here (`make bench` does).", file=sys.stderr)
    rounds, bounds = measure(args, names)
    table(names, rounds, bounds)
    print()
    valid = verdict(names, rounds)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    told = {"versions": versions(), "rows": args.rows, "rounds": rounds, "bounds": bounds}
    args.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(0 if valid else VOID)


if __name__ == "__main__":
    main()
