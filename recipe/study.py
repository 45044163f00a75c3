"""What each technique costs and buys, measured on this machine.

    python recipe/study.py --config study.yaml          all arms; those that are measured are kept
    python recipe/study.py --config study.yaml --arms full lora
    python recipe/study.py --lesson                     the lessons that there are
    python recipe/study.py --lesson truncated-svd --adapter runs/starter-001/adapter

An arm is a short run in a process of its own, with overrides that the config lists. Written into
runs/study are a JSON for each arm, study.md with the table, ladder.png and memory_speed.png; of a
lesson NAME.png, and NAME.json with all that is drawn and said.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import recipe
from recipe.exit_codes import run_command
from recipe.proving.lessons import LESSONS, Asked
from recipe.settings import RunFailed, Settings, UserError, dump, load_settings

STARTER = "models/smollm2-135m-instruct"
_MEASURED_BY = ("torch", "transformers", "peft", "bitsandbytes")


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a YAML file with study.arms, or a name in configs/")
    what.add_argument("--lesson", nargs="?", const="", metavar="NAME", help="one of those listed")
    what.add_argument("--arm", nargs="+", help=argparse.SUPPRESS)  # the process of one arm
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="measure these anew")
    parser.add_argument("--model", help=f"of a lesson; default: {STARTER}, if it is there")
    parser.add_argument("--adapter", help="of a lesson; default: the newest in runs/")
    parser.add_argument("--seed", type=int, default=0, help="of a lesson")
    parser.add_argument("--folder", default="runs/study", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.lesson and args.lesson not in LESSONS:
        listed = ", ".join(LESSONS)
        raise UserError.single("--lesson", f"{args.lesson!r} is none. Choose among {listed}.")
    given: dict[str, object] = {}
    if args.lesson is not None:
        given = {"--arms": args.arms, **dict.fromkeys(args.overrides, True)}
    if args.config:
        given = {"--model": args.model, "--adapter": args.adapter, "--seed": args.seed}
    for name, value in given.items():
        if value:
            mode = "a lesson" if args.lesson is not None else "--config"
            raise UserError.single(name, f"has no effect with {mode}. Leave it out.")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = _parsed(arguments)
    if args.lesson == "":
        for name, lesson in LESSONS.items():
            print(f"{name:<16}{lesson.question}")
        print("\nmake study LESSON=NAME measures one of them here")
        return
    if args.arm:
        _one_arm(args.arm[0], [*args.arm[1:], *args.overrides])
        return
    folder = Path(args.folder)
    if args.lesson:
        _check_folder(folder)
        _teach(args, folder)
        return
    settings = load_settings(args.config, args.overrides)
    _check_arms(args, settings)
    _check_folder(folder)
    _study(args, settings, folder)


def _one_arm(config: str, overrides: Sequence[str]) -> None:
    """Measure; the last line is JSON."""
    settings = load_settings(config, overrides)
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    from recipe.proving.arms import measured_arm

    print(json.dumps(measured_arm(settings)))


def _check_arms(args: argparse.Namespace, settings: Settings) -> None:
    """Every arm's settings are valid before one is measured."""
    import torch

    arms = settings.study.arms
    if not arms:
        raise UserError.single(
            f"{args.config}: study.arms", "is missing. List arms, as configs/study.yaml does."
        )
    for flag, names in (("--arms", args.arms), ("study.ladder", settings.study.ladder)):
        unknown = next((name for name in names or () if name not in arms), None)
        if unknown is not None:
            raise UserError.single(flag, f"{unknown!r} is no arm. Choose among {'; '.join(arms)}.")
    files = {name: _file(name) for name in arms}
    for name, file in files.items():
        if not re.fullmatch(r"[\w.+-]+", file) or list(files.values()).count(file) > 1:
            raise UserError.single(
                "study.arms",
                f"{name!r} names no file of its own. Use letters, digits, spaces, commas, + and -.",
            )
    for overrides in arms.values():
        arm = load_settings(args.config, [*args.overrides, *overrides])
        if arm.data.held_out is None:
            raise UserError.single(
                "data.held_out", "is missing, and arms are compared on such rows. Name some."
            )
        if arm.training.get("fp16") and not torch.cuda.is_available():
            raise UserError.single(
                "training.fp16", "computes in float32 on a CPU. Leave it out, or use a GPU."
            )


