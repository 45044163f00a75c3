"""The claim on processes: two of them, started by torchrun, train the adapter of one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from recipe.proving import runs
from recipe.proving.evidence import Evidence
from recipe.proving.finding import Finding, compared, not_applicable, number
from recipe.proving.plan import Plan
from recipe.proving.stock import relative_difference
from recipe.settings import Settings, dump, plain

PROCESSES = "N processes = 1"
# What every process runs.
TRAIN = Path(__file__).parents[1] / "train.py"
_PROCESSES = 2
# Each of the two accumulates twice. An epoch is one step, so no row is left over or repeated.
_ACCUMULATION = 4
_EPOCHS = 2
# Sums in another order move an SGD update by less than 1e-5 in float32; one row too many or too few
# moves it by more than 1e-2.
_TOLERANCE = 1e-4
_TIMEOUT_SECONDS = 900
_WEIGHTS = "adapter/adapter_model.safetensors"


class Update(TrainerCallback):
    """How the adapter's tensors change from the first step to the last, by their saved names."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.before = _tensors(model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.after = _tensors(model)

    @property
    def size(self) -> float:
        """Its norm over all tensors."""
        changes = [(self.after[n].double() - self.before[n].double()).norm() for n in self.before]
        return float(torch.stack(changes).norm())


def processes(evidence: Evidence) -> Finding:
    """The difference of the two adapters, relative to what training changed."""
    plan = evidence.plan
    reason = _not_here(plan)
    if reason:
        return not_applicable(PROCESSES, reason)
    if not evidence.same_twice:
        reason = 'rests on "same seed twice → same bytes", which does not hold'
        return not_applicable(PROCESSES, reason)
    settings = _settings(plan)
    evidence.doing("one process")
    update = Update()
    one = runs.run(settings, evidence.new_folder(), [update])
    evidence.doing("two processes")
    two = evidence.new_folder()
    failure = _start(settings, plan, two, config=evidence.folder / "processes.yaml")
    if failure:
        return Finding(PROCESSES, None, _TOLERANCE, False, f"two processes ended: {failure}")
    ours, theirs = load_file(two / _WEIGHTS), load_file(one / _WEIGHTS)
    norm = float(torch.stack([tensor.double().norm() for tensor in theirs.values()]).norm())
    return compared(
        PROCESSES,
        relative_difference(ours, theirs) * norm / update.size,
        tolerance=_TOLERANCE,
        note=f"adapters of {_PROCESSES} and 1 after {_EPOCHS} steps of SGD, relative to the update "
        f"of {number(update.size)}",
    )


def _not_here(plan: Plan) -> str | None:
    if len(plan.rows) < _ACCUMULATION:
        return f"{len(plan.rows)} rows do not fill one step of {_PROCESSES} processes"
    if plan.on_cpu or plan.gpus:
        return None
    return "the config trains on a GPU, and this machine has one"


def _settings(plan: Plan) -> Settings:
    """Adam would blow up the rounding of near-zero gradients; SGD keeps it in proportion."""
    batch = 2 if len(plan.rows) >= 2 * _ACCUMULATION else 1
    few = plan.rows[: batch * _ACCUMULATION]
    settings = runs.gradient_settings(
        plan,
        batch=batch,
        accumulation=_ACCUMULATION,
        num_train_epochs=_EPOCHS,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        **({"use_cpu": True} if plan.on_cpu else {}),
    )
    taken = {"rows": f"{few[0].index}:{few[-1].index + 1}", "share_openings": None}
    return settings.model_copy(update={"data": settings.data.model_copy(update=taken)})


def _start(settings: Settings, plan: Plan, folder: Path, *, config: Path) -> str | None:
    """Run train.py in two processes; why they failed, or None."""
    config.write_text(dump(settings.model_copy(update={"training": plain(settings.training)})))
    threads = max(torch.get_num_threads() // _PROCESSES, 1)
    gpus = [f"CUDA_VISIBLE_DEVICES={plan.gpus}"] if plan.gpus else []
    result = subprocess.run(
        [
            "env",
            f"OMP_NUM_THREADS={threads}",
            *gpus,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={_PROCESSES}",
            str(TRAIN),
            "--config",
            str(config),
            "--no-rehearsal",
            f"training.output_dir={folder}",
        ],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=False,
        timeout=_TIMEOUT_SECONDS,
    )
    if result.returncode == 0:
        return None
    # torchrun's own account follows what the processes said.
    said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    ours = [line for line in said if not line.startswith(("W", "E", "[", "=", "-"))]
    return (ours or said or [f"exit code {result.returncode}"])[0][:200]


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
