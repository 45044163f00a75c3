"""Does the verdict say what is known to be true? Runs of the starter model whose truth is known.

    make bench-verdict                                     three seeds, over an hour on two cores
    make bench-verdict ARGS="--seeds 0 --truths memorised"

memorised: 8 starter rows for 60 epochs. learned: configs/starter.yaml. random: the same with the
answers dealt to other rows, so that nothing can be learned of which belongs to which. broken: the
learning rate of starter.yaml a hundredfold. alpaca: rows 300:500 of Alpaca as in report_200.yaml,
whose truth nobody knows; no threshold was chosen on it.
"""

import argparse
import json
import os
import platform
import random
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipe.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from recipe.comparison import CONTENT, Asked, compare_run  # noqa: E402
from recipe.finetune import finetune  # noqa: E402
from recipe.settings import RunFailed, generation_settings, load_settings  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
STARTER_ROWS = REPOSITORY / "configs/data/starter.json"
ALPACA = REPOSITORY.parent / "shared/data/alpaca_first1000.json"  # as in tests/conftest.py
TRUTHS = {
    "memorised": {"memorised"},
    "learned": {"learned"},
    "random": {"no effect"},
    "broken": {"broken", "refused"},
    "alpaca": set(),
}


def overrides(truth: str, seed: int, folder: Path) -> tuple[str, list[str]]:
    """Config, and what of it is otherwise."""
    run = [f"training.output_dir={folder / 'run'}", f"training.seed={seed}"]
    if truth == "memorised":
        rows = ["data.rows=0:8", "training.num_train_epochs=60", "training.logging_steps=10"]
        epochs = ["training.save_strategy=steps", "training.save_steps=10"]
        return "starter.yaml", [*run, *rows, *epochs]
    if truth == "random":
        return "starter.yaml", [*run, f"data.path={dealt_anew(seed, folder)}"]
    if truth == "broken":
        return "starter.yaml", [*run, "training.learning_rate=0.1"]
    if truth == "alpaca":
        data = [f"data.path={os.environ.get('RECIPE_ALPACA') or ALPACA}"]
        rows = ["data.rows=300:500", "data.held_out=500:600", "training.save_strategy=epoch"]
        return "report_200.yaml", [*run, *data, *rows]
    return "starter.yaml", run


def dealt_anew(seed: int, folder: Path) -> Path:
    """The starter rows, each with the answer of another one."""
    rows = json.loads(STARTER_ROWS.read_text())
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    others = zip(order, [*order[1:], order[0]], strict=True)
    answers = {here: rows[there]["output"] for here, there in others}
    file = folder / "dealt.json"
    file.write_text(json.dumps([{**row, "output": answers[n]} for n, row in enumerate(rows)]))
    return file


def judged(truth: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and compare."""
    generation = generation_settings({"max_new_tokens": args.max_new_tokens})
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config, changed = overrides(truth, seed, folder)
        try:
            run = finetune(load_settings(config, changed))
        except RunFailed as error:
            return {"label": "refused", "said": str(error)}
        label = compare_run(run, Asked(args.rows, generation))
        return {"label": label, **json.loads((run / CONTENT).read_text())}


def line(truth: str, seed: int, found: dict[str, Any]) -> str:
    """A row of the table."""
    right = not TRUTHS[truth] or found["label"] in TRUTHS[truth]
    cells = [truth, str(seed), found["label"] if right else f"**{found['label']}**"]
    if "parts" not in found:
        return "| " + " | ".join([*cells, found["said"], "", "", "", ""]) + " |"
    for name in ("seen", "unseen", "neutral"):
        part = found["parts"][name]
        values = [part[model]["perplexity"]["value"] for model in ("base", "tuned")]
        cells.append(" → ".join("–" if value is None else f"{value:,.2f}" for value in values))
    own = found["own_prompt"]
    cells.append("–" if own is None or own["value"] is None else f"{own['value']:+.2f}")
    copied = found["parts"]["seen"]["tuned"].get("near_copy", {}).get("value")
    return "| " + " | ".join([*cells, "–" if copied is None else f"{copied:.0%}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--truths", nargs="+", choices=list(TRUTHS), default=list(TRUTHS))
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    lines: list[str] = []
    wrong = 0
    for truth in args.truths:
        for seed in args.seeds:
            found = judged(truth, seed, args)
            wrong += bool(TRUTHS[truth]) and found["label"] not in TRUTHS[truth]
            lines.append(line(truth, seed, found))
            print(lines[-1], flush=True)
    table(lines)
    raise SystemExit(3 if wrong else 0)


def table(lines: Sequence[str]) -> None:
    """All rows, under what they were made with."""
    print(
        f"\n{platform.machine()} CPU, {torch.get_num_threads()} threads · torch "
        f"{torch.__version__} · {datetime.now(UTC):%Y-%m-%d}\n\n"
        "| truth | seed | verdict | seen | held out | neutral | own prompt | copied |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
