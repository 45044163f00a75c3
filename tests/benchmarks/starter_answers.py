"""Does the starter run teach? Exact answers on the held-out starter rows, tuned against base.

    make bench-starter                          three seeds, about half an hour on two cores
    make bench-starter ARGS="--seeds 0"

Trains configs/starter.yaml once a seed, then asks every held-out row that has one right answer:
the tuned model, the base in the same template and the base in its own chat template, all greedy.
The interval is a paired bootstrap over rows of the mean over seeds.
"""

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from recipe.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
import transformers  # noqa: E402

from recipe.answerer import Answerer, load_answerer  # noqa: E402
from recipe.data.prompts import Prompt  # noqa: E402
from recipe.finetune import finetune  # noqa: E402
from recipe.settings import generation_settings, load_settings, row_range  # noqa: E402

RESAMPLES = 10_000
MAX_NEW_TOKENS = 32
Row = dict[str, str]


def normal(text: str) -> str:
    """What configs/data/README.md compares: trimmed, case-folded, one full stop removed."""
    return text.strip().casefold().removesuffix(".")


def exact(answerer: Answerer, rows: Sequence[Row]) -> np.ndarray:
    """1.0 for each row whose answer is exactly right, else 0.0."""
    prompts = [Prompt(i, row["instruction"], row["input"]) for i, row in enumerate(rows)]
    decoder = answerer.decoder(generation_settings({"max_new_tokens": MAX_NEW_TOKENS}))
    found = decoder.answers(answerer.encode(prompts), batch_size=16)
    answers = [answer.text for (answer,) in found]
    return np.array(
        [float(normal(a) == normal(r["output"])) for a, r in zip(answers, rows, strict=True)]
    )


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap of the mean over rows."""
    generator = np.random.default_rng(0)
    rows = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    settings = load_settings("starter.yaml", args.overrides)
    start, stop = row_range(str(settings.data.held_out))
    rows: list[Row] = json.loads(Path(settings.data.path).read_text())[start:stop]
    rows = [row for row in rows if row["checkable"] == "yes"]

    tuned = []
    for seed in args.seeds:
        run = finetune(load_settings("starter.yaml", [*args.overrides, f"training.seed={seed}"]))
        answerer = load_answerer(adapter=str(run / "adapter"), model=None, template=None, runs=run)
        tuned.append(exact(answerer, rows))
        print(f"seed {seed}: {tuned[-1].mean():.1%}", flush=True)
    base = {
        template: exact(
            load_answerer(
                adapter="none",
                model=settings.model.name_or_path,
                template=template,
                runs=Path("runs"),
            ),
            rows,
        )
        for template in ("alpaca", "chat")
    }
    report(rows, np.stack(tuned), base, args.seeds)


def report(
    rows: Sequence[Row], tuned: np.ndarray, base: dict[str, np.ndarray], seeds: Sequence[int]
) -> None:
    """Print the table; ``tuned`` is (seeds, rows), each of ``base`` is (rows,)."""
    print(
        f"\n{len(rows)} held-out rows with one right answer, seeds {', '.join(map(str, seeds))} · "
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads · torch {torch.__version__}, "
        f"transformers {transformers.__version__} · {datetime.now(UTC):%Y-%m-%d}\n"
    )
    print("| model | exact answers | tuned minus this, 95% interval |\n|---|---|---|")
    print(f"| tuned, alpaca template | {tuned.mean():.1%} | |")
    for template, right in base.items():
        low, high = interval(tuned.mean(axis=0) - right)
        gain = (tuned.mean(axis=0) - right).mean()
        print(
            f"| base, {template} template | {right.mean():.1%} | "
            f"{gain:+.1%} ({low:+.1%} to {high:+.1%}) |"
        )
    kinds = defaultdict(list)
    for i, row in enumerate(rows):
        kinds[row["kind"]].append(i)
    print("\n| kind | rows | tuned | base, alpaca | base, chat |\n|---|---|---|---|---|")
    for kind, at in sorted(kinds.items()):
        cells = [tuned[:, at].mean(), *(right[at].mean() for right in base.values())]
        print(f"| {kind} | {len(at)} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
