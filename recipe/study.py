"""What a technique does, measured on this machine: one lesson, a figure and a paragraph.

    python recipe/study.py                              what there is
    python recipe/study.py --lesson checkpointing
    python recipe/study.py --lesson truncated-svd --adapter runs/starter-001/adapter

Written are NAME.png and NAME.json, all that is drawn and said, into runs/study.
"""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from recipe.exit_codes import run_command
from recipe.proving.lessons import LESSONS, Asked
from recipe.settings import UserError

STARTER = "models/smollm2-135m-instruct"


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lesson", metavar="NAME", help="one of those that are listed without it")
    parser.add_argument(
        "--model", help=f"a checkpoint's folder; default: {STARTER}, if it is there"
    )
    parser.add_argument("--adapter", help="an adapter's folder; default: the newest in runs/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/study", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.lesson is not None and args.lesson not in LESSONS:
        listed = ", ".join(LESSONS)
        raise UserError.single("--lesson", f"{args.lesson!r} is none. Choose among {listed}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = _parsed(arguments)
    if args.lesson is None:
        for name, lesson in LESSONS.items():
            print(f"{name:<16}{lesson.question}")
        print("\nmake study LESSON=NAME measures one of them here")
        return
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    lesson = LESSONS[args.lesson]
    model = args.model or (STARTER if os.path.isdir(STARTER) else None)  # noqa: PTH112
    adapter = args.adapter or (_newest() if lesson.needs_adapter else None)
    folder = Path(args.folder)
    _check_folder(folder)
    taught = lesson.teach(Asked(model, adapter, args.seed))
    folder.mkdir(parents=True, exist_ok=True)
    figure, numbers = folder / f"{args.lesson}.png", folder / f"{args.lesson}.json"
    taught.figure.savefig(figure)
    content = {
        "lesson": args.lesson,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "model": model,
        "adapter": adapter,
        "paragraph": taught.paragraph,
        "numbers": taught.numbers,
    }
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{taught.paragraph}\n\n{figure}\n{numbers}")


def _newest() -> str | None:
    """The adapter of the newest run; None where there is none, which the lesson will tell."""
    from recipe.sharing.adapter_folder import newest_adapter

    try:
        return str(newest_adapter(Path("runs")))
    except UserError:
        return None


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError.single("--folder", f"{there} cannot be written into. Name another.")


if __name__ == "__main__":
    sys.exit(run_command(main))
