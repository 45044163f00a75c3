"""How long a second start takes until the first step begins, against what nobody can do without.

    python -m tests.benchmarks.start

Bare is a process that imports Trainer, TrainingArguments and peft and loads the base; the others
are the recipe with the same base and 310 rows: a second start, whose tokens and rehearsed longest
micro-batch are known; the same without the rehearsal; and a first start, which tokenises the rows
and takes the longest micro-batch forward and backward. In alternation, each in a process of its
own, timed from its creation.
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
with train.everything_stays():  # as its main does
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
            "training.output_dir={{folder}}/run", *{{more}}])
"""
FIRST = "recipe, first start"
# Name → script and further arguments of the command.
SUBJECTS: dict[str, tuple[str, list[str]]] = {
    "bare": (BARE, []),
    "recipe, --no-rehearsal": (RECIPE, ["--no-rehearsal"]),
    "recipe": (RECIPE, []),
    FIRST: (RECIPE, []),
}


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def seconds(subject: str, model: Path, warm: str, *, known: bool) -> float:
    """Of one process, as its last line says.

    Args:
        warm: the Hugging Face cache of all but a first start.
        known: whether the longest micro-batch must not be tried.
    """
    script, more = SUBJECTS[subject]
    with tempfile.TemporaryDirectory(prefix="recipe-start-") as folder:
        home = f"{folder}/home" if subject == FIRST else warm
        done = subprocess.run(
            [sys.executable, "-c", script.format(model=model, folder=folder, more=more)],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    if known != ("; it went through on " in done.stdout):
        sys.exit(f"{subject}: was the longest micro-batch tried or not?\n{done.stdout}")
    return float(done.stdout.split("\n")[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models/smollm2-135m-instruct")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recipe-start-") as warm:
        seconds("recipe", args.model, warm, known=False)
        rounds = [
            {name: seconds(name, args.model, warm, known=name == "recipe") for name in SUBJECTS}
            for _ in range(args.rounds)
        ]
    print(
        f"torch {version('torch')}, transformers {version('transformers')}, "
        f"{datetime.now(UTC):%Y-%m-%d}; {args.rounds} rounds, median (min–max)"
    )
    for name in SUBJECTS:
        own = spread([one[name] for one in rounds], ".1f")
        times = spread([one[name] / one["bare"] for one in rounds], ".2f")
        print(f"{name:<24}{own} s, {times} times bare")


if __name__ == "__main__":
    main()
