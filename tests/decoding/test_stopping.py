"""Why an answer ends, and what Ctrl-C leaves of it."""

import os
import signal
import threading

import pytest
import torch

from recipe.decoding.beams import Search, constrained_beam_search, group_beam_search
from recipe.decoding.constraints import Constraints
from recipe.decoding.contrastive import contrastive_search
from recipe.decoding.sampling import argmax, decode_rows
from recipe.decoding.stopping import Interruption
from tests.decoding.toys import EOS, parts, stop, toy


@pytest.mark.parametrize(
    ("ids", "strings", "reason", "text"),
    [
        ([1, 2, EOS], [], "eos", "bc"),
        ([1, 2, 3, 4, 1], [], "length", "bcdeb"),
        ([1, 2, 3], [], None, "bcd"),
        ([1, 2, 3], ["cd"], "stop", "b"),
        ([1, 2, 3], ["d", "cd"], "stop", "b"),
        ([1, 2, 3], ["bcde"], None, "bcd"),
        ([EOS], ["b"], "eos", ""),
    ],
)
def test_reason_and_text(ids, strings, reason, text):
    ending = stop(5, strings)
    assert ending.reason(ids) == reason
    assert ending.text(ids) == text
    assert ending.ended(ids) == (ids, reason or "interrupted")
    if reason:  # whatever stands behind the end is none of it
        assert ending.ended([*ids, EOS, 3]) == (ids, reason)


def test_nothing_at_all_was_interrupted():
    assert stop(5).ended([]) == ([], "interrupted")


def test_the_first_ctrl_c_is_noted_and_the_second_is_pythons():
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)

    def press_twice():
        with interruption.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.happened
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is before
    assert interruption(torch.zeros(3, 2), None).tolist() == [True] * 3


def test_outside_the_main_thread_it_listens_to_nothing():
    def listen():
        with Interruption().listening() as interruption:
            kept.append(interruption.happened)

    kept: list[bool] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert kept == [False]


class After(Interruption):
    """Ctrl-C after so many looks."""

    def __init__(self, looks):
        self._looks = looks

    @property
    def happened(self):
        self._looks -= 1
        return self._looks < 0


def test_each_search_keeps_what_there_is():
    model = toy(vocabulary=12, seed=1, spread=0.05)
    steps, processors, ending, _ = parts(model, [1, 2], 50)
    ((ids, reason),) = decode_rows(steps, processors, ending, After(4), choose=argmax)
    assert (len(ids), reason) == (4, "interrupted")
    steps, processors, ending, _ = parts(model, [1, 2], 50, hidden_states=True)
    with torch.no_grad():
        ids, reason = contrastive_search(
            steps, processors, ending, After(4), top_k=2, penalty_alpha=0.1
        )
    assert reason == "interrupted"
    assert 0 < len(ids) < 50
    shared = {"num_beams": 2, "length_penalty": 1.0, "early_stopping": False}
    with torch.no_grad():
        steps, processors, ending, _ = parts(model, [1, 2], 50)
        first, *_ = group_beam_search(
            Search(steps, processors, ending, After(4)),
            num_beam_groups=2,
            diversity_penalty=0.1,
            **shared,
        )
        steps, processors, ending, _ = parts(model, [1, 2], 50)
        second, *_ = constrained_beam_search(
            Search(steps, processors, ending, After(4)), Constraints([[(3, 3, 3, 3, 3)]]), **shared
        )
    for one in (first, second):
        assert one.reason == "interrupted"
        assert len(one.ids) == 4


SHARED = {"num_beams": 3, "length_penalty": 1.0, "early_stopping": "never"}


@pytest.mark.parametrize("seed", range(30))
def test_what_was_whole_stays_in_front_of_what_was_cut(seed):
    model = toy(vocabulary=6, seed=seed, spread=0.2)
    constraints = Constraints([[(2,)]])
    for looks in range(5):
        with torch.no_grad():
            found = constrained_beam_search(
                Search(*parts(model, [1, 2], 12)[:3], After(looks)), constraints, **SHARED
            )
        cut = [one.reason == "interrupted" for one in found]
        assert found
        assert cut == sorted(cut)
        assert all(constraints.met(one.ids) for one in found if one.reason != "interrupted")


def test_even_before_the_first_token_there_is_an_answer():
    model = toy(vocabulary=6)
    with torch.no_grad():
        search = Search(*parts(model, [1, 2], 12)[:3], After(0))
        for found in (
            constrained_beam_search(search, Constraints([[(2,)]]), **SHARED),
            group_beam_search(search, num_beam_groups=3, diversity_penalty=0.1, **SHARED),
        ):
            assert (found[0].ids, found[0].reason) == ([], "interrupted")
