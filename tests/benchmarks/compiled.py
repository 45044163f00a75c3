"""Does torch.compile pay? Micro-batches of the starter run, compiled and not, in turn.

    make bench-compile

Forward and backward pass with the config's dropout, as training lays a micro-batch out, without
optimizer and log. Each micro-batch has another length, which may compile anew.
"""

import argparse
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

from recipe.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from recipe.data.batch import flatten  # noqa: E402
from recipe.model.checkpoint import load_base  # noqa: E402
from recipe.model.lora import add_lora  # noqa: E402
from recipe.run_data import load_data  # noqa: E402
from recipe.settings import load_settings  # noqa: E402
from recipe.training.loss import token_nll  # noqa: E402


def seconds(model: Any, batch: dict[str, Any]) -> float:
    """One forward and backward pass."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_indices", "shift_labels")}
    started = time.perf_counter()
    token_nll(model(**inputs).logits[0], batch["labels"]).mean().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm-up", type=int, default=4, help="micro-batches that may compile")
    parser.add_argument("--counted", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:  # kernels of an earlier run do not count
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Both in turn, and the lines for the screen."""
    settings = load_settings("starter.yaml")
    rows, size = load_data(settings).train.rows, 8
    model = add_lora(load_base(settings.model), settings.lora).train()
    compiled = torch.compile(model)
    spent: dict[str, list[float]] = {"as it is": [], "compiled": []}
    for number in range(args.warm_up + args.counted):
        batch = flatten(rows[size * number : size * (number + 1)], share_openings=False)
        for name, one in (("as it is", model), ("compiled", compiled)):
            spent[name].append(seconds(one, batch))
    first = {name: sum(each[: args.warm_up]) for name, each in spent.items()}
    later = {name: statistics.median(each[args.warm_up :]) for name, each in spent.items()}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(
        f"first {args.warm_up} micro-batches: {first['as it is']:.1f} s as it is, "
        f"{first['compiled']:.1f} s compiled ({graphs} graphs)\n"
        f"each of the {args.counted} after them: {later['as it is']:.2f} s as it is, "
        f"{later['compiled']:.2f} s compiled, {later['as it is'] / later['compiled']:.2f} times as "
        f"quick (medians)\n{torch.get_num_threads()} CPU threads · torch {torch.__version__} · "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


if __name__ == "__main__":
    main()
