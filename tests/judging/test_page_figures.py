"""The figures of a page, as a table and as curves: each number at its place."""

import re
from itertools import pairwise

import pytest

from recipe.judging.page import page
from tests.judging.page_tree import Tree
from tests.judging.reports import report


def test_figures_stand_beside_each_other():
    only = report(parts={"unseen": report()["parts"]["unseen"]}, epochs=[], loss=[])
    cells = Tree(page(only)).cells
    assert cells[:6] == [
        "Figure", "Base", "Tuned", "Tuned minus base", "From zero",
        "Held-out rows 90 rows, 1,080 tokens",
    ]  # fmt: skip
    rows = {cells[at]: cells[at + 1 : at + 4] for at in range(6, 6 + 9 * 5, 5)}
    minus = "\N{MINUS SIGN}"
    assert rows == {
        "Perplexity": [
            "18.4016.56 to 20.24",
            "6.255.62 to 6.88",
            f"{minus}1.081 nats a token{minus}1.200 to {minus}0.960, p < 0.001",
        ],
        "ROUGE-L": [
            "0.2500.150 to 0.350",
            "0.6250.525 to 0.725",
            f"+0.375{minus}0.010 to +0.760, p = 0.052",
        ],
        "ROUGE-1": ["0.2500.150 to 0.350", "0.6250.525 to 0.725", "+0.375"],
        "ROUGE-2": ["0.1250.025 to 0.225", "0.3120.212 to 0.412", "+0.188"],
        "Exact answers": ["12.5%5.0% to 20.0%"] * 2 + ["+0.0 points"],
        "Near copies": ["50.0%40.0% to 60.0%"] * 2 + ["+0.0 points"],
        "Ended by itself": ["100.0%100.0% to 100.0%"] * 2 + ["+0.0 points"],
        "Tokens an answer": ["11.259.00 to 13.00"] * 2 + ["+0.00"],
        "Repetition": ["–", "–", "–"],
    }
    assert f"<strong>{minus}1.081 nats a token</strong>" in page(only)
    assert "<strong>+0.375</strong>" not in page(only), "its p is 0.052"


def test_base_is_left_of_tuned_where_its_figure_is_lower():
    """The marks of an interval stand where the values are on a line from zero."""
    made = page(report(parts={"unseen": report()["parts"]["unseen"]}))
    charts = re.findall(r'<svg viewBox="0 0 136 28".*?</svg>', made, re.DOTALL)
    assert len(charts) == 9
    base, tuned = (float(x) for x in re.findall(r'cx="([\d.]+)"', charts[1]))
    assert (base - 5) / (tuned - 5) == pytest.approx(0.25 / 0.625, rel=0.02)
    assert "circle" not in charts[-1]


def test_an_unseen_part_that_was_never_measured_has_no_line_and_a_dash():
    epochs = [one | {"unseen": None} for one in report()["epochs"]]
    made = page(report(epochs=epochs))
    assert 'class="line seen"' in made
    assert 'class="line unseen"' not in made
    row = re.search(r"checkpoint-39</td>(.*?)</tr>", made).group(1)
    assert re.findall(r"<td>(.*?)</td>", row) == ["39", "6.00", "–", "22.40"]


def points_of(made, class_):
    (points,) = re.findall(f'<polyline points="([^"]*)" class="line {class_}"', made)
    return [tuple(map(float, point.split(","))) for point in points.split()]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_a_loss_is_a_point_at_its_place(count):
    losses = [
        {"step": step, "epoch": step / 100, "loss": 1 + (step * 7919 % 13) / 4}
        for step in range(1, count + 1)
    ]
    points = points_of(page(report(loss=losses)), "steps")
    assert len(points) == count
    assert all(0 <= x <= 480 and 0 <= y <= 290 for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    if count > 2:  # a straight line maps loss to height, upside down
        slope, at = two_point_line([one["loss"] for one in losses], [y for _, y in points])
        assert slope < 0
        for one, (_, y) in zip(losses, points, strict=True):
            assert y == pytest.approx(at + slope * one["loss"], abs=0.2)


def two_point_line(values, heights):
    low, high = values.index(min(values)), values.index(max(values))
    slope = (heights[high] - heights[low]) / (values[high] - values[low])
    return slope, heights[low] - slope * values[low]


def test_perplexities_are_points_and_the_turn_is_marked():
    made = page(report())
    for part in ("seen", "unseen", "neutral"):
        assert len(points_of(made, part)) == 3
    seen, unseen = points_of(made, "seen"), points_of(made, "unseen")
    assert [x for x, _ in seen] == [x for x, _ in unseen]
    assert seen[2][1] > unseen[2][1], "a lower perplexity stands lower"
    (x,) = set(re.findall(r'<line x1="([\d.]+)" x2="[\d.]+" [^>]*class="turn"', made))
    assert float(x) == seen[1][0]
    assert "1 (memorises after epoch 1)" in Tree(made).cells
    assert 'class="turn"' not in page(report(turned=None))


def test_a_wide_range_is_drawn_by_its_logarithm():
    epochs = [
        {"epoch": at, "step": at, "name": "x", "seen": 10.0 ** (at + 1), "unseen": None,
         "neutral": 10.0}
        for at in range(4)
    ]  # fmt: skip
    made = page(report(epochs=epochs, turned=None))
    heights = [y for _, y in points_of(made, "seen")]
    steps = [before - after for before, after in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert "perplexity (logarithmic)" in made
