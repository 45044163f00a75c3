"""Which files of launch/ fit which model into which cards: forecasts, no GPU, no weights.

    python -m tests.benchmarks.topologies           (make bench-topologies)

Micro-batches of the configs' 8 rows of 1,024 tokens; the base in bfloat16 where not in 4 bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from recipe.quiet import quiet_libraries

quiet_libraries()

from recipe.memory.cards import card_named  # noqa: E402
from recipe.memory.forecast import Forecast, forecast  # noqa: E402
from recipe.memory.sharding import sharded  # noqa: E402
from recipe.settings import load_settings  # noqa: E402
from recipe.workload import workload  # noqa: E402

MODELS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-70b-hf")
# The smallest card of each size.
CARDS = tuple(
    card
    for name in ("A10G 24GB", "A100 40GB", "L40S 48GB", "H100 80GB", "H200 141GB")
    if (card := card_named(name))
)
_PROCESSES = 8
_BFLOAT16 = ("model.dtype=bfloat16", "training.fp16=false", "training.bf16=true")


@dataclass(frozen=True)
class Topology:
    """``strategy`` as ``recipe.memory.sharding`` knows it."""

    name: str
    config: str
    overrides: Sequence[str]
    processes: int
    strategy: str


_LORA = ("lora_alpaca.yaml", _BFLOAT16)
TOPOLOGIES = (
    Topology("one GPU, the base in 4 bit", "qlora_alpaca.yaml", (), 1, "ddp"),
    Topology("`single_gpu.yaml`", *_LORA, 1, "ddp"),
    Topology("`ddp.yaml`, 8 GPUs", *_LORA, _PROCESSES, "ddp"),
    Topology("`zero2.yaml`, 8 GPUs", *_LORA, _PROCESSES, "zero2"),
    Topology("`zero3.yaml` or `fsdp2.yaml`, 8 GPUs", *_LORA, _PROCESSES, "zero3"),
)


def forecasts(model: str) -> list[tuple[Topology, int]]:
    """Bytes of one GPU at its peak, by each topology."""
    found: dict[str, Forecast] = {}
    for one in TOPOLOGIES:
        if one.config not in found:
            settings = load_settings(one.config, [*one.overrides, f"model.name_or_path={model}"])
            found[one.config] = forecast(workload(settings, device="cuda").plan)
    return [
        (one, sharded(found[one.config], processes=one.processes, strategy=one.strategy).peak)
        for one in TOPOLOGIES
    ]


def fits_from(peak: int) -> str:
    """The smallest card that holds ``peak`` bytes."""
    return next((card.name for card in CARDS if peak <= card.memory), "none of them")


def main() -> None:
    print("| model | how | GiB of each GPU | fits from |\n|---|---|---|---|")
    for model in MODELS:
        for one, peak in forecasts(model):
            name = model.rpartition("/")[2].removesuffix("-hf")
            print(f"| {name} | {one.name} | {peak / 2**30:.1f} | {fits_from(peak)} |", flush=True)


if __name__ == "__main__":
    main()