def _study(args: argparse.Namespace, settings: Settings, folder: Path) -> None:
    arms = settings.study.arms or {}
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Mapping[str, Any]] = {}
    for name, overrides in arms.items():
        kept = folder / f"{_file(name)}.json"
        mark = _mark(args.config, [*args.overrides, *overrides])
        before = _kept(kept, mark)
        if before is None or name in (args.arms or ()):
            if args.arms and name not in args.arms:
                continue
            before = _measured(name, args.config, [*args.overrides, *overrides])
            before = {"name": name, "overrides": list(overrides), **mark, **before}
            kept.write_text(json.dumps(before, indent=1) + "\n")
        found[name] = before
        _say(name, before)
    from recipe.proving.arms_report import table, write

    files = write(found, settings.study.ladder or [], folder)
    print("\n" + "\n".join(table(found)) + "\n\n" + "\n".join(map(str, files)))


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _mark(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a measurement to be kept."""
    import torch

    settings = load_settings(config, overrides)
    # Another arm in the list changes nothing in this one.
    alone = settings.study.model_copy(update={"arms": None, "ladder": None})
    settings = settings.model_copy(update={"study": alone})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "recipe": recipe.__version__,
        "settings_sha256": hashlib.sha256(dump(settings).encode()).hexdigest(),
        "data_sha256": _sha256(Path(settings.data.path)),
        "weights_sha256": [_sha256(file) for file in _weights(settings.model.name_or_path)],
        "versions": {name: version(name) for name in _MEASURED_BY},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _weights(folder: str) -> list[Path]:
    """None where the model is the hub's, which names its commit."""
    return sorted(Path(folder).glob("*.safetensors"))


def _sha256(file: Path) -> str | None:
    """None for a dataset of the hub."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _kept(file: Path, mark: Mapping[str, Any]) -> dict[str, Any] | None:
    """A measurement of just this, on this device, by these versions."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and all(found.get(key) == value for key, value in mark.items())
    return found if same else None


def _measured(name: str, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    print(f"measuring {name}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--arm", config, *overrides], capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RunFailed(
            f"{name}: ended with {done.returncode}: {' '.join(said)}. What was measured before is "
            f"kept; alone: python recipe/study.py --arm {shlex.join([config, *overrides])}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _say(name: str, arm: Mapping[str, Any]) -> None:
    peak, loss = arm["bytes"]["allocated"] / 2**20, arm["held_out_loss"]["after"]
    token = 1000 * arm["seconds"] / arm["tokens"]
    print(f"{name:<36}{peak:>9,.0f} MiB {token:>8.2f} ms a token   held out {loss:.3f}", flush=True)


def _teach(args: argparse.Namespace, folder: Path) -> None:
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    lesson = LESSONS[args.lesson]
    model = args.model or (STARTER if os.path.isdir(STARTER) else None)  # noqa: PTH112
    adapter = args.adapter or (_newest() if lesson.needs_adapter else None)
    taught = lesson.teach(Asked(model, adapter, args.seed))
    folder.mkdir(parents=True, exist_ok=True)
    figure, numbers = folder / f"{args.lesson}.png", folder / f"{args.lesson}.json"
    taught.figure.savefig(figure)
    content = {
        "lesson": args.lesson,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _MEASURED_BY},
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
    # os.path, because Path's own raise where a name is too long for any file system.
    there = next(
        path
        for path in (folder, *folder.absolute().parents)
        if os.path.exists(path)  # noqa: PTH110
    )
    name_fits = all(len(part.encode()) < 256 for part in folder.parts)
    if not name_fits or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError.single("--folder", f"{there} cannot be written into. Name another.")


if __name__ == "__main__":
    sys.exit(run_command(main))
