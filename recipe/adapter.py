"""What can be done with a finished adapter: check it, look into it, merge, combine, publish it.

    python recipe/adapter.py verify runs/starter-001
    python recipe/adapter.py inspect runs/starter-001 --plot inspect.png
    python recipe/adapter.py merge runs/starter-001 --output models/mine --dtype float16
    python recipe/adapter.py combine runs/a runs/b --weights 0.5 0.5 --output runs/a-and-b
    python recipe/adapter.py push user/name --adapter runs/starter-001 --license apache-2.0
    python recipe/adapter.py pull user/name --output adapters/name

    make verify ADAPTER=runs/starter-001
    make push REPO=user/name

An adapter is its folder, the run that holds it, or user/name on the hub; the newest run's unless
said. verify exits with 3 and a line for each problem if it is not what was trained.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from recipe.exit_codes import run_command
from recipe.settings import (
    HubSettings,
    Problem,
    RunFailed,
    UserError,
    file_objection,
    folder_objection,
    options,
)

_RUNS = Path("runs")
_DTYPES = ("float32", "float16", "bfloat16")
_COMBINATIONS = ("linear", "cat", "svd")


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError.single(
            "adapter.py",
            f"{os.environ['WORLD_SIZE']} processes were started, and each would hold the whole "
            "base and do the same. Start one: python recipe/adapter.py …",
        )
    _check(args)
    # Only now: these imports take seconds, and a mistake in the arguments is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    {
        "verify": _verify,
        "inspect": _inspect,
        "merge": _merge,
        "combine": _combine,
        "push": _push,
        "pull": _pull,
    }[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    verify = command("verify", "is it what was trained, and does it still answer as it did?")
    inspect = command("inspect", "how large is the change, where, and of which rank?")
    merge = command("merge", "base and adapter become one plain model, with a certificate")
    combine = command("combine", "several adapters of one base become one")
    push = command("push", "publish it on the hub, then fetch and verify what was published")
    pull = command("pull", "fetch one from the hub and verify it")
    for one in (verify, inspect, merge):
        one.add_argument("adapter", nargs="?", help="folder, run or user/name; default: the newest")
    combine.add_argument("adapters", nargs="+", metavar="adapter", help="two or more")
    for one in (verify, inspect, merge, combine, push, pull):
        one.add_argument("--model", help="where the base lies, if not where the adapter says")
    inspect.add_argument("--each-layer", action="store_true", help="a line for each module")
    inspect.add_argument("--plot", metavar="FILE", help="draw it, as .png")
    inspect.add_argument("--output", metavar="FILE", help="all figures, as JSON")
    merge.add_argument("--output", required=True, metavar="FOLDER", help="must not exist")
    merge.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: the base's")
    combine.add_argument("--output", required=True, metavar="FOLDER", help="must not exist")
    combine.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each; default: equal shares"
    )
    combine.add_argument("--combination-type", choices=_COMBINATIONS, default="cat", help="peft's")
    combine.add_argument("--svd-rank", type=int, metavar="R", help="with svd; default: the largest")
    push.add_argument("repo", help="user/name")
    push.add_argument("--adapter", help="folder or run; default: the newest")
    push.add_argument("--license", help="identifier of the hub, such as apache-2.0")
    push.add_argument("--base-model", metavar="ID", help="hub id of a base that lies in a folder")
    push.add_argument("--samples", metavar="FILE", help="prompts whose answers the card shows")
    push.add_argument("--public", action="store_true", help="everybody may see it")
    push.add_argument("--dry-run", action="store_true", help="show the card and send nothing")
    pull.add_argument("repo", help="user/name")
    pull.add_argument("--revision", help="branch, tag or commit; default: the main branch")
    pull.add_argument("--output", metavar="FOLDER", help="must not exist; default: in the cache")
    return parser


def _check(args: argparse.Namespace) -> None:
    problems: list[Problem] = []
    if args.command == "combine":
        if len(args.adapters) < 2:
            problems.append(Problem("adapter", "one alone cannot be combined. Name two or more."))
        if args.weights and len(args.weights) != len(args.adapters):
            said = f"{len(args.weights)} for {len(args.adapters)} adapters. Give one for each."
            problems.append(Problem("--weights", said))
        if args.weights and (not all(map(math.isfinite, args.weights)) or not any(args.weights)):
            said = "expected numbers, not all of them zero. Correct them."
            problems.append(Problem("--weights", said))
        if args.svd_rank is not None and (args.svd_rank < 1 or args.combination_type != "svd"):
            said = "goes with --combination-type svd and is at least 1. Correct it."
            problems.append(Problem("--svd-rank", said))
    for key, where in (
        ("repo_id", "repo"),
        ("license", "--license"),
        ("base_model", "--base-model"),
    ):
        value = getattr(args, where.lstrip("-").replace("-", "_"), None)
        if value is not None and (objection := options("hub")[key].objection(value)):
            problems.append(Problem(where, objection.replace(" or null", "")))
    if getattr(args, "adapter", None) == "none":
        said = "none is the base alone, and this is about an adapter. Name one."
        problems.append(Problem("adapter", said))
    problems += _output_problems(args)
    if problems:
        raise UserError(problems)


def _output_problems(args: argparse.Namespace) -> list[Problem]:
    makes_folder = args.command in ("merge", "combine", "pull")
    problems = []
    for flag in ("plot", "output"):
        named = getattr(args, flag, None)
        if named is None:
            continue
        objection = folder_objection(named) if makes_folder else file_objection(named)
        if objection is None and flag == "plot" and not named.endswith(".png"):
            objection = f"expected a name that ends in .png, found {named!r}. Correct it."
        if objection:
            problems.append(Problem(f"--{flag}", objection))
    return problems


def _verify(args: argparse.Namespace) -> None:
    from recipe.verify import report, verified

    answerer = verified(args.adapter, model=args.model, runs=_RUNS)
    print("\n".join([answerer.described, *report(answerer)]))
    assert answerer.verification is not None
    if answerer.verification.unproven:
        raise RunFailed(
            f"unproven: {answerer.verification.unproven}. Nothing is wrong with it as far as can "
            "be seen, but nothing says on which weights, tokenizer and template it was trained, or "
            "what it should answer."
        )
    if answerer.verification.told_apart:
        print("verified   it is what was trained, and answers as it did")
    else:
        print(
            "verified   it is what was trained; whether it answers as it did these probes cannot "
            "tell, because it moves them so little"
        )


def _inspect(args: argparse.Namespace) -> None:
    from recipe.answerer import load_answerer
    from recipe.sharing.inspection import inspect_adapter
    from recipe.sharing.inspection_report import as_json, in_words, plot, table

    answerer = load_answerer(adapter=args.adapter, model=args.model, template="raw", runs=_RUNS)
    changes = inspect_adapter(answerer.model)
    print("\n".join([*table(changes, each_layer=args.each_layer), "", *in_words(changes)]))
    if args.plot:
        plot(changes, Path(args.plot), title=str(answerer.folder))
        print(f"drawn in {args.plot}")
    if args.output:
        Path(args.output).write_text(json.dumps(as_json(changes), indent=1) + "\n")
        print(f"all figures in {args.output}")


def _merge(args: argparse.Namespace) -> None:
    from recipe.merge import merge

    lines = merge(args.adapter, Path(args.output), dtype=args.dtype, model=args.model, runs=_RUNS)
    print("\n".join(lines))


def _combine(args: argparse.Namespace) -> None:
    from recipe.combine import Combination, combine

    count = len(args.adapters)
    weights = args.weights or [1 / count] * count
    asked = Combination(args.adapters, weights, args.combination_type, args.svd_rank)
    print("\n".join(combine(asked, Path(args.output), model=args.model, runs=_RUNS)))


def _push(args: argparse.Namespace) -> None:
    from recipe.publish import publish

    hub = HubSettings(
        push=True,
        repo_id=args.repo,
        private=not args.public,
        license=args.license,
        base_model=args.base_model,
    )
    publish(
        args.adapter, hub, model=args.model, samples=args.samples, dry_run=args.dry_run, runs=_RUNS
    )


def _pull(args: argparse.Namespace) -> None:
    from recipe.publish import pull

    print("\n".join(pull(args.repo, args.revision, _path(args.output), model=args.model)))


def _path(named: Any) -> Path | None:
    return Path(named) if named else None


if __name__ == "__main__":
    sys.exit(run_command(main))
