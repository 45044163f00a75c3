"""ROUGE and exact answers as `evaluate.Metric`; nothing is fetched and no file stays behind."""

import math
import unicodedata
from collections.abc import Sequence
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Features, Value
from evaluate import Metric, MetricInfo

from recipe.judging.rouge import rouge

_INPUTS = """
Args:
    predictions: list of str, the answers.
    references: list of str, one for each answer.
"""


class _TextMetric(Metric):
    """A metric over pairs of texts, with all that it is given in memory."""

    def __init__(self) -> None:
        # evaluate makes a folder even for what it keeps in memory; this one goes away at once.
        with TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)


class RougeMetric(_TextMetric):
    """``compute`` returns rouge1, rouge2 and rougeL: each the mean of `rouge` over the pairs."""

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="ROUGE-1, ROUGE-2 and ROUGE-L, F-measures, mean over all pairs.",
            citation='Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"',
            inputs_description=_INPUTS,
            features=_texts(),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        found = [rouge(*pair) for pair in zip(predictions, references, strict=True)]
        return {
            "rouge1": _mean([one.rouge1 for one in found]),
            "rouge2": _mean([one.rouge2 for one in found]),
            "rougeL": _mean([one.rougeL for one in found]),
        }


class ExactAnswer(_TextMetric):
    """``compute`` returns exact_answer: the share of pairs for which `is_exact` is true."""

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Share of answers that are the reference, but for whitespace around them.",
            citation="",
            inputs_description=_INPUTS,
            features=_texts(),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_answer": _mean([is_exact(*pair) for pair in pairs])}


def is_exact(prediction: str, reference: str) -> bool:
    """Equal as Unicode NFC, without whitespace at both ends.

    Case, punctuation and whitespace between words count, and so do characters that only look
    alike. Two empty texts are equal.
    """
    prediction, reference = (
        unicodedata.normalize("NFC", text.strip()) for text in (prediction, reference)
    )
    return prediction == reference


def _texts() -> Any:
    return Features({"predictions": Value("string"), "references": Value("string")})


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
