"""Group and constrained beam search: enumeration, list-based references, transformers."""

import pytest
import torch
from transformers import GenerationConfig

from recipe.decoding.beams import Search, constrained_beam_search, group_beam_search
from recipe.decoding.constraints import Constraints
from tests.decoding.toys import EOS, best_answer, contains, log_probabilities, parts, toy

PROMPT = [1, 3, 2]
SHARED = {"length_penalty": 1.0, "early_stopping": False}


def grouped(model, length, **named):
    with torch.no_grad():
        return group_beam_search(
            Search(*parts(model, PROMPT, length)), **{**SHARED, "diversity_penalty": 0.0, **named}
        )


def constrained(model, length, phrases, **named):
    with torch.no_grad():
        constraints = Constraints([[tuple(p) for p in one] for one in phrases])
        return constrained_beam_search(
            Search(*parts(model, PROMPT, length)), constraints, **{**SHARED, **named}
        )


def library(model, length, **named):
    """transformers' own beam search: the answers, cut behind their end, and their scores."""
    config = GenerationConfig(
        max_new_tokens=length,
        eos_token_id=EOS,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        num_return_sequences=named["num_beams"],
        **named,
    )
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    answers = out.sequences[:, len(PROMPT) :].tolist()
    cut = [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]
    return cut, out.sequences_scores.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_of_exhaustive_width_find_the_best_answer(seed, length_penalty):
    model = toy(seed=seed)
    score, answer = best_answer(model, PROMPT, 4, length_penalty=length_penalty)
    named = {"length_penalty": length_penalty, "early_stopping": "never"}
    found = grouped(model, 4, num_beams=400, num_beam_groups=1, **named)
    assert found[0].ids == answer
    assert found[0].score == pytest.approx(score, abs=1e-5)
    theirs, _ = library(model, 4, num_beams=400, **named)
    assert theirs[0] == answer


