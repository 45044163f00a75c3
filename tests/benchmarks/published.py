"""What others measured of Llama-2-7B with LoRA on q_proj and v_proj, beside what is forecast.

    python -m tests.benchmarks.published           (make bench-published): no GPU, no weights

Theirs are runs of other code: whole logits, every layer whole, and SiLU(gate) kept for the backward
pass. Each line says what is assumed of it where it is not published. The forecast is of allocated
bytes, in 10^9 as theirs are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from recipe.quiet import quiet_libraries

quiet_libraries()

from recipe.data.tokens import TokenizedRow  # noqa: E402
from recipe.memory.forecast import Plan, forecast  # noqa: E402
from recipe.model import lora  # noqa: E402
from recipe.model.shapes import shape_of  # noqa: E402
from recipe.settings import load_settings  # noqa: E402

_NF4 = (
    "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, "
    "bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: bfloat16}"
)
_HALF = ["model.dtype=bfloat16", "training.fp16=false", "lora.r=8"]
_SINGLE = ["model.dtype=float32", "training.fp16=true"]
_NOT_AGAIN = "training.gradient_checkpointing=false"


@dataclass(frozen=True)
class Published:
    """``gigabytes`` as measured there, of ``rows`` of ``tokens``; both where assumed say so."""

    name: str
    gigabytes: float
    rows: int
    tokens: int
    overrides: Sequence[str]
    assumed: str


_MIB = 2**20 / 1e9
PUBLISHED = [
    Published(
        "litgpt, LoRA r=8, bf16, micro-batch 1", 21.30, 1, 1304, [*_HALF, _NOT_AGAIN],
        "nothing: Alpaca's longest row has 1,304 tokens there",
    ),
    Published("litgpt, micro-batch 2", 29.07, 2, 1304, [*_HALF, _NOT_AGAIN], "nothing"),
    Published(
        "torchtune, LoRA r=8, bf16, batch 2", 15.57, 2, 1304, _HALF,
        "two rows as long, layers checkpointed",
    ),
    Published(
        "torchtune, QLoRA, batch 2", 9.29, 2, 1304, [*_HALF, _NF4],
        "the same; theirs is the peak of loading, 9.13 before the first step",
    ),
    Published(
        "reports, LoRA r=16, fp16 on float32 weights", 40402 * _MIB, 1, 352,
        [*_SINGLE, _NOT_AGAIN], "a row of 352 tokens, the longest; nothing checkpointed",
    ),
    Published(
        "reports, feed-forward parts checkpointed", 40402 * _MIB, 4, 352,
        [*_SINGLE, _NOT_AGAIN, "study.checkpoint=feed_forward"], "four such rows",
    ),
    Published(
        "reports, on float16 weights, as lora_alpaca.yaml", 40402 * _MIB, 4, 352, [],
        "four such rows, layers checkpointed",
    ),
]  # fmt: skip


def forecast_gigabytes(one: Published) -> float:
    """Allocated at the peak, 10^9 bytes, by this recipe's model without what it spares."""
    fixed = ["training.gradient_accumulation_steps=1", "study.logits=whole"]
    settings = load_settings("lora_alpaca.yaml", [*fixed, *one.overrides])
    config, _ = shape_of(settings.model)
    rows = [
        TokenizedRow(n, np.full(one.tokens, n, dtype=np.int32), np.ones(one.tokens, dtype=np.bool_))
        for n in range(one.rows)
    ]
    with (
        patch.object(lora, "keep_two_factors"),
        patch.object(lora, "end_where_nothing_is_predicted"),
    ):
        found = forecast(Plan(settings, config, rows, [], device="cuda", share_openings=False))
    return found.allocated / 1e9


def main() -> None:
    print(
        "| run | measured there, GB | forecast here | difference | assumed |\n|---|---|---|---|---|"
    )
    for one in PUBLISHED:
        ahead = forecast_gigabytes(one)
        print(
            f"| {one.name} | {one.gigabytes:.2f} | {ahead:.2f} | {ahead / one.gigabytes - 1:+.1%} "
            f"| {one.assumed} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
