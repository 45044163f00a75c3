"""The rest of a run as it is foretold, on a clock that tests wind."""

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest

from recipe import keeping
from recipe.finetune import finetune
from recipe.settings import load_settings
from recipe.training import pace as pace_module
from recipe.training.pace import Pace
from recipe.training.trainer import TokenWeightedTrainer
from tests.training.test_resume import StopAt

SECONDS = 0.5  # a token
FIRST = 300  # seconds that the first step takes longer
EVALUATION = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


@pytest.fixture
def run(write_config, monkeypatch, clock):
    """A run of 45 steps, 5 an epoch; and how many tokens each step really had."""
    tokens: dict[int, int] = {}

    def step(self, model, inputs, *rest):
        now, many = self.state.global_step, sum(inputs["row_lengths"]) + sum(inputs["openings"])
        clock.now += SECONDS * many + (0 if tokens else FIRST)
        tokens[now + 1] = tokens.get(now + 1, 0) + many
        return training_step(self, model, inputs, *rest)

    def evaluate(self, *args, **named):
        clock.now += EVALUATION
        return evaluation_loop(self, *args, **named)

    training_step = TokenWeightedTrainer.training_step
    evaluation_loop = TokenWeightedTrainer.evaluation_loop
    monkeypatch.setattr(TokenWeightedTrainer, "training_step", step)
    monkeypatch.setattr(TokenWeightedTrainer, "evaluation_loop", evaluate)
    monkeypatch.setattr(keeping, "_plot", lambda *_: None)
    config = write_config(
        data={"rows": "0:9", "held_out": "9:12"},
        training={
            "num_train_epochs": 9,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "epoch",
        },
    )

    def made(*overrides: str, watchers=()):
        tokens.clear()
        settings = load_settings(str(config), list(overrides))
        folder = finetune(settings, watchers=list(watchers))
        return json.loads((folder / "manifest.json").read_text()).get("time"), dict(tokens)

    return made


def test_what_is_foretold_is_what_it_takes(run, capsys):
    """Evaluations, at the end of each epoch, and the first step's delay are in none of it."""
    found, tokens = run()
    assert set(tokens) == set(range(1, 46))
    seconds = SECONDS * sum(tokens[step] for step in range(22, 46))
    assert found == {"forecast": pytest.approx(seconds), "measured": pytest.approx(seconds)}
    probed = SECONDS * sum(tokens[step] for step in range(2, 22)) / 20
    told = capsys.readouterr().out
    told_as = pace_module._in_words(seconds)
    assert f"{probed:.2f} s a step over 20 steps: about {told_as} for the 24 that are left" in told
    assert f"\ntime      forecast {told_as} after 20 steps, measured {told_as} (+0.0%)\n" in told
    # Steps of the same number of tokens, and the mean would do as well.
    assert len(set(tokens.values())) > 5


def test_a_resumed_run_counts_from_where_it_begins(run, tmp_path, capsys):
    saved = ["training.save_strategy=steps", "training.save_steps=3"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(*saved, watchers=[StopAt(3)])
    assert "\npace " not in capsys.readouterr().out
    found, tokens = run(*saved, f"training.resume_from_checkpoint={tmp_path / 'run'}")
    assert set(tokens) == set(range(4, 46))
    seconds = SECONDS * sum(tokens[step] for step in range(25, 46))
    assert found == {"forecast": pytest.approx(seconds), "measured": pytest.approx(seconds)}
    assert "for the 21 that are left" in capsys.readouterr().out


def test_a_short_run_is_told_nothing_of(run, capsys):
    found, _ = run("training.max_steps=4")
    assert found is None
    assert not re.search(r"^(pace|time) ", capsys.readouterr().out, re.MULTILINE)


class Loader:
    """One row a micro-batch, in the order of its data."""

    def __init__(self, lengths: list[int]) -> None:
        self.dataset = [SimpleNamespace(needed=length) for length in lengths]
        self.batch_sampler = [[place] for place in range(len(lengths))]

    def set_epoch(self, epoch: int) -> None:
        pass


def paced(clock, lengths, seconds_of, *, steps: int, begin: int = 0):
    """``Pace`` through so many steps of one row each; what it said, and itself."""
    said: list[str] = []
    pace = Pace(said.append)
    args = SimpleNamespace(gradient_accumulation_steps=1)
    state = SimpleNamespace(global_step=begin, max_steps=steps)
    pace.on_train_begin(args, state, None, train_dataloader=Loader(lengths))
    for step in range(begin, steps):
        pace.on_step_begin(args, state, None)
        clock.now += seconds_of(step, lengths[step % len(lengths)])
        state.global_step += 1
        pace.on_step_end(args, state, None)
        clock.now += 77
    return pace, said


def by_tokens(step: int, tokens: int) -> float:
    return SECONDS * tokens


@pytest.mark.parametrize(
    ("steps", "begin", "told"), [(40, 0, 0), (41, 0, 1), (60, 19, 1), (60, 20, 0), (100, 0, 1)]
)
def test_it_is_told_where_twenty_steps_are_left_behind_twenty(clock, steps, begin, told):
    pace, said = paced(clock, [3, 5, 8], by_tokens, steps=steps, begin=begin)
    assert len(said) == told
    assert (pace.account() is None) == (not told)
    assert len(pace.lines()) == told


def test_a_run_that_becomes_slower_is_told_by_how_much(clock):
    lengths = [7, 11, 13, 17]
    pace, _ = paced(
        clock, lengths, lambda step, n: SECONDS * n * (1.5 if step >= 21 else 1), steps=61
    )
    left = SECONDS * sum(lengths[step % 4] for step in range(21, 61))
    assert pace.account() == {
        "forecast": pytest.approx(left),
        "measured": pytest.approx(1.5 * left),
    }
    assert pace.lines()[0].endswith("(+50.0%)")


def test_time_that_is_not_the_tokens_is_no_more_than_that(clock):
    """A step that takes a second and no token more is foretold as if tokens took it."""
    lengths = [10] * 30 + [20] * 30
    pace, _ = paced(clock, lengths, lambda step, n: 1.0, steps=60)
    assert pace.account() == {"forecast": pytest.approx(9 + 2 * 30), "measured": 39}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (119.4, "119 s"),
        (599, "599 s"),
        (601, "10 min"),
        (7190, "120 min"),
        (7201, "2.0 h"),
        (9e4, "25.0 h"),
    ],
)
def test_a_time_is_told_in_its_own_unit(seconds, words):
    assert pace_module._in_words(seconds) == words


def test_longer_is_told_as_longer():
    told = [pace_module._in_words(seconds) for seconds in range(0, 20000, 60)]
    scale = {"s": 1, "min": 60, "h": 3600}
    back = [float(one.split()[0]) * scale[one.split()[1]] for one in told]
    assert all(before <= after for before, after in pairwise(back))