CONSTRAINTS = {
    "a token": [[[2]]],
    "a phrase": [[[3, 1]]],
    "two tokens": [[[2]], [[4]]],
    "one of two": [[[2, 2], [4]]],
    "a phrase that begins again within itself": [[[1, 1, 2]]],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrained_beams_of_exhaustive_width_find_the_best_answer_that_has_all(seed, name):
    model, phrases = toy(seed=seed), CONSTRAINTS[name]

    def has_all(answer):
        return all(any(contains(answer, p) for p in one) for one in phrases)

    score, answer = best_answer(model, PROMPT, 4, allowed=has_all)
    found = constrained(model, 4, phrases, num_beams=400, early_stopping="never")
    assert found[0].ids == answer
    assert found[0].score == pytest.approx(score, abs=1e-5)
    assert all(has_all(one.ids) for one in found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"length_penalty": 0.3},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 2.0},
    ],
)
def test_one_group_and_no_constraint_are_the_librarys_beam_search(seed, width, named):
    model = toy(vocabulary=12, seed=seed, spread=0.3)
    answers, scores = library(model, 9, num_beams=width, **named)
    for found in (
        grouped(model, 9, num_beams=width, num_beam_groups=1, **named),
        constrained(model, 9, [], num_beams=width, **named),
    ):
        assert [one.ids for one in found] == answers[: len(found)]
        assert [one.score for one in found] == pytest.approx(scores[: len(found)], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy_search(seed):
    model = toy(vocabulary=12, seed=seed, spread=0.3)
    text = list(PROMPT)
    while len(text) < len(PROMPT) + 9 and (len(text) == len(PROMPT) or text[-1] != EOS):
        text.append(int(log_probabilities(model, text).argmax()))
    for found in (
        grouped(model, 9, num_beams=1, num_beam_groups=1),
        constrained(model, 9, [], num_beams=1),
    ):
        assert [one.ids for one in found] == [text[len(PROMPT) :]]


def reference_groups(model, length, *, num_beams, num_beam_groups, diversity_penalty):
    """Algorithm 1 of Vijayakumar et al., on lists; nothing ends before ``length``."""
    width = num_beams // num_beam_groups
    groups = [[([], 0.0)] for _ in range(num_beam_groups)]
    for _ in range(length):
        taken = []
        for number, group in enumerate(groups):
            extended = []
            for answer, score in group:
                scores = log_probabilities(model, [*PROMPT, *answer])
                for token in range(1, model.config.vocab_size):
                    penalty = diversity_penalty * taken.count(token)
                    extended.append(([*answer, token], score + float(scores[token]) - penalty))
            groups[number] = sorted(extended, key=lambda e: -e[1])[:width]
            taken += [answer[-1] for answer, _ in groups[number]]
    whole = [(score / length, answer) for group in groups for answer, score in group]
    return sorted(whole, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("num_beams", "num_beam_groups", "diversity_penalty"),
    [(2, 2, 0.5), (4, 2, 1.0), (6, 3, 0.3), (4, 4, 5.0), (4, 2, 0.0)],
)
def test_groups_are_those_of_the_paper(seed, num_beams, num_beam_groups, diversity_penalty):
    model = toy(vocabulary=9, seed=seed, spread=0.4)
    named = {
        "num_beams": num_beams,
        "num_beam_groups": num_beam_groups,
        "diversity_penalty": diversity_penalty,
    }
    suppressed = WithoutEos(model)  # so that the reference needs no rule for the end
    expected = reference_groups(suppressed, 5, **named)
    found = grouped(suppressed, 5, **named)
    assert [one.ids for one in found] == [answer for _, answer in expected]
    assert [one.score for one in found] == pytest.approx([s for s, _ in expected], abs=1e-5)


class WithoutEos(torch.nn.Module):
    """The model with an EOS that never comes."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, *arguments, **named):
        output = self.inner(*arguments, **named)
        output.logits[..., EOS] = -1e9
        return output


@pytest.mark.parametrize("seed", range(3))
def test_groups_differ_and_the_penalty_keeps_them_apart(seed):
    model = toy(vocabulary=9, seed=seed)
    named = {"num_beams": 4, "num_beam_groups": 4}
    same = grouped(model, 6, **named, diversity_penalty=0.0)
    assert len({tuple(one.ids) for one in same}) == 1
    apart = grouped(model, 6, **named, diversity_penalty=100.0)
    assert len({one.ids[0] for one in apart}) == 4


def reference_constrained(model, length, phrases, *, num_beams):
    """Dynamic beam allocation of Post and Vilar, on lists, all beams looked at in full.

    Banks are filled in turn, the fullest first; the EOS is allowed when nothing is missing.
    """
    needs = [[tuple(p) for p in one] for one in phrases]

    def state(answer):
        missing, has = [], 0
        for one in needs:
            if any(contains(answer, p) for p in one):
                has += max(map(len, one))
            else:
                begun = {
                    p: max(n for n in range(len(p)) if n == 0 or answer[-n:] == list(p[:n]))
                    for p in one
                }
                has += max(begun.values())
                missing += [p[n] for p, n in begun.items()]
        return has, missing

    running, ended = [([], 0.0)], []
    while running:
        candidates = {}
        everything = []
        for answer, score in running:
            scores = log_probabilities(model, [*PROMPT, *answer]).tolist()
            missing = state(answer)[1]
            own = [
                ([*answer, token], score + scores[token])
                for token in range(len(scores))
                if token != EOS or not missing
            ]
            everything += own
            wanted = [max(own, key=lambda e: e[1])] + [e for e in own if e[0][-1] in missing]
            candidates |= {tuple(a): s for a, s in wanted}
        everything.sort(key=lambda e: -e[1])
        candidates |= {tuple(a): s for a, s in everything[: 2 * num_beams]}
        banks = {}
        for answer, score in sorted(candidates.items(), key=lambda c: -c[1]):
            banks.setdefault(state(list(answer))[0], []).append((list(answer), score))
        dealt = []
        for place in range(max(map(len, banks.values()))):
            for bank in sorted(banks, reverse=True):
                dealt += banks[bank][place : place + 1]
        done = [a[-1] == EOS or len(a) == length for a, _ in dealt]
        dealt = [(e, d) for e, d in zip(dealt, done, strict=True) if not d or not state(e[0])[1]]
        ended += [(s / len(a), a) for (a, s), d in dealt[:num_beams] if d]
        ended = sorted(ended, key=lambda e: -e[0])[:num_beams]
        running = [e for e, d in dealt if not d][:num_beams]
        if len(ended) == num_beams and running:
            best = max(s for _, s in running) / len(running[0][0])
            if best <= ended[-1][0]:
                break
    return ended


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrained_beams_are_those_of_the_paper(seed, width, name):
    model = toy(vocabulary=8, seed=seed, spread=0.4)
    expected = reference_constrained(model, 7, CONSTRAINTS[name], num_beams=width)
    found = constrained(model, 7, CONSTRAINTS[name], num_beams=width)
    assert [one.ids for one in found] == [answer for _, answer in expected]
    assert [one.score for one in found] == pytest.approx([s for s, _ in expected], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_even_one_beam_gets_everything_in_when_there_is_just_room(seed):
    phrases = [[[2, 3]], [[4]], [[1, 1]]]
    (found,) = constrained(toy(seed=seed), 5, phrases, num_beams=1)
    assert all(contains(found.ids, p) for (p,) in phrases)


def test_no_answer_comes_without_everything():
    assert constrained(toy(), 2, [[[2, 3, 4]]], num_beams=2) == []
