"""How far are the recipe's gradients from stock code, and from float64?

    make bench-exactness                          the starter model on the first starter rows
    make bench-exactness ARGS="data.path=alpaca_data.json"

Captures the gradient of the real Trainer run before each optimizer step: 10 rows of unequal length,
8 a step, so the last window holds 2. Compares it with stock LlamaForCausalLM on the padded whole.
"""

import argparse
import platform
import tempfile
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from recipe.proving.stock import recipe_gradients, relative_difference, stock_gradients
from recipe.quiet import quiet_libraries
from recipe.settings import load_settings

SHAPES = [(1, 8), (2, 4), (8, 1)]
FIXED = [
    "lora.lora_dropout=0.0",
    "data.rows=0:10",
    "data.held_out=null",
    "training.num_train_epochs=1",
    "training.learning_rate=1e-30",
    "training.weight_decay=0.0",
    "training.max_grad_norm=0.0",
    "training.train_sampling_strategy=sequential",
]
# The loss is torch's in float64 of the logits, but for transformers' own.
STOCK: dict[str, dict[str, Any]] = {
    "sdpa": {"dtype": torch.float32},
    "eager": {"dtype": torch.float32, "attn_implementation": "eager"},
    "float64": {"dtype": torch.float64},
    "own loss": {"dtype": torch.float32, "own_loss": True},
}


def measure(overrides: list[str], batch: int, accumulation: int, checkpointing: bool) -> str:
    """One row of the table: the larger of the two steps' differences in each cell."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            "starter.yaml",
            [
                *FIXED,
                *overrides,
                f"training.output_dir={folder}",
                f"training.per_device_train_batch_size={batch}",
                f"training.gradient_accumulation_steps={accumulation}",
                f"training.gradient_checkpointing={str(checkpointing).lower()}",
            ],
        )
        ours, rows, adapter = recipe_gradients(settings)
    stock = {
        name: stock_gradients(settings, rows, adapter, rows_per_step=8, **asked)
        for name, asked in STOCK.items()
    }

    def worst(one: list, other: list) -> str:
        return f"{max(map(relative_difference, one, other)):.1e}"

    cells = [
        f"{batch}x{accumulation}{', checkpointing' if checkpointing else ''}",
        worst(ours, stock["sdpa"]),
        worst(stock["eager"], stock["sdpa"]),
        worst(ours, stock["float64"]),
        worst(stock["sdpa"], stock["float64"]),
        worst(stock["own loss"], stock["float64"]),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    quiet_libraries()
    lines = [
        measure(args.overrides, batch, accumulation, checkpointing)
        for batch, accumulation in SHAPES
        for checkpointing in (False, True)
    ]
    print(
        f"\n{platform.machine()} CPU, {torch.get_num_threads()} threads · torch "
        f"{torch.__version__}, transformers {transformers.__version__} · "
        f"{datetime.now(UTC):%Y-%m-%d}\n\n"
        "| rows × accumulation | recipe ↔ stock | stock eager ↔ stock sdpa | recipe ↔ float64 | "
        "stock ↔ float64 | with transformers' loss ↔ float64 |\n|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
