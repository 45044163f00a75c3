"""What was measured of base and tuned model becomes figures, a verdict, and what the page shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from recipe.data.rows import Row
from recipe.decoding.task import Answer
from recipe.judging.answers import repetition
from recipe.judging.copies import Copy, TrainingAnswers
from recipe.judging.metrics import ExactAnswer, RougeMetric, is_exact
from recipe.judging.parts import Part, answer_start
from recipe.judging.perplexity import Likelihood
from recipe.judging.rouge import Rouge, rouge
from recipe.judging.statistics import (
    Difference,
    Interval,
    mean_interval,
    paired_mean,
    paired_nll,
    perplexity_interval,
    share_interval,
)
from recipe.judging.verdict import Answers, Epoch, Evidence, turning, verdict

MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Measured:
    """One model on one part; ``answers`` by the row's index, none where none were written."""

    nll: list[Likelihood]
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """Both models on everything: of each part, ``neutral`` among them, ``base`` and ``tuned``.

    ``training`` are the texts of the rows that were trained on; ``notes`` are for the verdict's.
    ``behind_own`` and ``behind_others`` are of the tuned model, see ``recipe.judging.parts``.
    """

    parts: Mapping[str, Part]
    measured: Mapping[str, Mapping[str, Measured]]
    training: Sequence[Row]
    epochs: Sequence[Epoch]
    behind_own: Sequence[Likelihood] = ()
    behind_others: Sequence[Likelihood] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Judged:
    """One answer beside its reference."""

    text: str
    reference: str
    exact: bool
    rouge: Rouge
    copied: Copy | None


def report(compared: Compared) -> dict[str, Any]:
    """``verdict``, ``parts``, ``epochs``, ``turned`` and ``answers`` of report.json."""
    training = _TrainingTexts(compared.training)
    judged = {
        name: {model: _judged(part, compared.measured[name][model], training) for model in MODELS}
        for name, part in compared.parts.items()
    }
    found = evidence(compared, judged)
    said = verdict(found)
    return {
        "verdict": asdict(replace(said, notes=[*said.notes, *compared.notes])),
        "parts": {
            name: _part(name, pair, judged.get(name, {}))
            for name, pair in compared.measured.items()
        },
        "own_prompt": None if found.own_prompt is None else _json(found.own_prompt),
        "epochs": [_finite(asdict(one)) for one in compared.epochs],
        "turned": turning(compared.epochs),
        "answers": [
            shown
            for name, part in compared.parts.items()
            for shown in _answers(name, part, compared.measured[name], judged[name], training)
        ],
    }


def evidence(
    compared: Compared, judged: Mapping[str, Mapping[str, Mapping[int, _Judged]]]
) -> Evidence:
    """What the verdict rests on."""
    nll = {name: _nll_difference(pair) for name, pair in compared.measured.items()}
    base, tokens = _columns(compared.measured["seen"]["base"].nll)
    return Evidence(
        math.fsum(base) / max(sum(tokens), 1),
        nll["seen"],
        nll["neutral"],
        nll.get("unseen"),
        {name: len(part.rows) for name, part in compared.parts.items()},
        own_prompt=_own_prompt(compared),
        answers=_shares(compared, judged),
        epochs=compared.epochs,
    )


class _TrainingTexts:
    """Answers of the training rows, and the row that each is of."""

    def __init__(self, rows: Sequence[Row]) -> None:
        said = [
            (row.index, message.content)
            for row in rows
            for message in row.messages
            if message.role == "assistant"
        ]
        self.rows = [index for index, _ in said]
        self.answers = TrainingAnswers([text for _, text in said])

    def shown(self, copied: Copy | None) -> dict[str, Any] | None:
        """Which row a near copy repeats."""
        if copied is None or copied.index is None or not copied.near_copy:
            return None
        return {"index": self.rows[copied.index], "share": copied.share}


def _judged(part: Part, measured: Measured, training: _TrainingTexts) -> dict[int, _Judged]:
    found = {}
    for row in part.texts:
        answer = measured.answers.get(row.index)
        if answer is not None:
            text, reference = answer.text, row.messages[-1].content
            found[row.index] = _Judged(
                text,
                reference,
                is_exact(text, reference),
                rouge(text, reference),
                training.answers.overlap(text),
            )
    return found


def _part(
    name: str, pair: Mapping[str, Measured], judged: Mapping[str, Mapping[int, _Judged]]
) -> dict[str, Any]:
    both = [pair[model].nll for model in MODELS]
    shown: dict[str, Any] = {
        "rows": len(both[0]),
        "answered": len(judged["base"]) if judged else 0,
        "tokens": sum(one.tokens for one in both[0]),
        **{model: _figures(pair[model], judged.get(model, {})) for model in MODELS},
        "difference": {"nll": _json(_nll_difference(pair))},
    }
    longest = [[one.rouge.rougeL for one in _scored(judged.get(model, {}))] for model in MODELS]
    if longest[0]:
        shown["difference"]["rougeL"] = _json(paired_mean(*longest))
    return shown


