"""The proof on the screen and in its file."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from recipe.proving.claims import judged
from recipe.proving.evidence import LEAST, MOST, Evidence
from recipe.proving.finding import HEADING, Finding, number
from recipe.proving.plan import Plan, make_plan
from recipe.settings import RunFailed, Settings, UserError, dump

_PACKAGES = ("torch", "transformers", "peft", "accelerate")


def prove(settings: Settings, file: str | None) -> None:
    """Print a line for each claim as it is judged, and keep all of them as JSON.

    Args:
        file: where; None for a fresh one in ``runs/``.

    Raises:
        UserError: the config cannot be run as it is; no file is written.
        RunFailed: naming the claims that do not hold.
    """
    started = time.perf_counter()
    say = _say
    plan = make_plan(settings)
    say("\n".join(_introduction(plan)))
    findings: list[Finding] = []
    with (
        tempfile.TemporaryDirectory(prefix="recipe-prove-") as folder,
        _waiting() as doing,
    ):
        evidence = Evidence(plan, Path(folder), doing)
        for finding in judged(evidence):
            findings.append(finding)
            say(finding.line)
    seconds = time.perf_counter() - started
    written = _write(file, plan, findings, seconds)
    failed = [finding.claim for finding in findings if finding.passed is False]
    passed = sum(finding.passed is True for finding in findings)
    left = len(findings) - passed - len(failed)
    say(
        f"\n{passed} passed, {len(failed)} failed, {left} not applicable · {seconds:.0f} s · "
        f"{written}"
    )
    if failed:
        raise RunFailed(f"not proven: {', '.join(failed)}")


def _introduction(plan: Plan) -> list[str]:
    settings = plan.settings
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s'[: threads > 1]}"
    return [
        f"proof     {settings.name} · {settings.model.name_or_path} · {len(plan.rows)} of "
        f"{len(plan.data.train.rows):,} rows of {settings.data.path} · "
        f"{cpu if plan.on_cpu else _gpu()}",
        f"tolerance of gradients: twice what two of stock's attention kernels differ by, at least "
        f"{number(LEAST)} and at most {number(MOST)}",
        *(f"          {note}" for note in plan.notes),
        "",
        HEADING,
    ]


def _gpu() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "accelerator"


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # above the bar
    sys.stdout.flush()


@contextmanager
def _waiting() -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; yields what it is told."""
    with tqdm(
        desc="starting",
        leave=False,
        disable=None,
        file=sys.stderr,
        bar_format="{desc} · {elapsed}",
    ) as bar:

        def doing(what: str) -> None:
            if what:
                bar.set_description_str(what)
            bar.refresh()

        yield doing


def _write(file: str | None, plan: Plan, findings: Sequence[Finding], seconds: float) -> Path:
    record = {
        "config": plan.settings.name,
        "settings": dump(plan.settings),
        "rows": [row.index for row in plan.rows],
        "device": "cpu" if plan.on_cpu else _gpu(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "notes": plan.notes,
        "claims": [finding.record() for finding in findings],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if file is not None:
        with Path(file).open("x", encoding="utf-8") as stream:
            stream.write(text)
        return Path(file)
    return _write_fresh(plan.settings.name, text)


def _write_fresh(name: str, text: str) -> Path:
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    for count in range(1, 1000):
        path = folder / f"prove-{name}-{count:03d}.json"
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError:
            continue
        return path
    raise UserError.single("runs", f"prove-{name}-001 to -999 are taken. Remove some.")
