"""Prompts become text, with the newest adapter and the template it was trained with.

    python recipe/generate.py --prompt "Name three primary colours."
    python recipe/generate.py --prompt "Name a fruit." strategy=sample temperature=0.7 top_p=0.9
    python recipe/generate.py --prompts questions.txt --output answers.jsonl strategy=beam_search
    python recipe/generate.py --prompt intelligent --shots "quick => fast" --template raw
    python recipe/generate.py --chat
    python recipe/generate.py --prompts questions.txt --lab decoding_lab.yaml

    make infer PROMPT="Name three primary colours." STRATEGY=sample ARGS="temperature=0.7"

key=value are fields of transformers.GenerationConfig, written as in YAML, and strategy, one of
greedy_search, sample, beam_search, beam_sample, group_beam_search, constrained_beam_search,
contrastive_search, dola_generation, assisted_generation. configs/OPTIONS.md lists them. Without an
adapter (--adapter none) the base answers through its own chat template if it has one.
"""

import argparse
import sys
from pathlib import Path

from recipe.data.prompts import Prompt, one_prompt, read_prompts, read_shots
from recipe.exit_codes import run_command
from recipe.settings import (
    GenerationSettings,
    Problem,
    UserError,
    generation_keys,
    generation_settings,
    load_lab,
)

_WHO = ("base", "adapter")
_PROMPT_FLAGS = ("--prompt", "--prompts", "--chat")


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(arguments)
    who = _who(args)
    prompts, settings, strategies = _read(args)
    shots = read_shots(args.shots)
    # Only now: these imports take seconds, and a mistake is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.answerer import load_answerer

    answerer = load_answerer(
        adapter=args.adapter, model=args.model, template=args.template, runs=Path("runs")
    )
    if strategies:
        from recipe.lab import run_lab

        run_lab(answerer, prompts, strategies, shots=shots, output=args.output)
    elif args.chat:
        from recipe.chat import chat

        chat(answerer, settings, shots=shots)
    else:
        from recipe.ask import ask

        ask(
            answerer,
            prompts,
            settings,
            who=who,
            shots=shots,
            output=args.output,
            batch_size=args.batch_size,
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
    add("--model", help="the base, with --adapter none; default: the newest adapter's base")
    add(
        "--template",
        choices=["alpaca", "chat", "raw"],
        help="with --adapter none; an adapter has its own, and takes raw beside it",
    )
    add("--lab", metavar="FILE", help="compare the strategies of a YAML file on --prompts")
    add("--output", metavar="FILE", help="JSONL (--lab: JSON) instead of the screen; - is stdout")
    add("--batch-size", type=int, default=16, metavar="N", help="prompts decoded together (16)")
    add("keys", nargs="*", metavar="key=value", help="fields of GenerationConfig, and strategy")
    return parser


def _who(args: argparse.Namespace) -> list[str]:
    """Who answers. Everything that is wrong with the flags is told here, and at once."""
    problems: list[Problem] = []
    given = [flag for flag in _PROMPT_FLAGS if getattr(args, flag[2:]) not in (None, False)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        said = f'expected one of these, found {found}. Write --prompt "…".'
        problems.append(Problem(", ".join(_PROMPT_FLAGS), said))
    if args.batch_size < 1:
        problems.append(Problem("--batch-size", f"{args.batch_size} is below 1. Use at least 1."))
    if args.adapter != "none":
        if args.model:
            said = "an adapter brings its own base. Leave it out, or add --adapter none."
            problems.append(Problem("--model", said))
        if args.template not in (None, "raw"):
            said = "an adapter brings its own template. Leave it out, or add --adapter none."
            problems.append(Problem("--template", said))
    who = args.who.split(",") if args.who else []
    if args.who and (not set(who) <= set(_WHO) or len(set(who)) != len(who)):
        said = f"expected base, adapter or base,adapter; found {args.who!r}. Correct it."
        problems.append(Problem("--with", said))
    elif who and args.adapter == "none":
        problems.append(Problem("--with", "needs an adapter. Leave out --adapter none."))
    if args.chat:
        for flag in ("output", "who", "lab"):
            if getattr(args, flag):
                name = "with" if flag == "who" else flag
                problems.append(Problem(f"--{name}", "does not go with --chat. Leave one out."))
        if not (sys.stdin and sys.stdin.isatty()):
            said = "needs a terminal. Give prompts with --prompt or --prompts."
            problems.append(Problem("--chat", said))
    if args.lab and args.who:
        problems.append(Problem("--with", "does not go with --lab. Leave one out."))
    output = args.output
    if output and output != "-" and Path(output).exists():
        said = f"{output} exists already, and nothing is overwritten. Name another file."
        problems.append(Problem("--output", said))
    elif output and output != "-" and not Path(output).absolute().parent.is_dir():
        said = f"there is no folder {Path(output).parent}. Make it, or correct the path."
        problems.append(Problem("--output", said))
    if problems:
        raise UserError(problems)
    return who


def _read(
    args: argparse.Namespace,
) -> tuple[list[Prompt], GenerationSettings, dict[str, GenerationSettings]]:
    keys = generation_keys(args.keys)
    strategies = load_lab(args.lab, keys) if args.lab else {}
    settings = generation_settings({} if args.lab else keys)
    if args.chat:
        return [], settings, strategies
    prompts = read_prompts(args.prompts) if args.prompts else one_prompt(args.prompt)
    return prompts, settings, strategies


if __name__ == "__main__":
    sys.exit(run_command(main))
