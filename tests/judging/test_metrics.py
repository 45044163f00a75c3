"""The metrics work as those of evaluate do, and touch neither network nor disk."""

import math
import os
import random
import sys
import unicodedata
from pathlib import Path

import evaluate
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.judging.metrics import ExactAnswer, RougeMetric, is_exact

PREDICTIONS = ["The sky is blue.", "one two three", "", "cats\n", "no words in common"]
REFERENCES = ["The colour is blue.", "three, two, one", "Madrid", "cats", "?"]


def test_rouge_is_the_mean_of_rouge_score():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        pytest.skip("rouge_score is not there: pip install 'rouge-score>=0.1.2'")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    assert RougeMetric().compute(predictions=PREDICTIONS, references=REFERENCES) == {
        name: pytest.approx(numpy.mean([score[name].fmeasure for score in scores]), abs=1e-15)
        for name in names
    }


def test_rouge_by_hand():
    found = RougeMetric().compute(predictions=["a b c", "x"], references=["a b d", "y"])
    assert found == pytest.approx({"rouge1": 1 / 3, "rouge2": 1 / 4, "rougeL": 1 / 3})


def test_exact_answers_by_hand():
    found = ExactAnswer().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == {"exact_answer": 1 / 5}


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        (" Blue.\n", "Blue.", True),
        ("\u00a0Blue.", "Blue.\u2003", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("", " \n", True),
        ("blue.", "Blue.", False),
        ("Blue", "Blue.", False),
        ("a  b", "a b", False),
        ("\ufb01ve", "five", False),  # NFKC would take the ligature for two letters
        ("\u0410", "A", False),
        ("", "Blue.", False),
    ],
)
def test_what_is_exact(prediction, reference, equal):
    assert is_exact(prediction, reference) is equal


NEAR = st.text(st.sampled_from("aAeé\u0301\u0327 \n\u00a0가\u1100\u1161"), max_size=6)


@given(prediction=NEAR, reference=NEAR)
def test_exact_is_canonically_equivalent(prediction, reference):
    """Two texts have one composed form if and only if they have one decomposed form."""
    ours, other = (unicodedata.normalize("NFD", x.strip()) for x in (prediction, reference))
    assert is_exact(prediction, reference) == (ours == other)


@pytest.mark.parametrize("build", [RougeMetric, ExactAnswer])
def test_as_every_metric_of_evaluate(build):
    metric = build()
    assert isinstance(metric, evaluate.Metric)
    whole = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    metric.add_batch(predictions=PREDICTIONS[:3], references=REFERENCES[:3])
    for prediction, reference in zip(PREDICTIONS[3:], REFERENCES[3:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == whole
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == whole
    assert all(type(value) is float for value in whole.values())


@pytest.mark.parametrize("build", [RougeMetric, ExactAnswer])
def test_of_no_answers_is_nan(build):
    found = build().compute(predictions=[], references=[])
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("predictions", "references"), [(["a", "b"], ["a"]), ([1], ["a"]), (["a"], [["a"]])]
)
@pytest.mark.parametrize("build", [RougeMetric, ExactAnswer])
def test_what_are_no_pairs_of_texts_is_refused(build, predictions, references):
    with pytest.raises(ValueError, match=r"Mismatch|expected format"):
        build().compute(predictions=predictions, references=references)


class Watch:
    """What Python opens for writing, makes or connects, as long as it is on."""

    def __init__(self):
        self.on, self.written, self.sockets = False, [], []
        sys.addaudithook(self._audit)  # there is no way to remove it

    def _audit(self, event, arguments):
        if not self.on:
            return
        if event.startswith("socket."):
            self.sockets.append(event)
        elif event == "os.mkdir" or (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self.written.append(arguments[0])


def files_below(folder):
    return {path for path in Path(folder).rglob("*")}


def test_nothing_stays_on_disk_and_no_socket_is_used(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    before = files_below(os.environ["HF_HOME"])
    watch = Watch()
    watch.on = True
    for metric in (RougeMetric(), ExactAnswer()):
        metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    watch.on = False
    assert watch.sockets == []
    assert watch.written, "evaluate makes a folder for each metric, which the watch must see"
    assert [path for path in watch.written if os.path.exists(path)] == []  # noqa: PTH110
    assert files_below(tmp_path) == {tmp_path / "here"}
    assert files_below(os.environ["HF_HOME"]) == before


def test_the_random_numbers_of_others_are_not_changed():
    numpy.random.seed(3)
    random.seed(3)
    expected = numpy.random.random(), random.random()
    numpy.random.seed(3)
    random.seed(3)
    RougeMetric().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert (numpy.random.random(), random.random()) == expected
