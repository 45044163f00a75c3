"""Forecast and measured peak memory, on shapes and settings that differ in everything.

    make bench-forecast                           24 runs in fresh processes, some 25 minutes
    make bench-forecast ARGS="--only 0 3 --json out.json"

Each run is train.py's own, rehearsal and all, in a fresh process. Measured are the bytes that
torch's profiler sees allocated at the peak of a step, with those of weights, adapter and optimizer
state; and the process's peak resident size, as the system counts it. The first needs no constant;
for the second, what the process and malloc take is fitted to the first 8 configurations, and the
error is told of the other 16.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
STARTER = REPOSITORY / "models/smollm2-135m-instruct"
SHAPES = {
    "starter": None,
    "narrow": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12,
               "num_attention_heads": 6, "num_key_value_heads": 6},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "flat": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 5,
             "num_attention_heads": 12, "num_key_value_heads": 12},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24,
             "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip
ALL_LINEAR = "lora.target_modules=all-linear"
ADAPTER, OPTIMIZER = "adapter", "optimizer state"
STATIC = ("base weights", ADAPTER, OPTIMIZER)
STARTER_LAYERS = 30
CHECKPOINTED = "training.gradient_checkpointing=true"


@dataclass(frozen=True)
class Case:
    """A run: ``tokens`` a row, ``batch`` rows a micro-batch, and what else is set."""

    shape: str
    tokens: int
    batch: int
    overrides: Sequence[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        short = " ".join(one.partition(".")[2] for one in self.overrides)
        return f"{self.shape} {self.batch}x{self.tokens} {short}".strip()


FITTED = [
    Case("starter", 128, 4),
    Case("starter", 256, 4, [CHECKPOINTED]),
    Case("narrow", 512, 4, [ALL_LINEAR, "lora.r=64"]),
    Case("wide", 256, 2, ["training.gradient_accumulation_steps=2"]),
    Case("wide", 512, 4, [CHECKPOINTED, "training.optim=adamw_bnb_8bit"]),
    Case("flat", 256, 8),
    Case("deep", 128, 8, [ALL_LINEAR]),
    Case("narrow", 64, 2, ["model.dtype=bfloat16"]),
]
HELD_OUT = [
    Case("starter", 64, 1),
    Case("starter", 512, 1, [ALL_LINEAR, "lora.r=8"]),
    Case("starter", 128, 8, [CHECKPOINTED, "training.gradient_accumulation_steps=2"]),
    Case("starter", 256, 4, ["lora.r=64", "training.optim=sgd"]),
    Case("starter", 1024, 1, [CHECKPOINTED]),
    Case("narrow", 256, 2),
    Case("narrow", 1024, 4, [CHECKPOINTED, ALL_LINEAR]),
    Case("narrow", 256, 16, ["lora.r=128"]),
    Case("wide", 128, 4, ["training.optim=adafactor"]),
    Case("wide", 512, 2, [ALL_LINEAR]),
    Case("wide", 1024, 1, ["lora.target_modules=[q_proj, k_proj, v_proj, o_proj]"]),
    Case("flat", 512, 2, [CHECKPOINTED, ALL_LINEAR, "lora.r=256"]),
    Case("flat", 128, 2, ["lora.modules_to_save=[lm_head]", "training.optim=adamw_bnb_8bit"]),
    Case("deep", 512, 2, ["training.gradient_accumulation_steps=4"]),
    Case("deep", 256, 8, [CHECKPOINTED, "lora.r=4"]),
    Case("deep", 64, 2, ["model.dtype=bfloat16", "lora.r=64"]),
]  # fmt: skip


def checkpoint(shape: str, folder: Path) -> Path:
    """The starter model, or random weights in another shape with its tokenizer."""
    if SHAPES[shape] is None:
        return STARTER
    made = folder / shape
    if not made.is_dir():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(STARTER)
        config.head_dim = None
        config.update(SHAPES[shape])
        config.head_dim = config.hidden_size // config.num_attention_heads
        LlamaForCausalLM(config).save_pretrained(made)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(STARTER / name, made)
    return made


def rows_file(case: Case, folder: Path, count: int) -> Path:
    """Rows of as many tokens, half of them trained, no two of which begin alike."""
    file = folder / "rows.jsonl"
    half = case.tokens // 2
    rows = [
        {"prompt": f"{n}:" + " river" * (half - 4), "completion": " stone" * (half - 1)}
        for n in range(10, 10 + count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measured(case: Case, checkpoints: Path, *, steps: int) -> dict[str, Any]:
    """What the run's manifest says of its memory."""
    with tempfile.TemporaryDirectory(prefix="recipe-forecast-") as made:
        folder = Path(made)
        config = folder / "case.yaml"
        config.write_text(
            "lora: {r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: [q_proj, v_proj]}\n"
        )
        named = [
            f"model.name_or_path={checkpoint(case.shape, checkpoints)}",
            "model.dtype=float32",
            f"data.path={rows_file(case, folder, 2 * case.batch)}",
            f"training.output_dir={folder / 'run'}",
            f"training.per_device_train_batch_size={case.batch}",
            f"training.max_steps={steps}",
            "training.save_strategy=no",
            "training.use_cpu=true",
        ]
        keys = {one.partition("=")[0] for one in case.overrides}
        kept = [one for one in named if one.partition("=")[0] not in keys]
        command = [sys.executable, "-m", "tests.benchmarks.forecast", "--run", str(config)]
        done = subprocess.run(
            [*command, *kept, *case.overrides],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{case.name}\n{done.stdout}{done.stderr}")
        return {"name": case.name, **json.loads(done.stdout.splitlines()[-1])}


def run(config: str, overrides: Sequence[str]) -> None:
    """One run, in a process of its own; its last line is what its manifest says of memory, and the
    profiler's peak.
    """
    from recipe.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from recipe.finetune import finetune
    from recipe.memory.forecast import surroundings
    from recipe.memory.probe import allocated_peak
    from recipe.memory.watch import MemoryWatch
    from recipe.rehearsal import rehearse
    from recipe.settings import load_settings

    watch, trainers = MemoryWatch(), []

    def rehearsed(trainer: Any, run: Any, say: Any) -> None:
        trainers.append(trainer)
        rehearse(trainer, run, say, memory=watch)

    folder = finetune(load_settings(config, overrides), rehearse=rehearsed, memory=watch)
    memory = json.loads((folder / "manifest.json").read_text())["memory"]
    (trainer,) = trainers
    micro_batches = min(trainer.args.gradient_accumulation_steps, 2)
    trainer.model.zero_grad(set_to_none=True)

    def step() -> None:
        for _ in range(micro_batches):
            trainer.rehearse_step(watch.rows)
        trainer.optimizer.step()
        trainer.model.zero_grad(set_to_none=True)

    peak = allocated_peak(step)
    static = sum(memory["items"][name]["measured"] for name in STATIC)
    fixed, _ = surroundings("cpu", moving=0, written=0, layers=1, checkpointed=False)
    told = {"profiler": static + peak, "torch": torch.__version__, "fixed": fixed}
    print(json.dumps({**memory, **told}))


def error(found: Mapping[str, Any], kind: str) -> float:
    """Of the forecast peak, relative to the measured one."""
    if kind == "allocated":
        return float(found["forecast"]["allocated"] / found["profiler"] - 1)
    return float(found["forecast"]["peak"] / found["measured"]["peak"] - 1)


def line(found: Mapping[str, Any]) -> str:
    """A row of the table, MiB; the residual is what was resident beyond the forecast."""
    ahead, real = found["forecast"], found["measured"]["peak"]
    figures = (ahead["allocated"], found["profiler"], ahead["peak"], real)
    allocated, profiled, peak, resident = (f"{n / 2**20:,.0f}" for n in figures)
    return (
        f"| {found['name']} | {allocated} | {profiled} | {error(found, 'allocated'):+.1%} | "
        f"{peak} | {resident} | {error(found, 'resident'):+.1%} | "
        f"{(real - ahead['peak']) / 2**20:+,.0f} |"
    )


def summary(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Median and worst error of both."""
    told = []
    for kind in ("allocated", "resident"):
        errors = [abs(error(one, kind)) for one in found]
        told.append(f"{kind}, median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    return f"{name}: {'; '.join(told)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", help="configurations by their number")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--again", metavar="FILE", help="what --json wrote, with the constants of now; no run"
    )
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run[0], args.run[1:])
        return
    if args.again:
        show([with_constants_of_now(one) for one in json.loads(Path(args.again).read_text())])
        return
    cases = [*FITTED, *HELD_OUT]
    found = []
    with tempfile.TemporaryDirectory(prefix="recipe-shapes-") as folder:
        for number, case in enumerate(cases):
            if args.only is None or number in args.only:
                one = measured(case, Path(folder), steps=args.steps)
                found.append({**one, "fitted": number < len(FITTED)})
                print(line(found[-1]), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(found, indent=1))
    show(found)


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The table, and the errors."""
    print(
        f"\n{platform.machine()} CPU · {datetime.now(UTC):%Y-%m-%d}\n\n"
        "| run | allocated, forecast, MiB | profiler | error | resident, forecast | measured | "
        "error | residual |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(map(line, found)))
    for name, fitted in (("fitted on", True), ("not fitted on", False)):
        if part := [one for one in found if one["fitted"] == fitted]:
            print(summary(name, part))


def with_constants_of_now(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same run, had it been forecast with what is fitted since."""
    from recipe.memory.forecast import PROCESS, surroundings

    ahead = dict(found["forecast"])
    at_peak = dict(ahead["at_peak"])
    shape = SHAPES[found["name"].split()[0]]
    layers = shape["num_hidden_layers"] if shape else STARTER_LAYERS
    process, allocator = surroundings(
        "cpu",
        moving=found["traced"]["moving"],
        written=found["traced"]["written"],
        layers=layers,
        checkpointed=CHECKPOINTED.partition(".")[2] in found["name"],
    )
    imported = at_peak[PROCESS] - found.get("fixed", 0)
    return {
        **found,
        "forecast": {**ahead, "peak": ahead["allocated"] + imported + process + allocator},
    }


if __name__ == "__main__":
    main()
