"""The preliminaries of two course reports on fine-tuning Llama with LoRA, measured on this machine.

Each lesson gives a figure and a paragraph whose numbers come from that measurement. Imported alone,
this loads no library, so that the names of the lessons are there at once.
"""

from collections.abc import Mapping
from types import MappingProxyType

from recipe.proving.lessons.lesson import Asked, Lesson, Taught

__all__ = ["LESSONS", "Asked", "Lesson", "Taught"]


def _accumulation(asked: Asked) -> Taught:
    from recipe.proving.lessons import accumulation

    return accumulation.teach(asked)


def _checkpointing(asked: Asked) -> Taught:
    from recipe.proving.lessons import checkpointing

    return checkpointing.teach(asked)


def _low_precision(asked: Asked) -> Taught:
    from recipe.proving.lessons import low_precision

    return low_precision.teach(asked)


def _truncated_svd(asked: Asked) -> Taught:
    from recipe.proving.lessons import truncated_svd

    return truncated_svd.teach(asked)


def _lora_rank(asked: Asked) -> Taught:
    from recipe.proving.lessons import lora_rank

    return lora_rank.teach(asked)


def _kv_cache(asked: Asked) -> Taught:
    from recipe.proving.lessons import kv_cache

    return kv_cache.teach(asked)


_ALL = (
    Lesson(
        "accumulation",
        "Are k accumulated micro-batches the same as one big batch?",
        needs_model=False,
        needs_adapter=False,
        measure=_accumulation,
    ),
    Lesson(
        "checkpointing",
        "What does recomputing activations save, and what does it cost?",
        needs_model=False,
        needs_adapter=False,
        measure=_checkpointing,
    ),
    Lesson(
        "low-precision",
        "What does fp16 lose without master weights and without loss scaling?",
        needs_model=False,
        needs_adapter=False,
        measure=_low_precision,
    ),
    Lesson(
        "truncated-svd",
        "How well does a low rank approximate a weight, and the change that LoRA trained?",
        needs_model=True,
        needs_adapter=True,
        measure=_truncated_svd,
    ),
    Lesson(
        "lora-rank",
        "How many bytes of gradients and of Adam's state does a rank cost?",
        needs_model=False,
        needs_adapter=False,
        measure=_lora_rank,
    ),
    Lesson(
        "kv-cache",
        "What does the key-value cache cost in memory, and save in time?",
        needs_model=True,
        needs_adapter=False,
        measure=_kv_cache,
    ),
)
LESSONS: Mapping[str, Lesson] = MappingProxyType({lesson.name: lesson for lesson in _ALL})
