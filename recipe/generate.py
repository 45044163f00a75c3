"""A prompt becomes text, with the newest adapter and the template it was trained with.

    python recipe/generate.py --prompt "Name three primary colours."
    make infer PROMPT="Name three primary colours."     ADAPTER=none asks the base

Greedy decoding, streamed. The base alone answers through its own chat template if it has one.
"""

import argparse
import sys
from pathlib import Path

from recipe.exit_codes import run_command
from recipe.settings import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--adapter", help="an adapter's folder, or none; default: the newest run's")
    parser.add_argument(
        "--model",
        help="the base, with --adapter none; default: the newest adapter's base",
    )
    parser.add_argument("--template", choices=["alpaca", "chat", "raw"], help="with --adapter none")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args(arguments)
    _check(args)
    # Only now: these imports take seconds, and a mistake is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.answerer import load_answerer

    answerer = load_answerer(
        adapter=args.adapter, model=args.model, template=args.template, runs=Path("runs")
    )
    print(f"{answerer.described}\n", file=sys.stderr, flush=True)
    _, reason = answerer.answer(args.prompt, max_new_tokens=args.max_new_tokens, stream=True)
    if reason == "length":
        print(
            f"\n(stopped at {args.max_new_tokens} new tokens; --max-new-tokens takes more)",
            file=sys.stderr,
        )


def _check(args: argparse.Namespace) -> None:
    if not args.prompt.strip():
        raise UserError.single("prompt", 'empty. Give one: make infer PROMPT="…"')
    if args.max_new_tokens < 1:
        raise UserError.single("--max-new-tokens", f"{args.max_new_tokens} is below 1.")
    if args.adapter != "none" and (args.model or args.template):
        raise UserError.single(
            "--model/--template",
            "an adapter brings its own base and template. Leave these out, or add --adapter none.",
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
