"""Beam search in groups, and beam search whose answers must contain given words.

transformers 5 has neither in its core. What both share with its plain beam search is done as it
does it: a text's score is the sum of its log-probabilities, divided by (number of its tokens, EOS
included) ** length_penalty once it has ended; candidates are the best (1 + number of EOS tokens) ·
beams continuations; of those that end, the ones among the best ``num_beams`` count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import LogitsProcessorList

from recipe.decoding.constraints import Constraints
from recipe.decoding.steps import Steps
from recipe.decoding.stopping import FinishReason, Interruption, Stop


@dataclass(frozen=True)
class Hypothesis:
    """``ids`` are the answer's tokens; ``parent`` is the beam (row) that it continues."""

    ids: tuple[int, ...]
    score: float
    parent: int
    reason: FinishReason | None = None


@dataclass(frozen=True)
class Ended:
    """An answer and its score, the length taken into account."""

    score: float
    ids: list[int]
    reason: FinishReason


@dataclass
class Beam:
    """``width`` texts that grow together, and the best ``width`` that have ended."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    max_new_tokens: int
    running: list[Hypothesis]
    ended: list[Ended] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Take the next step's ``candidates``, the best first; those that end or go on."""
        ending = [one for one in candidates[: self.width] if one.reason is not None]
        for one in ending:
            self._end(one)
        self.running = [one for one in candidates if one.reason is None][: self.width]
        self.done = not self.running or not self._may_improve()
        return ending + self.running

    def interrupt(self) -> None:
        """End what is running as it stands; answers that were whole stay in front."""
        cut = [self._ended(replace(one, reason="interrupted")) for one in self.running]
        self.ended += sorted(cut, key=lambda e: -e.score)
        self.done = True

    def _end(self, one: Hypothesis) -> None:
        # sorted is stable: of equals the one that ended first stays in front.
        ended = [*self.ended, self._ended(one)]
        self.ended = sorted(ended, key=lambda e: -e.score)[: self.width]

    def _ended(self, one: Hypothesis) -> Ended:
        assert one.reason is not None
        return Ended(self._normal(one.score, max(len(one.ids), 1)), list(one.ids), one.reason)

    def _may_improve(self) -> bool:
        """transformers' three rules, see its ``_check_early_stop_heuristic``."""
        if len(self.ended) < self.width:
            return True
        if self.early_stopping is True:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_new_tokens if longest else len(self.running[0].ids)
        best = max(one.score for one in self.running)
        return self._normal(best, length) > self.ended[-1].score

    def _normal(self, score: float, length: int) -> float:
        return float(score / length**self.length_penalty)


