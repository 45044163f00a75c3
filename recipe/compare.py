"""Did it learn, memorise or forget? Base and tuned model of a run, side by side.

    python recipe/compare.py                                  the newest run
    python recipe/compare.py --run runs/starter-001 --rows 50 max_new_tokens=64
    python recipe/compare.py --run runs/starter-001 --seen 0:4 --unseen 312,340,355
    python recipe/compare.py --run runs/starter-001 --live    a page to type prompts into

    make compare
    make demo

Perplexity, ROUGE, copies of training answers and more, on rows that were trained on, on held-out
rows and on neutral text, with a verdict; written into the run as report.html, which needs no
network, and report.json. key=value are fields of transformers.GenerationConfig, and strategy, as in
generate.py; answers are greedy and of 128 tokens at most unless said. Exit code 3 if the model is
broken.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.exit_codes import run_command
from recipe.settings import (
    GenerationSettings,
    Problem,
    RunFailed,
    UserError,
    generation_keys,
    generation_settings,
    row_range,
)

_ROWS, _TOKENS = 100, 128
_NOT_LIVE = ("rows", "seen", "unseen", "no_answers")
_ONLY_LIVE = ("host", "port", "open")
_ONE_PLAIN_ANSWER = ("assistant_model", "num_return_sequences")


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(arguments)
    generation, seen, unseen = _read(args)
    # Only now: these imports take seconds, and a mistake is told before them.
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.compared_run import find_run

    run = find_run(args.run, Path("runs"))
    if args.live:
        from recipe.answerer import load_answerer
        from recipe.live import require_gradio, serve

        require_gradio()

        answerer = load_answerer(
            adapter=str(run / "adapter"), model=None, template=None, runs=Path("runs")
        )
        serve(answerer, generation, host=args.host, port=args.port, open_browser=args.open)
        return
    from recipe.comparison import Asked, compare_run

    asked = Asked(
        args.rows or _ROWS,
        None if args.no_answers else generation,
        seen=seen,
        unseen=unseen,
        command=[Path(sys.executable).name, *sys.argv],
    )
    if compare_run(run, asked) == "broken":
        raise RunFailed("the tuned model is broken; see above.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", metavar="FOLDER", help="a finished run; default: the newest in runs/")
    add("--rows", type=int, metavar="N", help="most rows of each kind, evenly spread; 100")
    add("--seen", metavar="ROWS", help="rows of the source that it saw: 0:4 or 0,7,12")
    add(
        "--unseen",
        metavar="ROWS",
        help="rows of the source that it did not; default: data.held_out",
    )
    add("--no-answers", action="store_true", help="perplexities alone; quick")
    add("--live", action="store_true", help="type prompts into a page in the browser")
    add("--host", default=None, help="with --live: address to listen on; 127.0.0.1")
    add("--port", type=int, default=None, help="with --live; a free one from 7860 on unless said")
    add("--open", action="store_true", help="with --live: open the browser")
    add("keys", nargs="*", metavar="key=value", help="fields of GenerationConfig, and strategy")
    return parser


def _read(
    args: argparse.Namespace,
) -> tuple[GenerationSettings, Sequence[int] | None, Sequence[int] | None]:
    """What can be known without the run; all problems come in one report."""
    problems: list[Problem] = []
    generation = generation_settings({})
    try:
        generation = generation_settings({"max_new_tokens": _TOKENS, **generation_keys(args.keys)})
    except UserError as error:
        problems += error.problems
    listed: dict[str, Sequence[int] | None] = {}
    for flag in ("seen", "unseen"):
        try:
            listed[flag] = _rows(f"--{flag}", getattr(args, flag))
        except UserError as error:
            problems += error.problems
    if args.rows is not None and args.rows < 1:
        problems.append(Problem("--rows", f"{args.rows} is below 1. Compare at least one."))
    for name in _NOT_LIVE if args.live else _ONLY_LIVE:
        if getattr(args, name):
            said = "has no effect with --live" if args.live else "needs --live"
            problems.append(Problem(f"--{name.replace('_', '-')}", f"{said}. Leave it out."))
    if not args.live:
        problems += _answer_problems(args, generation)
    if problems:
        raise UserError(problems)
    return generation, listed["seen"], listed["unseen"]


def _answer_problems(args: argparse.Namespace, generation: GenerationSettings) -> list[Problem]:
    """Each row is answered once, by the model alone."""
    problems = [
        Problem(key, "is not for comparing, which asks each model for one answer. Leave it out.")
        for key in _ONE_PLAIN_ANSWER
        if key in generation.recorded
    ]
    if args.no_answers and args.keys:
        problems.append(Problem(args.keys[0], "has no effect with --no-answers. Leave one out."))
    return problems


def _rows(flag: str, text: str | None) -> Sequence[int] | None:
    """``0:4`` or ``0,7,12``; None where nothing was said."""
    if text is None:
        return None
    try:
        if ":" in text:
            start, stop = row_range(text)
            if stop is not None:
                return range(start, stop)
        elif all(part.isascii() and part.isdigit() for part in text.split(",")):
            return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        pass
    raise UserError.single(
        flag, f"expected rows such as 0:4 or 0,7,12, found {text!r}. Count them from 0."
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
