"""What the checks of an adapter cost at each load, and how far its probes move by rounding alone.

make bench-adapter ADAPTER=runs/starter-001
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe.answerer import Answerer, load_answerer
from recipe.quiet import quiet_libraries
from recipe.sharing.probes import (
    TOLERANCE,
    compare_probes,
    encode_probes,
    next_token_logits,
    tuned_tolerance,
)

PAIRS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", nargs="?", help="folder or run; default: the newest")
    adapter = parser.parse_args().adapter
    quiet_libraries()
    answerer = load(adapter)
    print(f"{answerer.folder} · {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    loading(adapter, answerer)
    rounding(answerer)


def load(adapter: str | None) -> Answerer:
    return load_answerer(adapter=adapter, model=None, template=None, runs=Path("runs"))


def loading(adapter: str | None, answerer: Answerer) -> None:
    """Alternately with stock code that checks nothing, both with warm file caches."""
    assert answerer.verification is not None
    assert answerer.verification.receipt is not None
    base = answerer.verification.receipt.base

    def stock() -> Any:
        model = LlamaForCausalLM.from_pretrained(
            base.name_or_path, use_safetensors=True, trust_remote_code=False
        )
        AutoTokenizer.from_pretrained(base.name_or_path, trust_remote_code=False)
        return PeftModel.from_pretrained(model, answerer.folder)

    ours, theirs = [], []
    for _ in range(PAIRS):
        ours.append(seconds(lambda: load(adapter)))
        theirs.append(seconds(stock))
    extra = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    print(
        f"load with checks {statistics.median(ours):.2f} s, stock {statistics.median(theirs):.2f} s"
        f", difference {extra:+.2f} s (medians of {PAIRS} pairs)"
    )


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rounding(answerer: Answerer) -> None:
    """The same weights, computed otherwise: everything here is to be accepted."""
    assert answerer.verification is not None
    assert answerer.verification.receipt is not None
    assert answerer.verification.receipt.proof is not None
    probes = answerer.verification.receipt.proof.probes
    _, rows = encode_probes(answerer.template, answerer.tokenizer)
    model = answerer.model
    threads = torch.get_num_threads()
    print("| computed | base differs | tolerance | tuned differs | tolerance |")
    print("|---|---|---|---|---|")
    for name, dtype, kernel, count in (
        ("as when it was saved", torch.float32, nullcontext(), threads),
        ("one thread", torch.float32, nullcontext(), 1),
        ("another attention kernel", torch.float32, sdpa_kernel(SDPBackend.MATH), threads),
        ("float64", torch.float64, nullcontext(), threads),
        ("float16", torch.float16, nullcontext(), threads),
        ("bfloat16", torch.bfloat16, nullcontext(), threads),
    ):
        torch.set_num_threads(count)
        model.to(dtype)
        with kernel:
            tuned = next_token_logits(model, rows)
            with model.disable_adapter():
                base = next_token_logits(model, rows)
        found = compare_probes(probes, base=base, tuned=tuned)
        limit = TOLERANCE.get(str(dtype).removeprefix("torch."), TOLERANCE["float32"])
        tuned_limit = tuned_tolerance(limit, found.base)
        print(
            f"| {name} | {found.base:.1e} | {limit:g} | {found.tuned:.1e} | {tuned_limit:.2g} |",
            flush=True,
        )
    torch.set_num_threads(threads)
    print(f"the adapter moves them by up to {found.effect:.2f}")


if __name__ == "__main__":
    main()