@dataclass(frozen=True)
class Search:
    """What both searches need beside their beams; ``steps`` holds one row, the prompt."""

    steps: Steps
    processors: LogitsProcessorList
    stop: Stop
    interruption: Interruption

    def log_probabilities(self) -> torch.Tensor:
        """float32 (rows, vocabulary) of the next token, the processors applied."""
        logits, _ = self.steps.read()
        scores: torch.Tensor = self.processors(self.steps.ids, logits.log_softmax(dim=-1))
        return scores

    def best(
        self, running: Sequence[Hypothesis], totals: torch.Tensor, many: int
    ) -> list[Hypothesis]:
        """The ``many`` best continuations by ``totals``, (beams, vocabulary), best first."""
        scores, flat = totals.flatten().topk(min(many, totals.numel()))
        vocabulary = totals.shape[1]
        return [
            self.continued(running[at // vocabulary], at % vocabulary, score)
            for at, score in zip(flat.tolist(), scores.tolist(), strict=True)
            if score > -torch.inf
        ]

    def continued(self, one: Hypothesis, token: int, score: float) -> Hypothesis:
        """``one`` with one more token."""
        ids = (*one.ids, token)
        return Hypothesis(ids, score, one.parent, self.stop.reason(ids))

    def follow(self, running: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Make the rows of ``steps`` those of ``running``, each with its new token."""
        device = self.steps.ids.device
        self.steps.select(torch.tensor([one.parent for one in running], device=device))
        self.steps.append(torch.tensor([one.ids[-1] for one in running], device=device))
        return [Hypothesis(one.ids, one.score, row) for row, one in enumerate(running)]

    @property
    def candidates_each(self) -> int:
        """Candidates for each beam, so that enough go on when all that can end do."""
        return 1 + max(len(self.stop.eos_token_ids), 1)


def group_beam_search(
    search: Search,
    *,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    length_penalty: float,
    early_stopping: bool | str,
) -> list[Ended]:
    """Diverse beam search; the answers of all groups, the best first.

    Vijayakumar et al. 2016, arXiv 1610.02424, algorithm 1 with Hamming diversity: group after group
    takes its step, and each token that earlier groups took in this step costs
    ``diversity_penalty`` times how often. The penalty stays in the score of the text, as in
    fairseq and transformers 4.
    """
    width = num_beams // num_beam_groups
    first = Hypothesis((), 0.0, 0)
    groups = [
        Beam(width, length_penalty, early_stopping, search.stop.max_new_tokens, [first])
        for _ in range(num_beam_groups)
    ]
    while open_groups := [group for group in groups if not group.done]:
        if search.interruption.happened:
            for group in open_groups:
                group.interrupt()
            break
        scores = search.log_probabilities()
        taken = torch.zeros_like(scores[0])
        for group in open_groups:
            rows = [one.parent for one in group.running]
            running = torch.tensor([[one.score] for one in group.running], device=scores.device)
            totals = scores[rows] - diversity_penalty * taken + running
            many = search.candidates_each * width
            for one in group.advance(search.best(group.running, totals, many)):
                taken[one.ids[-1]] += 1
        going_on = [group for group in groups if not group.done]
        if going_on:
            followed = iter(search.follow([one for group in going_on for one in group.running]))
            for group in going_on:
                group.running = [next(followed) for _ in group.running]
    whole = (one for group in groups for one in group.ended)
    return sorted(whole, key=lambda e: (e.reason == "interrupted", -e.score))


def constrained_beam_search(
    search: Search,
    constraints: Constraints,
    *,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> list[Ended]:
    """Beam search with dynamic beam allocation; answers with everything in them, the best first,
    and behind them what Ctrl-C cut short. None at all if nothing can contain everything in time.

    Post and Vilar 2018, arXiv 1804.06609: candidates are the best continuations over all beams, and
    of each beam its best one and those that go on with a constraint. They are dealt into banks by
    how much of the constraints they contain, and the beams are filled from all banks in turn, the
    fullest first. An answer may not end before it contains everything.
    """
    beam = Beam(
        num_beams,
        length_penalty,
        early_stopping,
        search.stop.max_new_tokens,
        [Hypothesis((), 0.0, 0)],
    )
    eos = torch.tensor(sorted(search.stop.eos_token_ids), dtype=torch.long)
    while not beam.done:
        if search.interruption.happened:
            beam.interrupt()
            break
        totals = search.log_probabilities()
        for row, one in enumerate(beam.running):
            if not constraints.met(one.ids):
                totals[row, eos.to(totals.device)] = -torch.inf
            totals[row] += one.score
        candidates = _dealt(_candidates(search, beam, constraints, totals), constraints)
        beam.advance([one for one in candidates if one.reason is None or constraints.met(one.ids)])
        if not beam.done:
            beam.running = search.follow(beam.running)
    return beam.ended


def _candidates(
    search: Search, beam: Beam, constraints: Constraints, totals: torch.Tensor
) -> list[Hypothesis]:
    best = search.best(beam.running, totals, search.candidates_each * beam.width)
    found = {one.ids: one for one in best}
    wanted = [
        (row, token)
        for row, (one, best_token) in enumerate(
            zip(beam.running, totals.argmax(dim=-1).tolist(), strict=True)
        )
        for token in {best_token, *constraints.next_tokens(one.ids)}
    ]
    rows, tokens = zip(*wanted, strict=True)
    for (row, token), score in zip(wanted, totals[rows, tokens].tolist(), strict=True):
        one = beam.running[row]
        if (*one.ids, token) not in found and score > -torch.inf:
            found[(*one.ids, token)] = search.continued(one, token, score)
    return list(found.values())


def _dealt(candidates: Sequence[Hypothesis], constraints: Constraints) -> list[Hypothesis]:
    """In the order in which beams are filled: the best of each bank, then the second best…"""
    banks: dict[int, list[Hypothesis]] = {}
    for one in sorted(candidates, key=lambda c: -c.score):
        banks.setdefault(constraints.progress(one.ids), []).append(one)
    placed = [
        (place, -progress, one)
        for progress, bank in banks.items()
        for place, one in enumerate(bank)
    ]
    return [one for _, _, one in sorted(placed, key=lambda p: p[:2])]
