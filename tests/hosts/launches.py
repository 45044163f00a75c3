"""What the two hosts train, and how each starts its part of it."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from safetensors.torch import load_file

from recipe.sealed import SEAL
from tests.faults.comparison import WEIGHTS
from tests.hosts.link import NETWORK_CARD, Host, Running

REPOSITORY = Path(__file__).parents[2]
# gloo binds to the address that the host's own name resolves to. On many systems that is 127.0.1.1,
# which no other host reaches; here the names resolve to nothing.
GLOO = {"GLOO_SOCKET_IFNAME": NETWORK_CARD}
PATIENCE = 300.0
_PORT = 29500


def write_config(folder: Path, name: str, *, model: Path, rows: Path, dropout: float) -> Path:
    """200 steps of 4 rows, whether one, two or four processes take them."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout}
    config = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {**lora, "target_modules": ["q_proj", "v_proj"]},
        "data": {"path": str(rows), "rows": "0:8", "held_out": "8:11"},
        "training": {
            "use_cpu": True,
            "num_train_epochs": 100,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 10,
            # By default a host waits half an hour for another that says nothing.
            "ddp_timeout": 30,
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def launcher(hosts: Sequence[Host], rank: int, processes: int) -> list[str]:
    """What starts the trainers of one host, to be followed by recipe/train.py and its own words."""
    if processes == 1:
        return [sys.executable]
    launch = ["launch", "--quiet", "--config_file", "launch/ddp_multi_node.yaml"]
    launch += ["--num_machines", str(len(hosts)), "--num_processes", str(processes)]
    launch += ["--machine_rank", str(rank), "--main_process_ip", hosts[0].address]
    launch += ["--main_process_port", str(_PORT)]
    return [str(Path(sys.executable).with_name("accelerate")), *launch]


@dataclass
class Part:
    """One host's part of a run: ``code`` and ``seconds`` are there when it has ended."""

    running: Running
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    code: int | None = None

    @property
    def host(self) -> Host:
        return self.running.host

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.running.code()
            self.seconds = time.monotonic() - self.started
        return self.code is not None


def start(
    hosts: Sequence[Host], arguments: Sequence[str], *, logs: Path, processes: int
) -> list[Part]:
    """One launcher on each of ``hosts``, which share their files but not their token caches."""
    logs.mkdir(parents=True)
    parts = []
    for rank, host in enumerate(hosts):
        cache = logs.parent / f"cache-{host.name}"
        running = host.start(
            [*launcher(hosts, rank, processes), "recipe/train.py", *arguments],
            log=logs / f"{host.name}.log",
            folder=REPOSITORY,
            environment={**GLOO, "HF_HOME": str(cache)},
        )
        parts.append(Part(running))
    return parts


def wait(parts: Sequence[Part], seconds: float = PATIENCE) -> bool:
    """Until all have ended, so long at most; whether they have."""
    deadline = time.monotonic() + seconds
    while sum(part.ended() for part in parts) < len(parts):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def wait_for_checkpoint(run: Path, step: int, parts: Sequence[Part]) -> int:
    """Until the checkpoint of ``step`` is whole and some steps are behind it; the last of them."""
    deadline = time.monotonic() + PATIENCE
    while not (run / f"checkpoint-{step}" / SEAL).is_file() or last_step(run) < step + 3:
        if any(part.ended() for part in parts) or time.monotonic() > deadline:
            raise RuntimeError(f"{run} did not come to step {step}")
        time.sleep(0.005)
    return last_step(run)


def last_step(run: Path) -> int:
    """The newest in the run's log."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:  # half written
            continue
    return 0


def apart(run: Path, other: Path) -> float:
    """Norm of the difference of all lora_B together, over their norm."""
    ours, theirs = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    names = [name for name in theirs if "lora_B" in name]
    difference = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in names)
    whole = sum(float(theirs[n].double().square().sum()) for n in names)
    return float((difference / whole) ** 0.5)
