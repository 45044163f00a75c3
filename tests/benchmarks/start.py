"""How long a second start takes until the first step begins, against what nobody can do without.

    python -m tests.benchmarks.start

Bare is a process that imports Trainer, TrainingArguments and peft and loads the base; the other is
the recipe with the same base and 310 rows whose tokens are cached. Both in alternation, each in a
process of its own, timed from its creation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ELAPSED = "print(__import__('time').time() - __import__('psutil').Process().create_time())"
BARE = f"""
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
AutoTokenizer.from_pretrained("{{model}}")
AutoModelForCausalLM.from_pretrained("{{model}}", dtype=torch.float32)
{ELAPSED}
"""
RECIPE = f"""
import functools, os, sys
from recipe import train
from recipe.quiet import quiet_libraries
quiet_libraries()
from recipe import finetune
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_begin(self, *args, **named):
        {ELAPSED}
        sys.stdout.flush()
        os._exit(0)
finetune.finetune = functools.partial(finetune.finetune, watchers=[Stop()])
train.main(["--config", "starter.yaml", "model.name_or_path={{model}}", "data.held_out=null",
            "training.output_dir={{folder}}/run"])
"""


def seconds(script: str, model: Path) -> float:
    """Of one process, as its last line says."""
    with tempfile.TemporaryDirectory(prefix="recipe-start-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", script.format(model=model, folder=folder)],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return float(done.stdout.split("\n")[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models/smollm2-135m-instruct")
    args = parser.parse_args()
    seconds(RECIPE, args.model)  # the first start fills the caches
    pairs = [(seconds(BARE, args.model), seconds(RECIPE, args.model)) for _ in range(args.rounds)]
    bare, ours = zip(*pairs, strict=True)
    ratios = [b / a for a, b in pairs]
    print(
        f"torch {version('torch')}, transformers {version('transformers')}, "
        f"{datetime.now(UTC):%Y-%m-%d}; {args.rounds} rounds, median (min–max)\n"
        f"bare     {statistics.median(bare):.1f} s ({min(bare):.1f}–{max(bare):.1f})\n"
        f"recipe   {statistics.median(ours):.1f} s ({min(ours):.1f}–{max(ours):.1f})\n"
        f"ratio    {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
