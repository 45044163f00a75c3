"""Base and tuned model of a run on the same rows: likelihoods, answers, and checkpoints between."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import set_peft_model_state_dict
from tqdm import tqdm

from recipe.answerer import Answerer
from recipe.compared_run import ComparedRun, saved_on_the_way
from recipe.data.neutral import bos_of, neutral_ids
from recipe.data.tokens import TokenizedRow
from recipe.decoding.task import Answer
from recipe.judging.parts import Part, behind_others, last_answers
from recipe.judging.perplexity import Likelihood, perplexity, rows_nll, window_nll
from recipe.judging.report import MODELS, Compared, Measured
from recipe.judging.verdict import Epoch
from recipe.settings import GenerationSettings, UserError
from recipe.sharing.tensors import read_tensors

_BATCH = 16
# Of the neutral text: each token has at least half a window before it, the first ones aside.
_WINDOW, _STRIDE = 256, 128


def compared(
    run: ComparedRun,
    answerer: Answerer,
    parts: Mapping[str, Part],
    generation: GenerationSettings | None,
) -> Compared:
    """Measure everything; the adapter of a checkpoint may be on the model afterwards.

    Args:
        generation: None for likelihoods alone.

    Raises:
        UserError: no prompt leaves room for an answer.
        RunFailed: memory does not suffice.
    """
    measuring = _Measuring(run, answerer, parts, generation)
    measured = measuring.measured()
    own, others = _prompt_swap(parts.get("unseen"), measuring.context)
    with _bar("tuned: prompts swapped", len(own) + len(others)) as bar:
        behind_own = rows_nll(answerer.model, own, done=bar.update)
        behind = rows_nll(answerer.model, others, done=bar.update)
    epochs, notes = measuring.epochs(measured)
    return Compared(
        parts,
        measured,
        run.texts,
        epochs,
        behind_own,
        behind,
        notes=[*measuring.notes(measured), *notes],
    )


@dataclass(frozen=True)
class _Measuring:
    run: ComparedRun
    answerer: Answerer
    parts: Mapping[str, Part]
    generation: GenerationSettings | None

    @property
    def context(self) -> int:
        """Tokens that fit into the model."""
        return int(self.answerer.model.config.max_position_embeddings)

    def measured(self) -> dict[str, dict[str, Measured]]:
        """Of each part, and of the neutral text, both models."""
        found: dict[str, dict[str, Measured]] = {name: {} for name in (*self.parts, "neutral")}
        for model in MODELS:
            with self._speaking(model) as speaker:
                for name, nll in self._nll(model).items():
                    found[name][model] = Measured(nll)
                if all(one.finite for each in found.values() for one in each[model].nll):
                    for name, part in self.parts.items():
                        answers = self._answers(speaker, part, f"{model}, {name}: answers")
                        found[name][model] = Measured(found[name][model].nll, answers)
        for pair in found.values():
            if not all(pair[model].answers for model in MODELS):  # one of the two cannot speak
                pair.update({model: Measured(pair[model].nll) for model in MODELS})
        return found

    def epochs(
        self, measured: Mapping[str, Mapping[str, Measured]]
    ) -> tuple[list[Epoch], list[str]]:
        """Perplexities of the base, of the run's checkpoints and of its adapter; and notes."""
        saved, notes = saved_on_the_way(self.run)
        if not saved:
            return [], notes
        base = {name: pair["base"].nll for name, pair in measured.items()}
        found = [_epoch("base", 0, 0, base, is_adapter=False)]
        for one in saved:
            if one.is_adapter:
                nll = {name: pair["tuned"].nll for name, pair in measured.items()}
            else:
                set_peft_model_state_dict(self.answerer.model, read_tensors(one.folder))
                nll = self._nll(one.folder.name)
            found.append(
                _epoch(one.folder.name, one.epoch, one.step, nll, is_adapter=one.is_adapter)
            )
        return found, notes

    def notes(self, measured: Mapping[str, Mapping[str, Measured]]) -> list[str]:
        """What was left out of the answers."""
        if self.generation is None:
            return []
        if not any(pair["base"].answers for pair in measured.values()):
            return ["No answers were written: a model computes values that are not finite."]
        left_out = sum(
            len(part.rows) - len(measured[name]["base"].answers)
            for name, part in self.parts.items()
        )
        tokens = self.generation.values["max_new_tokens"]
        return [
            f"{left_out} rows were not answered: they have no prompt, were truncated, or leave no "
            f"room for {tokens} tokens in the context of {self.context}."
        ][: bool(left_out)]

    @contextmanager
    def _speaking(self, model: str) -> Iterator[Answerer]:
        if model == "tuned":
            yield self.answerer
            return
        with self.answerer.as_base() as base:
            yield base

    def _nll(self, doing: str) -> dict[str, list[Likelihood]]:
        model, tokenizer = self.answerer.model, self.answerer.tokenizer
        found = {}
        for name, part in self.parts.items():
            with _bar(f"{doing}, {name}: likelihood", len(part.rows)) as bar:
                found[name] = rows_nll(model, part.rows, done=bar.update)
        window = min(_WINDOW, self.context - 1)
        found["neutral"] = list(
            window_nll(
                model,
                neutral_ids(tokenizer),
                window=window,
                stride=min(_STRIDE, window),
                first=bos_of(tokenizer),
            )
        )
        return found

    def _answers(self, speaker: Answerer, part: Part, doing: str) -> dict[int, Answer]:
        if self.generation is None:
            return {}
        tokens = self.generation.values["max_new_tokens"]
        prompts = part.prompts(self.context - tokens, cut=self.run.cut)
        if not prompts and tokens >= self.context:
            raise UserError.single(
                "max_new_tokens",
                f"{tokens} leave no room for a prompt in the model's context of {self.context}. "
                "Lower it.",
            )
        found = {}
        with _bar(doing, len(prompts)) as bar:
            # Of like length together, so that little is padded.
            ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
            for answers in speaker.decoder(self.generation).answers(ordered, batch_size=_BATCH):
                found[answers[0].index] = answers[0]
                bar.update()
        return found


def _prompt_swap(part: Part | None, context: int) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Last answers behind their own prompts, and behind others; of rows that have both."""
    if part is None:
        return [], []
    swapped = behind_others(part.rows, context=context)
    pairs = [
        (own, other)
        for own, other in zip(last_answers(part.rows), swapped, strict=True)
        if other is not None
    ]
    return [own for own, _ in pairs], [other for _, other in pairs]


def _epoch(
    name: str, epoch: float, step: int, nll: Mapping[str, Sequence[Likelihood]], *, is_adapter: bool
) -> Epoch:
    unseen = perplexity(nll["unseen"]) if "unseen" in nll else None
    seen, neutral = perplexity(nll["seen"]), perplexity(nll["neutral"])
    return Epoch(epoch, step, name, seen, unseen, neutral, is_adapter=is_adapter)


@contextmanager
def _bar(doing: str, total: int) -> Iterator["tqdm[Any]"]:
    """On a terminal, from the third second on."""
    with tqdm(total=total, desc=doing, delay=2, leave=False, disable=None) as bar:
        yield bar
