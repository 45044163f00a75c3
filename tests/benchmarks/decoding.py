"""How quick decoding is, against transformers' generate with the same weights, in one run.

    make bench-decoding                  about 12 minutes on two cores
    make bench-decoding ARGS="--tokens 32 --repeats 3"

Greedy search on the starter model: one prompt against one prompt; 32 prompts of unequal length in a
batch against generate called for one after the other; the KV cache on against off. Each pair is
timed alternately; the ratio is the median of the pairs' ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from recipe.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from recipe.answerer import STARTER, Answerer, load_answerer  # noqa: E402
from recipe.data.prompts import Prompt  # noqa: E402
from recipe.decoding.task import Encoded, eos_token_ids  # noqa: E402
from recipe.settings import generation_settings  # noqa: E402

Ids = list[list[int]]
SUBJECTS = ["the sea", "music", "the number seven", "rain", "old trains", "bread", "cats", "paper"]
TASKS = [
    "Name one thing about {}.",
    "Describe {} to a child who has never seen or heard of it, in simple words.",
    "What is {}?",
    "I have to give a short talk tomorrow and I am nervous about it. It should be about {}, and it "
    "should begin with a question. Please write only its first sentence.",
]


def ours(answerer: Answerer, encoded: list[Encoded], tokens: int, **given: object) -> Ids:
    settings = generation_settings({"max_new_tokens": tokens, **given})
    found = answerer.decoder(settings).answers(encoded, batch_size=len(encoded))
    return [answer.ids for (answer,) in found]


def stock(answerer: Answerer, encoded: list[Encoded], tokens: int) -> Ids:
    eos = sorted(eos_token_ids(answerer.model, answerer.tokenizer))
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=eos, pad_token_id=eos[0])
    found = []
    for prompt in encoded:
        ids = torch.tensor([prompt.ids], device=answerer.model.device)
        with torch.inference_mode():
            whole = answerer.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        found.append(whole[0, len(prompt.ids) :].tolist())
    return found


def compare(
    name: str, first: Callable[[], Ids], second: Callable[[], Ids], *, repeats: int
) -> None:
    """Print both medians, how much quicker ``first`` is, and how many answers are the same."""
    times: list[tuple[float, float]] = []
    answers: list[Ids] = [[], []]
    for _ in range(repeats):
        seconds = []
        for place, run in enumerate((first, second)):
            started = time.perf_counter()
            answers[place] = run()
            seconds.append(time.perf_counter() - started)
        times.append((seconds[0], seconds[1]))
    ratio = statistics.median(b / a for a, b in times)
    medians = [statistics.median(pair[place] for pair in times) for place in range(2)]
    same = sum(a == b for a, b in zip(*answers, strict=True))
    print(
        f"| {name} | {medians[0]:.2f} s | {medians[1]:.2f} s | {ratio:.2f} | "
        f"{same} of {len(answers[0])} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    answerer = load_answerer(adapter="none", model=STARTER, template=None, runs=Path("absent"))
    device = answerer.model.device
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {datetime.now(UTC):%Y-%m-%d}\n"
    )
    questions = [task.format(subject) for subject in SUBJECTS for task in TASKS]
    many = answerer.encode([Prompt(i, text) for i, text in enumerate(questions)])
    one, tokens, repeats = many[1:2], args.tokens, args.repeats
    ours(answerer, one, 2), stock(answerer, one, 2)
    print("| | here | the other | times as quick | same tokens |\n|---|---|---|---|---|")
    compare(
        f"one prompt, up to {tokens} tokens, against generate",
        lambda: ours(answerer, one, tokens),
        lambda: stock(answerer, one, tokens),
        repeats=repeats,
    )
    compare(
        f"{len(many)} prompts, up to {tokens} tokens, against generate one by one",
        lambda: ours(answerer, many, tokens),
        lambda: stock(answerer, many, tokens),
        repeats=max(repeats // 2, 1),
    )
    compare(
        "one prompt, 128 tokens, KV cache on against off",
        lambda: ours(answerer, one, 128, min_new_tokens=128),
        lambda: ours(answerer, one, 128, min_new_tokens=128, use_cache=False),
        repeats=max(repeats // 2, 1),
    )


if __name__ == "__main__":
    main()
