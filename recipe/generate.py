"""Prompts become text, with the newest adapter and the template it was trained with.

    python recipe/generate.py --prompt "Name three primary colours."
    python recipe/generate.py --prompt "Name a fruit." strategy=sample temperature=0.7 top_p=0.9
    python recipe/generate.py --prompts questions.txt --output answers.jsonl strategy=beam_search
    python recipe/generate.py --prompt intelligent --shots "quick => fast" --template raw
    python recipe/generate.py --chat
    python recipe/generate.py --prompts questions.txt --lab decoding.yaml

    make infer PROMPT="Name three primary colours." STRATEGY=sample ARGS="temperature=0.7"

key=value are fields of transformers.GenerationConfig, written as in YAML, and strategy, one of
greedy_search, sample, beam_search, beam_sample, group_beam_search, constrained_beam_search,
contrastive_search, dola_generation, assisted_generation. configs/OPTIONS.md lists them. Without an
adapter (--adapter none) the base answers through its own chat template if it has one.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from recipe.data.prompts import Prompt, Shot, one_prompt, read_prompts, read_shots
from recipe.exit_codes import run_command
from recipe.settings import (
    TOGETHER,
    GenerationSettings,
    Problem,
    UserError,
    file_objection,
    generation_keys,
    generation_settings,
    load_lab,
)

_WHO = ("base", "adapter")
_PROMPT_FLAGS = ("--prompt", "--prompts", "--chat")
_NOT_TOGETHER = (
    ("--chat", "--output"),
    ("--chat", "--with"),
    ("--chat", "--lab"),
    ("--chat", "--batch-size"),
    ("--lab", "--with"),
    ("--lab", "--batch-size"),
)
_BATCH_SIZE = 16


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(arguments)
    asked = _read(args)
    # Only now: these imports take seconds, and a mistake is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.answerer import load_answerer

    answerer = load_answerer(
        adapter=args.adapter, model=args.model, template=args.template, runs=Path("runs")
    )
    if asked.strategies:
        from recipe.lab import run_lab

        run_lab(answerer, asked.prompts, asked.strategies, shots=asked.shots, output=args.output)
    elif args.chat:
        from recipe.chat import chat

        chat(answerer, asked.settings, shots=asked.shots)
    else:
        from recipe.ask import ask

        ask(
            answerer,
            asked.prompts,
            asked.settings,
            who=args.who.split(",") if args.who else [],
            shots=asked.shots,
            output=args.output,
            batch_size=args.batch_size or _BATCH_SIZE,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="one prompt; - reads it from standard input")
    add(
        "--prompts",
        metavar="FILE",
        help="one a line; .jsonl, .json, .csv and .parquet: a row each, with prompt, or "
        "instruction and input; - reads lines from standard input",
    )
    add("--chat", action="store_true", help="talk in this terminal")
    add(
        "--shots",
        action="append",
        default=[],
        metavar="SHOT",
        help='"quick => fast", or a file with one a line; may be repeated',
    )
    add("--adapter", help="an adapter's folder, or none; default: the newest run's")
    add("--with", dest="who", metavar="base,adapter", help="who answers, from one load")
    add(
        "--model",
        help="where the base lies, if not where the adapter says; with --adapter none, the base: "
        "the newest adapter's unless said",
    )
    add(
        "--template",
        choices=["alpaca", "chat", "raw"],
        help="with --adapter none, or for an adapter saved by plain peft; one of this recipe has "
        "its own, and takes raw beside it",
    )
    add(
        "--lab",
        metavar="FILE",
        help="compare the strategies of a YAML file, or of one in configs/lab, on the prompts",
    )
    add("--output", metavar="FILE", help="JSONL (--lab: JSON) instead of the screen; - is stdout")
    add("--batch-size", type=int, metavar="N", help="prompts decoded together; 16 unless said")
    add("keys", nargs="*", metavar="key=value", help="fields of GenerationConfig, and strategy")
    return parser


@dataclass
class _Asked:
    """What the arguments say, read and found sound."""

    prompts: list[Prompt] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)
    settings: GenerationSettings = field(default_factory=lambda: generation_settings({}))
    strategies: dict[str, GenerationSettings] = field(default_factory=dict)


def _read(args: argparse.Namespace) -> _Asked:
    """Everything that can be known without the model; all problems come in one report."""
    problems = _flag_problems(args)
    asked = _Asked()
    try:
        keys = generation_keys(args.keys)
        if args.lab:
            asked.strategies = load_lab(args.lab, keys)
        else:
            asked.settings = generation_settings(keys)
            problems += _key_problems(args, asked.settings)
    except UserError as error:
        problems += error.problems
    try:
        asked.shots = read_shots(args.shots)
    except UserError as error:
        problems += error.problems
    unread: list[str] = []
    try:
        if args.prompts:
            asked.prompts, unread = read_prompts(args.prompts)
        elif args.prompt is not None:
            asked.prompts = one_prompt(args.prompt)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    if unread:
        print(f"columns not used: {', '.join(unread[:10])}", file=sys.stderr)
    return asked


def _flag_problems(args: argparse.Namespace) -> list[Problem]:
    problems: list[Problem] = []

    def wrong(flag: str, said: str) -> None:
        problems.append(Problem(flag, said))

    for flag in ("--prompts", "--adapter", "--with", "--model", "--lab", "--output"):
        if getattr(args, "who" if flag == "--with" else flag[2:]) == "":
            wrong(flag, "empty. Give a value, or leave it out.")
    given = [flag for flag in _PROMPT_FLAGS if getattr(args, flag[2:]) not in (None, False)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        said = f"expected one of these, found {found}. Write --prompt TEXT."
        wrong(", ".join(_PROMPT_FLAGS), said)
    if args.adapter != "none":
        if args.template not in (None, "raw") and not _by_plain_peft(args.adapter):
            said = "an adapter brings its own template. Leave it out, or --adapter none."
            wrong("--template", said)
    elif args.who:
        wrong("--with", "needs an adapter. Leave out --adapter none.")
    who = args.who.split(",") if args.who else []
    if not set(who) <= set(_WHO) or len(set(who)) != len(who):
        wrong("--with", f"expected base, adapter or base,adapter; found {args.who!r}. Correct it.")
    for first, second in _NOT_TOGETHER:
        if _given(args, first) and _given(args, second):
            wrong(second, f"has no effect with {first}. Leave one out.")
    if args.chat and not (sys.stdin and sys.stdin.isatty()):
        wrong("--chat", "needs a terminal. Give prompts with --prompt or --prompts.")
    if args.batch_size is not None and args.batch_size < 1:
        wrong("--batch-size", f"{args.batch_size} is below 1. Use at least 1.")
    if args.output and args.output != "-" and (objection := file_objection(args.output)):
        wrong("--output", objection)
    return problems


def _by_plain_peft(adapter: str | None) -> bool:
    """Whether the adapter is a folder without the receipt that names its template."""
    if not adapter:
        return False
    if not os.path.isdir(adapter):  # noqa: PTH112
        return True  # on the hub, perhaps; told once it is fetched
    # os.path, because Path's own raise where a name is too long for any file system.
    config, receipt = (f"{adapter}/{name}.json" for name in ("adapter_config", "recipe"))
    return os.path.isfile(config) and not os.path.isfile(receipt)  # noqa: PTH113


def _given(args: argparse.Namespace, flag: str) -> bool:
    name = {"--with": "who"}.get(flag, flag[2:].replace("-", "_"))
    return getattr(args, name) not in (None, False)


def _key_problems(args: argparse.Namespace, settings: GenerationSettings) -> list[Problem]:
    """Keys and flags that do not go together."""
    problems = []
    if args.chat and "num_return_sequences" in settings.values:
        said = "a conversation goes on from one answer. Leave it out."
        problems.append(Problem("num_return_sequences", said))
    if args.batch_size and settings.strategy not in TOGETHER:
        said = f"{settings.strategy} takes one prompt after the other. Leave it out."
        problems.append(Problem("--batch-size", said))
    return problems


if __name__ == "__main__":
    sys.exit(run_command(main))
