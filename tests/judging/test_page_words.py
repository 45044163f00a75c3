"""Words that differ, against dynamic programming and against the clock."""

import random
import time
from itertools import pairwise

from recipe.judging.page import page
from recipe.judging.page_words import LIMIT, common, differing
from tests.judging.page_tree import Tree
from tests.judging.reports import ANSWERS, answer, report


def test_words_that_differ_are_marked():
    one = ANSWERS[0] | {
        "base": answer("The sky is blue, <b>mostly</b>."),
        "tuned": answer("The sky is deep red, mostly."),
    }
    made = page(report(answers=[one]))
    assert ">The sky is <del>blue</del>, <del>&lt;b&gt;</del>mostly<del>&lt;/b&gt;</del>.<" in made
    assert ">The sky is <ins>deep red</ins>, mostly.<" in made


def test_common_words_are_as_many_as_dynamic_programming_finds():
    draw = random.Random(0)
    for _ in range(300):
        first, second = (draw.choices("abcd", k=draw.randrange(12)) for _ in range(2))
        best = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                best[i + 1][j + 1] = (
                    best[i][j] + 1 if one == other else max(best[i][j + 1], best[i + 1][j])
                )
        pairs = common(first, second)
        assert len(pairs) == best[-1][-1]
        assert all(first[i] == second[j] for i, j in pairs)
        assert all(i < k and j < m for (i, j), (k, m) in pairwise(pairs))


def test_differences_take_no_time_that_a_text_could_stretch():
    begun = time.perf_counter()
    assert differing("a " * LIMIT, "a " * LIMIT) == ([], [])
    assert differing("a b " * (LIMIT // 2), "b c a " * (LIMIT // 3)) is not None
    assert differing("a " * (LIMIT + 1), "a") is None
    assert differing("a " * 10**6, "b " * 10**6) is None
    assert time.perf_counter() - begun < 5
    one = ANSWERS[0] | {"tuned": answer("a " * (LIMIT + 1))}
    tree = Tree(page(report(answers=[one])))
    assert f"more than {LIMIT:,} words" in tree.text
    assert tree.boxes[3] == "a " * (LIMIT + 1)
