"""Several adapters as one: the sums by hand, and what cannot be summed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from recipe import adapter as command
from recipe.combine import Combination, combine
from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.settings import RunFailed, UserError, load_settings
from recipe.verify import verified
from tests.conftest import ROWS
from tests.sharing.damage import each, reseal_with_proof


@pytest.fixture
def pair(write_config, write_rows, tmp_path):
    """Two adapters of one base that learned different rows."""
    folders = []
    for name, rows, seed in (("a", ROWS[:6], 1), ("b", ROWS[6:], 2)):
        config = write_config(
            data={"path": str(write_rows(rows, f"{name}.json"))},
            training={"output_dir": str(tmp_path / name), "seed": seed},
        )
        folders.append(str(finetune(load_settings(str(config)))))
    return folders


def changes(folder, base):
    """ΔW of each module by stock peft, from the saved files."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def make(pair, tmp_path, kind, weights=(0.75, -0.5), **more):
    asked = Combination(pair, weights, kind, **more)
    lines = combine(asked, tmp_path / "both", model=None, runs=tmp_path)
    return tmp_path / "both", lines


def test_cat_is_the_weighted_sum(pair, tmp_path, tiny_checkpoint):
    folder, lines = make(pair, tmp_path, "cat")
    a, b, both = (changes(f, tiny_checkpoint) for f in (f"{pair[0]}/adapter", f"{pair[1]}/adapter",
                                                        folder))  # fmt: skip
    for name in both:
        torch.testing.assert_close(both[name], 0.75 * a[name] - 0.5 * b[name], rtol=0, atol=1e-6)
    assert "r=8" in lines[0]
    assert "by 0.00%" in lines[1]
    assert verified(str(folder), model=None, runs=tmp_path).verification.unproven is None
    receipt = json.loads((folder / "recipe.json").read_text())
    assert [part["weight"] for part in receipt["combined"]] == [0.75, -0.5]


@pytest.mark.parametrize(("kind", "more"), [("svd", {"svd_rank": 3}), ("linear", {})])
def test_what_the_others_lose_is_measured(pair, tmp_path, tiny_checkpoint, kind, more):
    folder, lines = make(pair, tmp_path, kind, weights=(0.75, 0.5), **more)
    a, b, both = (changes(f, tiny_checkpoint) for f in (f"{pair[0]}/adapter", f"{pair[1]}/adapter",
                                                        folder))  # fmt: skip
    wanted = {name: 0.75 * a[name] + 0.5 * b[name] for name in a}
    wrong = sum((both[n] - wanted[n]).square().sum() for n in a)
    share = (wrong / sum(w.square().sum() for w in wanted.values())).sqrt().item()
    assert share > 0.01
    assert f"by {share:.2%}" in lines[1]
    if kind == "svd":
        best = sum(torch.linalg.svdvals(w)[3:].square().sum() for w in wanted.values())
        assert wrong.item() == pytest.approx(best.item(), rel=1e-3)  # Eckart and Young


def test_another_template_or_base_is_refused(pair, tmp_path, write_config):
    chat = write_config(data={"template": "chat"}, training={"output_dir": str(tmp_path / "chat")})
    finetune(load_settings(str(chat)))
    with pytest.raises(UserError, match="another template than"):
        make([pair[0], str(tmp_path / "chat")], tmp_path, "cat")
    unproven = shutil.copytree(f"{pair[1]}/adapter", tmp_path / "plain")
    for name in ("recipe.json", "sha256.json"):
        (unproven / name).unlink()
    with pytest.raises(UserError, match="unproven"):
        make([pair[0], str(unproven)], tmp_path, "cat")
    assert not (tmp_path / "both").exists()


def test_an_adapter_that_fails_its_own_check_is_not_made_sound_by_a_sum(pair, tmp_path):
    bad = Path(shutil.copytree(f"{pair[1]}/adapter", tmp_path / "bad"))
    each("lora_B", torch.neg)(bad)
    reseal_with_proof(bad)
    with pytest.raises(RunFailed, match="bad: probes: the tuned logits differ"):
        make([pair[0], str(bad)], tmp_path, "cat")
    assert not list(tmp_path.glob("*both*"))


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_rslora_keeps_its_scale(write_config, tmp_path, tiny_checkpoint, kind):
    """peft takes use_rslora over to the sum, which has the scale of its parts already."""
    names = [str(tmp_path / name) for name in ("a", "b")]
    for seed, name in enumerate(names):
        config = write_config(
            lora={"use_rslora": True}, training={"output_dir": name, "seed": seed}
        )
        finetune(load_settings(str(config)))
    folder, _ = make(
        names, tmp_path, kind, weights=(1.0, 0.5), svd_rank=8 * (kind == "svd") or None
    )
    a, b, both = (
        changes(one, tiny_checkpoint) for one in (*(f"{n}/adapter" for n in names), folder)
    )
    for name in both:
        torch.testing.assert_close(both[name], a[name] + 0.5 * b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_a_sum_would_leave_out_is_refused(write_config, tmp_path, lora):
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name in names:
        finetune(load_settings(str(write_config(lora=lora, training={"output_dir": name}))))
    with pytest.raises(UserError, match=f"has {next(iter(lora))}, which a sum"):
        make(names, tmp_path, "cat")
    assert not list(tmp_path.glob("*both*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "adapter: one alone cannot be combined."),
        (["a", "b", "--weights", "1"], "--weights: 1 for 2 adapters."),
        (["a", "b", "--weights", "0", "0"], "--weights: expected numbers, not all of them zero."),
        (["a", "b", "--weights", "nan", "1"], "--weights: expected numbers"),
        (["a", "b", "--svd-rank", "4"], "--svd-rank: goes with --combination-type svd"),
        (["a", "b"], "adapter: a is no folder."),
    ],
)
def test_wrong_arguments(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    output = ["--output", "both"]
    assert run_command(lambda: command.main(["combine", *arguments, *output])) == 2
    assert capsys.readouterr().err.startswith(said)
    assert not list(tmp_path.iterdir())
