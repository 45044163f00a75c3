"""What is said of a spectrum: words, table, JSON and picture."""

import json
import math
import warnings

import pytest
from matplotlib import pyplot
from peft import LoraConfig, get_peft_model

from recipe.sharing.inspection import inspect_adapter
from recipe.sharing.inspection_report import as_json, in_words, percent_text, plot, table
from tests.sharing.spectra import PLAIN, adapted, chosen, load, trained


def test_words_advise_by_the_evidence(tiny_checkpoint):
    falling, flat = [1.0, 0.1, 0.01, 0, 0, 0, 0, 0], [1.0] * 8
    small, tail = [1.0, 0.3, 0.01], [1.0, *[0.12] * 7]
    for spectra, said, average in [
        ([falling, small], "lowered from 8 to 2 and at least 99 %", "1.5"),
        ([flat, flat], "In 2 of 2 modules 99 % of the energy takes all of r: the singular", "8.0"),
        ([flat, small], "In the others rank 2 keeps 99 % (lora.rank_pattern)", "5.0"),
        ([tail, tail], "the last directions are small but count (effective rank 4.8", "5.0"),
        ([[1.0], [2.0]], "r is 1, the lowest there is.", "1.0"),
    ]:
        changes = inspect_adapter(chosen(tiny_checkpoint, spectra))
        needs = [change.rank_for[95] for change in changes]
        words = in_words(changes)
        text = " ".join(words)
        assert 2 <= len(words) <= 4
        assert said in text
        assert f"Rank {max(needs)} keeps at least 95 %" in text or said.startswith("r is 1")
        assert f"rank {average} on average" in text
        assert ("lowered" in text) == (spectra == [falling, small])


def test_words_name_the_place_and_size_of_the_largest_change(tiny_checkpoint):
    model = chosen(tiny_checkpoint, [[1.0, 1], [3.0, 4]])
    weight = load(tiny_checkpoint).model.layers[1].self_attn.q_proj.weight.detach().double()
    text = in_words(inspect_adapter(model))[0]
    assert "largest in q_proj of layer 1" in text
    assert f"is {500 / float(weight.norm()):.0f} % of the size" in text
    lora = {"use_dora": True, "modules_to_save": ["lm_head"]}
    remarks = in_words(inspect_adapter(adapted(tiny_checkpoint, **lora)))[-1]
    assert "With DoRA" in remarks
    assert "lm_head was trained whole" in remarks


def test_table_has_a_line_for_each_kind_and_module(tiny_checkpoint):
    model = chosen(tiny_checkpoint, [[1.0] * 4, [4.0, 2, 1, 1]])
    changes = inspect_adapter(model)
    lines = table(changes)
    ratios = [change.ratio for change in changes]
    mean, top = percent_text(sum(ratios) / 2), percent_text(max(ratios))
    effective = f"{(4 + 2**1.75) / 2:.1f}"
    expected = ["q_proj", "2", "4", *mean.split(), *top.split(), "1", effective, "4", "4", "4"]
    assert lines[1].split() == expected
    assert len(lines[0]) == len(lines[1]), "columns are aligned"
    assert "rank for 95 %" in lines[0]
    assert "||W||" in lines[2]
    by_layer = table(changes, each_layer=True)
    assert by_layer[:3] == lines
    assert [line.split()[0] for line in by_layer[5:]] == [change.name for change in changes]
    assert by_layer[6].split()[-5:] == ["4", f"{2**1.75:.1f}", "2", "3", "4"]
    assert len({len(line) for line in by_layer[4:]}) == 1


def test_table_shows_the_span_of_r_and_ranks_of_the_neediest(tiny_checkpoint):
    changes = inspect_adapter(chosen(tiny_checkpoint, [[3.0, 0.5, 0.1, 0.1], [0.0]]))
    line = table(changes)[1].split()
    assert line[-4:] == [f"{changes[0].effective_rank:.1f}", "1", "1", "2"]
    by_layer = inspect_adapter(adapted(tiny_checkpoint, rank_pattern={"layers.1.*": 2}))
    assert [line.split()[2] for line in table(by_layer)[1:3]] == ["2–4", "2–4"]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.0, "0 %"), (0.0183, "1.83 %"), (0.5, "50.0 %"), (2.4, "240 %"), (123.4, "12340 %"),
        (4.2e-6, "0.000420 %"), (4.2e-12, "4.2e-10 %"), (math.inf, "from zero"),
    ],
)  # fmt: skip
def test_percent_text(ratio, text):
    assert percent_text(ratio) == text


def test_json_holds_what_was_measured(tiny_checkpoint):
    changes = inspect_adapter(adapted(tiny_checkpoint, modules_to_save=["lm_head"]))
    content = json.loads(json.dumps(as_json(changes), allow_nan=False))
    for module, change in zip(content["modules"], changes, strict=True):
        assert (module["name"], module["r"], module["rank"]) == (
            change.name,
            change.r,
            change.rank,
        )
        assert module["ratio"] == change.ratio
        assert tuple(module["singular_values"]) == change.singular_values
        assert module["rank_for"]["95"] == change.rank_for[95]
    assert [kind["kind"] for kind in content["kinds"]] == ["q_proj", "v_proj", "lm_head"]
    ratios = [change.ratio for change in changes if change.kind == "q_proj"]
    assert content["kinds"][0]["max_ratio"] == max(ratios)
    assert content["kinds"][0]["mean_ratio"] == pytest.approx(sum(ratios) / 2)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "r": 1},
        {"target_modules": ["lm_head"]},
        None,
    ],
    ids=["everything", "one layer, one kind", "no layer", "no change"],
)
def test_picture_shows_each_kind(tiny_checkpoint, tmp_path, monkeypatch, lora):
    asked = LoraConfig(**{**PLAIN, **(lora or {})})
    model = get_peft_model(load(tiny_checkpoint), asked)
    changes = inspect_adapter(trained(model) if lora else model)
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(changes, tmp_path / "change.png", title="a title")
    monkeypatch.undo()
    (figure,) = figures
    left, right = figure.axes
    ratios = {float(value) for line in left.lines for value in line.get_ydata() if line.get_label()}
    assert ratios == {100 * change.ratio for change in changes}
    kinds = list(dict.fromkeys(change.kind for change in changes))
    legend = [text.get_text().removesuffix(" (no layer)") for text in figure.legends[0].texts]
    assert legend == kinds
    low_rank = [kind for kind in kinds if kind != "lm_head" or not asked.modules_to_save]
    curves = [line for line in right.lines if line.get_marker() != "None"]
    for kind, curve in zip(low_rank if lora else [], curves, strict=True):
        assert list(curve.get_xdata()) == list(range(1, asked.r + 1))
        share = [c.energy[0] for c in changes if c.kind == kind]
        assert curve.get_ydata()[0] == pytest.approx(100 * sum(share) / len(share))
    assert "%" in left.get_ylabel()
    assert right.get_xlabel() == "rank kept"
    pixels = pyplot.imread(tmp_path / "change.png")
    assert pixels.shape[1] > pixels.shape[0] > 400
    pyplot.close(figure)
