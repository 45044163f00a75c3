"""The starter model trained by each engine on the CPU, beside one process.

    make bench-engines ARGS="training.optim=sgd training.learning_rate=0.1"

20 steps of 4 rows at dropout 0 in float32: how far lora_B is from that of one process, and what the
first process holds of weights, adapter and optimizer. AdamW, the config's own, makes updates of one
size out of gradients that are nothing but rounding; SGD does not.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from tests.equalities.engines import ENGINES, apart, lacking, launch

REPOSITORY = Path(__file__).parents[2]
OVERRIDES = [
    "training.max_steps=20",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=4",
    "training.use_cpu=true",
    "training.save_strategy=no",
    "lora.lora_dropout=0",
    "data.rows=0:81",
    "data.held_out=381:400",
]
ITEMS = ("base weights", "adapter", "optimizer state")


def run(engine: str, processes: int, folder: Path) -> Path:
    """Train; return the run's folder.

    Raises:
        SystemExit: it failed, with what it said.
    """
    command, environment = launch(engine, processes)
    done = subprocess.run(
        [
            *command,
            "--config",
            "starter.yaml",
            f"training.output_dir={folder}",
            *OVERRIDES,
            *sys.argv[1:],
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return folder


def row(engine: str, processes: int, folder: Path, one: Path) -> str:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    perplexity = [r["eval_perplexity"] for r in map(json.loads, lines) if "eval_perplexity" in r]
    items = json.loads((folder / "manifest.json").read_text())["memory"]["items"]
    held = " | ".join(
        f"{items[name]['measured'] / 2**20:.1f} ({items[name]['forecast'] / 2**20:.1f})"
        for name in ITEMS
    )
    distance = "" if folder == one else f"{apart(folder / 'adapter', one / 'adapter'):.1e}"
    return f"| {engine} | {processes} | {distance} | {perplexity[-1]:.4f} | {held} |"


def main() -> None:
    print(
        f"{torch.get_num_threads()} CPU cores, "
        + ", ".join(
            f"{name} {version(name)}"
            for name in ("torch", "transformers", "peft", "accelerate", "deepspeed")
            if name != "deepspeed" or lacking("zero2") is None
        )
        + f", {datetime.now(UTC):%Y-%m-%d}\n"
    )
    print(
        "| engine | processes | lora_B from one process | held-out perplexity | "
        + " | ".join(f"{name}, MiB (forecast)" for name in ITEMS)
        + " |"
    )
    print("|---" * (4 + len(ITEMS)) + "|")
    with tempfile.TemporaryDirectory(prefix="recipe-engines-") as folder:
        one = run("single", 1, Path(folder) / "one")
        print(row("single", 1, one, one), flush=True)
        for engine, processes in ENGINES:
            if reason := lacking(engine):
                print(f"| {engine} | {processes} | {reason} |" + " |" * (1 + len(ITEMS)))
                continue
            found = run(engine, processes, Path(folder) / f"{engine}-{processes}")
            print(row(engine, processes, found, one), flush=True)


if __name__ == "__main__":
    main()
