"""An arm of a study trains what it says, and what is told of it is what stock code takes."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe import study
from recipe.exit_codes import run_command
from recipe.proving.arms import measured_arm
from recipe.proving.arms_report import base_of, ladder, memory_against_speed, table
from recipe.settings import UserError, load_settings
from recipe.training.machine import check_machine

ARM = {"data": {"rows": "0:8", "held_out": "8:12"}, "training": {"num_train_epochs": 1}}
SAME = ["lora.lora_dropout=0.0", "training.lr_scheduler_type=constant"]


@pytest.fixture
def arm(write_config):
    def measured(*overrides):
        return measured_arm(load_settings(str(write_config(**ARM)), [*SAME, *overrides]))

    return measured


def test_bytes_are_those_of_the_parameters(arm, tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    base = 4 * sum(p.numel() for p in model.parameters())
    adapter = 4 * 2 * 4 * (64 + 64 + 64 + 32)  # two layers, r=4, q_proj 64 → 64, v_proj 64 → 32
    found = arm()
    assert found["parameters"] == adapter // 4
    assert found["bytes"]["gradients"] == adapter
    assert found["bytes"]["optimizer"] == 2 * adapter
    assert found["bytes"]["weights"] == pytest.approx(base + adapter, abs=256)
    full = arm("study.train=everything", "training.learning_rate=1e-4")
    assert full["parameters"] == base // 4
    assert full["bytes"]["gradients"] == base
    assert full["bytes"]["optimizer"] == 2 * base
    assert full["tokens"] == found["tokens"]


def test_everything_is_trained_as_stock_code_trains_it(arm, tiny_checkpoint, tmp_path):
    """One step of AdamW on all rows, by hand."""
    from recipe.run_data import load_data

    asked = ["study.train=everything", "training.learning_rate=1e-3", "training.optim=adamw_torch"]
    batch = ["training.per_device_train_batch_size=8", "training.max_grad_norm=0"]
    found = arm(*asked, *batch)
    data = load_data(load_settings(str(tmp_path / "tiny.yaml")))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)

    def loss(rows):
        total, count = torch.zeros(()), 0
        for row in rows:
            ids = torch.tensor(row.input_ids[None].astype("int64"))
            labels = ids.masked_fill(~torch.tensor(row.trained)[None], -100)
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + model(ids, labels=labels).loss * n, count + n
        return total / count

    with torch.no_grad():
        assert found["held_out_loss"]["before"] == pytest.approx(
            loss(data.held_out.rows).item(), rel=1e-5
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loss(data.train.rows).backward()
    optimizer.step()
    with torch.no_grad():
        assert found["held_out_loss"]["after"] == pytest.approx(
            loss(data.held_out.rows).item(), rel=1e-4
        )


def test_what_only_computes_otherwise_learns_the_same(arm):
    plain = arm()
    for overrides in (
        ["study.logits=whole"],
        ["study.checkpoint=feed_forward"],
        ["training.gradient_checkpointing=true"],
        ["data.share_openings=false"],
        ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"],
    ):
        found = arm(*overrides)
        after = found["held_out_loss"]["after"]
        assert after == pytest.approx(plain["held_out_loss"]["after"], rel=1e-5), overrides


def test_each_technique_takes_less_of_what_it_is_for(arm):
    plain = arm("data.share_openings=false", "study.logits=whole")["bytes"]
    for overrides, kind in (
        (["study.checkpoint=feed_forward"], "activations"),
        (["training.gradient_checkpointing=true"], "activations"),
        (["data.share_openings=true"], "activations"),
        (["training.per_device_train_batch_size=2"], "activations"),
        (["training.optim=adamw_bnb_8bit", "lora.r=128"], "optimizer"),
    ):
        shared = [] if any("share" in one for one in overrides) else ["data.share_openings=false"]
        found = arm("study.logits=whole", *shared, *overrides)["bytes"]
        if kind == "optimizer":  # of 32 times as many parameters; smaller ones stay float32
            assert found[kind] < 32 * plain[kind] / 3
        else:
            assert found[kind] < plain[kind], overrides
            assert found["gradients"] == plain["gradients"]
    some = arm("study.checkpoint=feed_forward", "data.share_openings=false")["bytes"]
    most = arm("training.gradient_checkpointing=true", "data.share_openings=false")["bytes"]
    assert most["activations"] < some["activations"]


def test_only_a_study_may_train_so(write_config):
    for override in (
        "study.train=everything",
        "study.logits=whole",
        "study.checkpoint=feed_forward",
    ):
        settings = load_settings(str(write_config()), [override])
        with pytest.raises(UserError, match=r"is for recipe/study\.py"):
            check_machine(settings)


def made(
    name: str, *, megabytes: int, seconds: float, overrides: tuple[str, ...] = (), loss: float = 1.5
) -> dict:
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), megabytes * 2**20)
    return {
        "name": name,
        "overrides": list(overrides),
        "bytes": {**sizes, "allocated": 5 * megabytes * 2**20},
        "tokens": 100,
        "seconds": seconds,
        "held_out_loss": {"before": 2.0, "after": loss},
    }


ARMS = {
    "full": made("full", megabytes=8, seconds=1.0, overrides=("study.train=everything",)),
    "lora": made("lora", megabytes=4, seconds=0.5),
    "lora, less": made(
        "lora, less",
        megabytes=2,
        seconds=0.75,
        overrides=("training.gradient_checkpointing=true",),
        loss=1.625,
    ),
    "+ shared": made("+ shared", megabytes=1, seconds=0.25),
}


def test_a_technique_is_held_against_the_arm_that_lacks_it():
    assert [base_of(name) for name in ARMS] == [None, "full", "lora", None]
    lines = table(ARMS)
    row = "| lora | 4.0 | 4.0 | 4.0 | 4.0 | 20.0 | 5.00 | 100 | 2.000 → 1.500 |"
    assert row in lines
    (ratios,) = [line for line in lines if line.startswith("| lora, less | ×")]
    assert ratios.startswith(
        "| lora, less | ×0.50 | ×0.50 | ×0.50 | ×0.50 | ×0.50 | ×1.50 | +0.125 | activations within"
    )
    (ratios,) = [line for line in lines if line.startswith("| lora | ×")]
    assert "| ×0.50 | +0.000 | gradients and optimizer state are of the adapter alone" in ratios
    assert not any(line.startswith("| + shared | ×") for line in lines)
    shorter = {**ARMS, "lora": {**ARMS["lora"], "tokens": 50}}
    (ratios,) = [line for line in table(shorter) if line.startswith("| lora | ×")]
    assert "| ×1.00 | other tokens | gradients and" in ratios


def test_bars_are_as_long_as_the_peaks():
    (axes,) = ladder(ARMS, ["full", "lora", "gone"]).axes
    rungs = zip(*axes.containers, strict=True)
    ends = [max(bar.get_x() + bar.get_width() for bar in bars) for bars in rungs]
    assert ends == pytest.approx([40.0, 20.0])
    (points,) = memory_against_speed(ARMS).axes
    found = [tuple(map(float, one.get_offsets()[0])) for one in points.collections]
    assert found == [(10.0, 40.0), (5.0, 20.0), (7.5, 10.0), (2.5, 5.0)]


def test_every_arm_of_the_config_says_why():
    arms = load_settings("study.yaml").study.arms
    held_against = [(name, base_of(name)) for name in arms if base_of(name)]
    assert len(held_against) > 8
    found = {
        name: made(name, megabytes=1, seconds=1.0, overrides=tuple(given))
        for name, given in arms.items()
    }
    reasons = {}
    for line in table(found):
        if "| ×" in line:
            name, *_, why, _ = [part.strip() for part in line.split("|")[1:]]
            reasons[name] = why
    assert list(reasons) == [name for name, _ in held_against]
    assert all(reasons.values())
    assert not any("; activations within" in why for why in reasons.values())


@pytest.fixture
def studied(write_config, tmp_path, monkeypatch):
    """study.py on two arms, each measured by a stand-in that says which it was."""
    measured: list[str] = []

    def measure(name, config, overrides):
        measured.append(name)
        found = made(name, megabytes=1 + len(measured), seconds=1.0)
        del found["overrides"]  # study.py's own to add
        return found

    monkeypatch.setattr(study, "_measured", measure)
    arms = {"full": ["study.train=everything"], "lora": ["lora.r=2"]}
    config = write_config(**ARM, study={"arms": arms, "ladder": ["full", "lora"]})
    folder = tmp_path / "study"

    def run(*arguments: str) -> tuple[int, list[str]]:
        measured.clear()
        asked = ["--config", str(config), "--folder", str(folder), *arguments]
        return run_command(lambda: study.main(asked)), list(measured)

    run.folder, run.config = folder, config
    return run


def test_only_what_is_missing_is_measured(studied):
    assert studied() == (0, ["full", "lora"])
    assert studied() == (0, [])
    assert studied("--arms", "lora") == (0, ["lora"])
    (studied.folder / "full.json").write_text("{")
    assert studied() == (0, ["full"])
    assert studied("training.learning_rate=0.5") == (0, ["full", "lora"])
    content = json.loads((studied.folder / "lora.json").read_text())
    assert content["overrides"] == ["lora.r=2"]
    assert set(content["versions"]) >= {"torch", "transformers", "peft"}
    for name in ("study.md", "ladder.png", "memory_speed.png"):
        assert (studied.folder / name).stat().st_size > 100


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_other_rows_or_weights_are_measured_anew(studied, tiny_checkpoint, tmp_path, what):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    rows = tmp_path / "other.json"
    rows.write_text((tmp_path / "rows.json").read_text())
    asked = [f"model.name_or_path={model}", f"data.path={rows}"]
    assert studied(*asked) == (0, ["full", "lora"])
    file = rows if what == "rows" else model / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-5] ^= 1
    file.write_bytes(changed)
    assert studied(*asked) == (0, ["full", "lora"])
    assert studied(*asked) == (0, [])


def test_an_arm_that_is_added_leaves_the_others_as_they_are(studied):
    studied()
    text = studied.config.read_text().replace(
        "- lora.r=2\n", "- lora.r=2\n    more:\n    - lora.r=3\n"
    )
    studied.config.write_text(text)
    assert studied() == (0, ["more"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "lore"], "--arms: 'lore' is no arm. Choose among full; lora."),
        (["study.ladder=[full, x]"], "study.ladder: 'x' is no arm."),
        (["study.arms={a: [lora.r=0]}", "study.ladder=null"], "lora.r"),
        (["study.arms=null", "study.ladder=null"], "study.arms: is missing"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(studied, capsys, arguments, said):
    assert studied(*arguments) == (2, [])
    assert said in capsys.readouterr().err
    assert not studied.folder.exists()


@pytest.mark.slow
def test_a_study_as_a_user_runs_it(write_config, tmp_path, capsys):
    arms = {"lora": [], "broken": ["lora.target_modules=[no_such]"]}
    config = write_config(**ARM, study={"arms": {"lora": []}, "ladder": ["lora"]})
    asked = ["--config", str(config), "--folder", str(tmp_path / "study")]
    assert run_command(lambda: study.main(asked)) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "study/lora.json").read_text())
    assert math.isfinite(found["held_out_loss"]["after"])
    assert f"{found['tokens']:,}" in shown
    config = write_config(**ARM, study={"arms": arms, "ladder": ["lora"]})
    assert run_command(lambda: study.main(asked)) == 3
    said = capsys.readouterr().err
    assert "broken: ended with 2" in said
    assert "no_such" in said
