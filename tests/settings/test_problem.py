"""The report that a command prints."""

import pickle

from recipe.settings import Problem, UserError


def test_one_line_a_problem() -> None:
    error = UserError([Problem("a.yaml:1", "wrong."), Problem("b", "worse.")])
    assert str(error) == "a.yaml:1: wrong.\nb: worse."
    assert error.problems == (Problem("a.yaml:1", "wrong."), Problem("b", "worse."))


def test_single_and_pickled() -> None:
    error = UserError.single("a", "b.")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == ("a: b.", error.problems)