def _figures(measured: Measured, judged: Mapping[int, _Judged]) -> dict[str, Any]:
    nll, tokens = _columns(measured.nll)
    found: dict[str, Interval] = {"perplexity": perplexity_interval(nll, tokens)}
    answers, every = list(measured.answers.values()), list(judged.values())
    if every:
        scored = _scored(judged)
        for kind, value in RougeMetric().compute(**_pairs(scored)).items() if scored else ():
            ends = mean_interval([getattr(one.rouge, kind) for one in scored])
            found[kind] = replace(ends, value=value)
        share = ExactAnswer().compute(**_pairs(every))["exact_answer"]
        ends = share_interval(sum(one.exact for one in every), len(every))
        found["exact_answer"] = replace(ends, value=share)
        told = _copied(judged)
        ended = [answer.finish_reason in ("eos", "stop") for answer in answers]
        found["near_copy"] = share_interval(sum(told), len(told))
        found["stop_rate"] = share_interval(sum(ended), len(ended))
        found["mean_tokens"] = mean_interval([len(answer.ids) for answer in answers])
        repeated = repetition([answer.ids for answer in answers])
        found["repetition"] = Interval(repeated, math.nan, math.nan)
    return {kind: _json(one) for kind, one in found.items()}


def _scored(judged: Mapping[int, _Judged]) -> list[_Judged]:
    """Those that ROUGE can tell anything of: references in other scripts have no words for it."""
    return [one for one in judged.values() if rouge(one.reference, one.reference).rouge1]


def _pairs(judged: Sequence[_Judged]) -> dict[str, list[str]]:
    return {
        "predictions": [one.text for one in judged],
        "references": [one.reference for one in judged],
    }


def _answers(
    name: str,
    part: Part,
    pair: Mapping[str, Measured],
    judged: Mapping[str, Mapping[int, _Judged]],
    training: _TrainingTexts,
) -> list[dict[str, Any]]:
    def said(model: str, index: int) -> dict[str, Any]:
        answer, one = pair[model].answers[index], judged[model][index]
        return {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "tokens": len(answer.ids),
            "rougeL": one.rouge.rougeL,
            "copied": training.shown(one.copied),
        }

    return [
        {
            "part": name,
            "index": row.index,
            "prompt": prompt_shown(row),
            "reference": row.messages[-1].content,
            **{model: said(model, row.index) for model in MODELS},
        }
        for row in part.texts
        if row.index in judged["base"]
    ]


def prompt_shown(row: Row) -> str:
    """What was asked, for people: each turn before the last answer; a lone one without its role."""
    turns = [
        (message.role, "\n\n".join(filter(None, (message.content, message.context))))
        for message in row.prompt
    ]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


def _own_prompt(compared: Compared) -> Difference | None:
    if not compared.behind_others:
        return None
    own, tokens = _columns(compared.behind_own)
    return paired_nll(own, _columns(compared.behind_others)[0], tokens)


def _shares(
    compared: Compared, judged: Mapping[str, Mapping[str, Mapping[int, _Judged]]]
) -> Answers | None:
    if not judged["seen"]["base"]:
        return None
    base, tuned = (
        [a for name in judged for a in compared.measured[name][model].answers.values()]
        for model in MODELS
    )
    wanted = [
        row.input_ids[answer_start(row) :].tolist()
        for name, part in compared.parts.items()
        for row in part.rows
        if row.index in judged[name]["base"]
    ]
    usual = np.fmax(repetition([one.ids for one in base]), repetition(wanted))
    copies = {name: [_copied(pair[model]) for model in MODELS] for name, pair in judged.items()}
    seen, unseen = (
        (_share(pair[0]), _share(pair[1]))
        for pair in (copies["seen"], copies.get("unseen", [[], []]))
    )
    return Answers(
        copied=seen,
        told=len(copies["seen"][1]),
        copied_unseen=unseen,
        repetition=(float(usual), repetition([one.ids for one in tuned])),
        empty=(_empty(base), _empty(tuned)),
    )


def _copied(judged: Mapping[int, _Judged]) -> list[bool]:
    return [one.copied.near_copy for one in judged.values() if one.copied is not None]


def _share(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if hits else math.nan


def _empty(answers: Sequence[Answer]) -> float:
    return _share([not answer.text.strip() for answer in answers])


def _nll_difference(pair: Mapping[str, Measured]) -> Difference:
    (base, tokens), (tuned, _) = (_columns(pair[model].nll) for model in MODELS)
    return paired_nll(base, tuned, tokens)


def _columns(likelihoods: Sequence[Likelihood]) -> tuple[list[float], list[int]]:
    return [one.nll for one in likelihoods], [one.tokens for one in likelihoods]


def _json(found: Interval | Difference) -> dict[str, float | None]:
    return _finite(asdict(found))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither nan nor infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
