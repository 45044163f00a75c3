"""What the killed runs train: tiny jobs of about 20 steps, each with another thing to lose."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "lora": {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    },
    "training": {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    },
}


@dataclass(frozen=True)
class Scenario:
    """``data`` and the rest are sections of the config, over ``BASE``; 12 rows are there."""

    name: str
    rows: str
    epochs: int
    accumulation: int = 1
    held_out: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def write_config(self, folder: Path, *, model: str, rows: Path) -> Path:
        data = {"path": str(rows), "rows": self.rows, **self.data}
        if self.held_out:
            data["held_out"] = "9:12"
        training = {
            **BASE["training"],
            "num_train_epochs": self.epochs,
            "gradient_accumulation_steps": self.accumulation,
            **self.training,
        }
        config = {
            "model": {"name_or_path": model, "dtype": "float32"},
            "data": data,
            "lora": {**BASE["lora"], **self.lora},
            "training": training,
        }
        file = folder / f"{self.name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}

# 9 rows in micro-batches of 2 are 5, and the last holds one row: no accumulation divides them.
SCENARIOS = [
    Scenario("accumulation-1", "0:9", 4),
    Scenario("accumulation-2", "0:9", 7, 2, training={"save_steps": 1}),
    Scenario("accumulation-3", "0:9", 10, 3),
    # Only a tensor of 4096 values or more gets 8-bit states.
    Scenario("8-bit-optimizer", "0:9", 7, 2, lora={"r": 64}, training={"optim": "adamw_bnb_8bit"}),
    Scenario("evaluation-by-epoch", "0:9", 7, 2, True, training={"eval_strategy": "epoch"}),
    Scenario(
        "evaluation-by-steps",
        "0:9",
        4,
        held_out=True,
        training={"eval_strategy": "steps", "eval_steps": 3, "save_steps": 1},
    ),
    Scenario("data-workers", "0:9", 4, 2, training={"dataloader_num_workers": 2}),
    Scenario("shared-openings", "0:9", 7, 2, data={"share_openings": True}),
    Scenario("saved-by-epoch", "0:9", 7, 2, True, training=EPOCHS),
    Scenario("one-checkpoint", "0:9", 7, 2, training={"save_total_limit": 1, "save_steps": 1}),
    Scenario(
        "best-at-end",
        "0:9",
        7,
        2,
        True,
        training={**EPOCHS, "load_best_model_at_end": True, "save_total_limit": 1},
    ),
    # A record is the mean of three steps, and saves fall between them.
    Scenario("records-span-saves", "0:9", 4, training={"logging_steps": 3, "save_steps": 2}),
    Scenario(
        "records-span-windows", "0:9", 7, 2, True, training={"logging_steps": 3, "save_steps": 1}
    ),
]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

# On the starter model a step takes seconds, so the jobs are shorter.
STARTER = [
    Scenario("starter-accumulation-2", "0:9", 2, 2, training={"learning_rate": 1e-3}),
    Scenario(
        "starter-evaluation",
        "0:9",
        2,
        held_out=True,
        training={"learning_rate": 1e-3, "eval_strategy": "epoch"},
    ),
]

# Two processes halve the accumulation, so it is even.
TWO_PROCESSES = [
    Scenario("two-processes", "0:9", 8, 2, True, training={"eval_strategy": "epoch"}),
    Scenario("two-processes-accumulation-4", "0:11", 8, 4, training={"save_steps": 1}),
]
