"""A few fixed prompts, and what the base and the tuned model make of them.

Stored beside the adapter, they show on any machine whether it still does what it was trained to do:
that is more than that its files are whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedTokenizerBase

from recipe.data.templates import Template

PROMPTS = (
    ("Name three primary colours.", ""),
    ("What is the capital of France?", ""),
    ("Translate to German: Good morning.", ""),
    ("Write the date as YYYY-MM-DD only.", "The bridge was opened on 4 May 2019."),
    ("Write one sentence about the sea.", ""),
    ("Is the review positive or negative?", "The soup was cold and the waiter was rude."),
)
_TOP_K = 10

# How far a logit may lie from the stored one, in standard deviations of that prompt's logits over
# the vocabulary. Kernels, thread counts and devices round differently; by how much on the starter
# model is measured by `make bench-adapter`.
TOLERANCE = {"float32": 5e-4, "float16": 1e-1, "bfloat16": 3e-1}
_QUANTIZED = 3e-1
# The base shows how this machine rounds: where its logits agree to the last digit, the tuned ones
# have no reason to differ by all that the dtype would excuse.
_TIMES_BASE = 4
_LEAST_SHARE = 1 / 6


class Probe(BaseModel):
    """One prompt behind its template. ``token_ids`` are the likeliest next tokens of the base and
    of the tuned model, ``base`` and ``tuned`` their logits.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    input_ids: list[int]
    token_ids: list[int]
    base: list[float]
    tuned: list[float]


class Difference(BaseModel):
    """The largest over all probes, each in standard deviations of its prompt's logits."""

    base: float
    tuned: float
    effect: float


def encode_probes(
    template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]]]:
    """The probe prompts in ``template``, as text and as token ids."""
    texts = [template.prompt(*prompt) for prompt in PROMPTS]
    encoded = tokenizer(texts, add_special_tokens=template.add_special_tokens)
    return texts, encoded["input_ids"]


def next_token_logits(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """What ``model`` says after each row, computed as generation computes it, one row at a time.

    Args:
        model: a base, or a PeftModel with whatever adapter is active; left as it was.

    Returns:
        float32 (rows, vocabulary) on the CPU.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(), as_generation_sees(plain), _without_autocast(model):
        logits = [
            model(
                torch.tensor([list(row)], device=plain.device), use_cache=False, logits_to_keep=1
            ).logits[0, -1]
            for row in rows
        ]
    return torch.stack(logits).float().cpu()


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """A Trainer wraps the model's forward in it; generation knows none.

    The model below would be without it, but FSDP2 wants to be called at the top.
    """
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


@contextmanager
def as_generation_sees(model: Any) -> Iterator[None]:
    """Evaluation mode, the library's attention, and modules that were trained whole in the dtype
    of the base: mixed precision keeps them in float32, and a later load does not.
    """
    attention = model.config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]
    casts = [
        (parameter, parameter.data, original.dtype)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for copy in wrapper.modules_to_save.values()
        for parameter, original in zip(
            copy.parameters(), wrapper.original_module.parameters(), strict=True
        )
    ]
    model.eval()
    model.set_attn_implementation("sdpa")
    for parameter, _, dtype in casts:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data, _ in casts:
            parameter.data = data
        model.set_attn_implementation(attention)
        for module, mode in modes:
            module.training = mode


def make_probes(
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    *,
    base: torch.Tensor,
    tuned: torch.Tensor,
) -> list[Probe]:
    """Keep what ``next_token_logits`` gave, where either model finds a token likely."""
    probes = []
    for text, row, before, after in zip(texts, rows, base, tuned, strict=True):
        likely = {*before.topk(_TOP_K).indices.tolist(), *after.topk(_TOP_K).indices.tolist()}
        token_ids = sorted(likely)
        probes.append(
            Probe(
                prompt=text,
                input_ids=list(row),
                token_ids=token_ids,
                base=before[token_ids].tolist(),
                tuned=after[token_ids].tolist(),
            )
        )
    return probes


def compare_probes(
    probes: Sequence[Probe], *, base: torch.Tensor, tuned: torch.Tensor
) -> Difference:
    """How far the logits of now lie from the stored ones, and the stored ones from each other."""
    spreads = base.std(dim=-1)

    def largest(pairs: Iterable[tuple[torch.Tensor, Sequence[float]]]) -> float:
        differences = [
            (now - torch.tensor(then, dtype=torch.float32)).abs().max() / spread
            for spread, (now, then) in zip(spreads, pairs, strict=True)
        ]
        return torch.stack(differences).max().item()  # NaN, if one is

    return Difference(
        base=largest((b[p.token_ids], p.base) for b, p in zip(base, probes, strict=True)),
        tuned=largest((t[p.token_ids], p.tuned) for t, p in zip(tuned, probes, strict=True)),
        effect=largest((torch.tensor(p.tuned), p.base) for p in probes),
    )


def tolerance(model: nn.Module) -> float:
    """For the base: see ``TOLERANCE``; one in 4 or 8 bit rounds differently on every device."""
    if getattr(model, "is_quantized", False):
        return _QUANTIZED
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"])


def tuned_tolerance(limit: float, base_difference: float) -> float:
    """For the tuned model, where the base was found to differ by so much of its ``limit``."""
    return min(limit, max(_LEAST_SHARE * limit, _TIMES_BASE * base_difference))
