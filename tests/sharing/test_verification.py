"""``adapter.py verify``: every damage is told by its own check, and nothing whole is refused.

How small a change the probes see is measured by ``test_the_size_of_a_change_that_is_seen``.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from recipe import adapter, generate
from recipe.exit_codes import run_command
from recipe.model.fingerprint import weights_sha256
from recipe.settings import RunFailed, UserError
from recipe.sharing.probes import Probe, compare_probes
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT
from recipe.verify import verified
from tests.refusal import listing, whole_lines
from tests.sharing.corruptions import CASES, OF_TENSORS, UNSEALED, UP
from tests.sharing.damage import each, exchanged, receipt, reseal_with_proof, rounded
from tests.sharing.healthy import BASES, RUNS, SAME, in_shards, trained
from tests.untrusted.payload import edit, reseal

CHECKS = {
    "whole", "files", "receipt", "config", "keys", "shapes", "finite", "effect",
    "weights", "base", "tokenizer", "template", "probes",
}  # fmt: skip


@pytest.fixture(scope="module")
def once(tmp_path_factory, tiny_checkpoint):
    """An adapter for each template, with the folder of its base."""
    return {
        name: trained(tmp_path_factory.mktemp(name), tiny_checkpoint, data={"template": name})
        for name in ("alpaca", "chat")
    }


@pytest.fixture
def damaged(once, tiny_checkpoint, tmp_path):
    """Do what a case does to copies; returns the adapter and what to give as --model."""

    def damage(case):
        folder = Path(shutil.copytree(once[case.template], tmp_path / "adapter"))
        if not case.of_base:
            case.damage(folder)
            if case.sealed:
                (reseal_with_proof if case.proof else reseal)(folder)
            return folder, None
        base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
        case.damage(base)
        return folder, str(base)

    return damage


def complaints(folder, model, tmp_path):
    with pytest.raises(RunFailed) as refused:
        verified(str(folder), model=model, runs=tmp_path)
    return whole_lines(str(refused.value))


def assert_says(lines, said):
    """A line for each expected one, in that order, and no other."""
    assert len(lines) == len(said), lines
    for line, (check, part) in zip(lines, said, strict=True):
        assert line.startswith(f"{check}: "), line
        assert part in line, line


@pytest.mark.parametrize("name", CASES)
def test_each_damage_is_told_by_its_own_check(damaged, tmp_path, name):
    folder, model = damaged(CASES[name])
    before = listing(tmp_path)
    assert_says(complaints(folder, model, tmp_path), CASES[name].said)
    assert listing(tmp_path) == before


def test_no_check_is_without_a_case():
    assert {check for case in CASES.values() for check, _ in case.said} == CHECKS


@pytest.mark.parametrize(
    "name", ["tensors: B of one module is zero", "answers: every sign of B",
             "base: one value of the base", "not sealed: a pickle alone"],
)  # fmt: skip
def test_the_command_exits_with_three_and_a_line_a_problem(damaged, tmp_path, capsys, name):
    folder, model = damaged(CASES[name])
    capsys.readouterr()
    where = ["--model", model] if model else []
    assert run_command(lambda: adapter.main(["verify", str(folder), *where])) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert_says(whole_lines(said.err.removesuffix("\n")), CASES[name].said)


CHEAP = [n for n, case in CASES.items() if all(check != "probes" for check, _ in case.said)]


@pytest.mark.parametrize("name", CHEAP)
def test_no_prompt_is_answered_with_it(damaged, tmp_path, capsys, name):
    folder, model = damaged(CASES[name])
    lines = complaints(folder, model, tmp_path)
    capsys.readouterr()
    arguments = ["--prompt", "x", "--adapter", str(folder), *(["--model", model] if model else [])]
    assert run_command(lambda: generate.main(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == lines


# By how many standard deviations each moves the logits, of an adapter that moves the base's by 6.
SIZES = [
    # The tolerance is 8e-5 where the base computes as it did.
    ("float32", each("lora_B", lambda b: 1.00002 * b), False),  # 4e-5
    ("float32", each("lora_B", lambda b: 1.0001 * b), True),  # 2e-4
    ("float32", each("", torch.Tensor.half), True),  # 2e-4
    ("float32", each("", partial(rounded, bits=8)), True),  # 2e-3
    # The tolerance is 0.05 where the base computes as it did, for bfloat16, 8 and 4 bit.
    ("bfloat16", each("lora_B", lambda b: 1.05 * b), True),  # 0.09
    ("bfloat16", each("0.self_attn.q_proj.lora_B", torch.neg), False),  # 0.04
    ("bfloat16", each("lora_B", lambda b: 1.5 * b), True),  # 0.7
    ("bfloat16", exchanged("layers.0", "layers.1"), True),  # 6
]


@pytest.fixture(scope="module")
def by_dtype(tmp_path_factory, tiny_checkpoint):
    """An adapter for a base in each dtype; CPU, torch 2.13, 2026-11-25."""
    return {
        dtype: trained(tmp_path_factory.mktemp(dtype), tiny_checkpoint, model={"dtype": dtype})
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize(("dtype", "damage", "seen"), SIZES)
def test_the_size_of_a_change_that_is_seen(by_dtype, tmp_path, dtype, damage, seen):
    folder = Path(shutil.copytree(by_dtype[dtype], tmp_path / "adapter"))
    damage(folder)
    reseal_with_proof(folder)
    if seen:
        assert_says(complaints(folder, None, tmp_path), [("probes", "the tuned logits differ by")])
    else:
        verified(str(folder), model=None, runs=tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_made_is_accepted(tiny_checkpoint, tmp_path, name):
    found = verified(str(RUNS[name](tmp_path, tiny_checkpoint)), model=None, runs=tmp_path)
    assert found.verification.unproven is None
    assert found.verification.passed[-1][0] in ("probes", "")


@pytest.mark.parametrize("name", BASES)
def test_the_same_base_is_accepted_from_elsewhere(once, tiny_checkpoint, tmp_path, name):
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    BASES[name](base)
    found = verified(str(once["alpaca"]), model=str(base), runs=tmp_path).verification
    assert found.passed[-1][0] == "probes"


@pytest.mark.parametrize("name", SAME)
def test_the_same_adapter_is_accepted(once, tmp_path, name):
    folder = Path(shutil.copytree(once["alpaca"], tmp_path / "moved" / "elsewhere"))
    SAME[name](folder)
    reseal_with_proof(folder)
    found = verified(str(folder), model=None, runs=tmp_path).verification
    assert found.passed[-1][0] == "probes"
    assert found.unproven is None


def test_a_healthy_one_is_reported_by_the_command(once, capsys):
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(once["chat"].parent)])) == 0
    said = capsys.readouterr()
    assert said.err == ""
    first, *checks, last = said.out.splitlines()
    assert first.startswith(str(once["chat"]))
    assert {line.split()[0] for line in checks} <= CHECKS
    assert last.startswith("verified ")


def test_an_adapter_that_hardly_does_anything_is_not_said_to_answer_as_it_did(
    tmp_path, tiny_checkpoint, capsys
):
    """Its tensors are those that were saved; no answer could tell it from another like it."""
    training = {"learning_rate": 1e-6, "max_steps": 1}
    folder = trained(tmp_path, tiny_checkpoint, training=training)
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(folder)])) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "it is what was trained; whether it answers as it did these probes cannot tell" in last


def test_the_fingerprint_is_of_weights_and_not_of_files(tiny_checkpoint, tmp_path):
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    in_shards(base)
    one, other = (LlamaForCausalLM.from_pretrained(folder) for folder in (tiny_checkpoint, base))
    assert weights_sha256(one) == weights_sha256(other)
    with torch.no_grad():
        other.model.norm.weight[5] += 1e-7
    assert weights_sha256(one) != weights_sha256(other)
    assert weights_sha256(one) != weights_sha256(one.to(torch.bfloat16))


def test_nan_of_any_prompt_is_no_agreement():
    probe = Probe(prompt="", input_ids=[1], token_ids=[0, 1], base=[0, 1], tuned=[0, 1])
    for number in range(3):
        base = torch.tensor([[0.0, 1.0]] * 3)
        logits = base.clone()
        logits[number, 1] = float("nan")
        found = compare_probes([probe] * 3, base=base, tuned=logits)
        assert not found.tuned <= 1e9, number
        assert found.base == 0


@pytest.fixture
def by_peft(tiny_checkpoint, tmp_path):
    """What stock peft saves, on a base that it names."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_an_adapter_by_plain_peft_is_unproven_and_answers(by_peft, capsys):
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(by_peft)])) == 3
    said = capsys.readouterr()
    (line,) = whole_lines(said.err.removesuffix("\n"))
    assert line.startswith("unproven: it has no recipe.json")
    _, *checks = said.out.splitlines()
    assert [check.split()[0] for check in checks] == ["keys", "shapes", "finite", "effect"]
    arguments = ["--prompt", "x", "--adapter", str(by_peft), "max_new_tokens=3"]
    assert run_command(lambda: generate.main([*arguments, "--template", "raw"])) == 0
    assert "unproven: it has no recipe.json" in "".join(capsys.readouterr())
    assert run_command(lambda: generate.main(arguments)) == 2
    assert capsys.readouterr().err.startswith("--template: ")


@pytest.mark.parametrize("name", OF_TENSORS)
def test_damaged_tensors_are_told_without_a_receipt(by_peft, tmp_path, name):
    damage, check, part = OF_TENSORS[name]
    damage(by_peft)
    assert_says(complaints(by_peft, None, tmp_path), [(check, part)])


@pytest.mark.parametrize("name", ["a pickle beside", "a pickle below"])
def test_a_pickle_is_told_without_a_receipt(by_peft, tmp_path, name):
    damage, said = UNSEALED[name]
    damage(by_peft)
    assert_says(complaints(by_peft, None, tmp_path), said)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"target_modules": "("},
        {"target_modules": ["nothing"]},
        {"rank_pattern": {"(": 1}},
        {"exclude_modules": "("},
        {"modules_to_save": {"(": 1}},
        {"trainable_token_indices": 1.5},
        {"lora_alpha": "x"},
        {"peft_type": "IA3"},
        {"megatron_config": {"a": 1}},
    ],
    ids=str,
)
def test_a_configuration_that_peft_refuses_is_a_line(by_peft, tmp_path, values):
    edit(by_peft / ADAPTER_CONFIG, **values)
    (line,) = complaints(by_peft, None, tmp_path)
    assert line.startswith("config: ")


def test_without_its_proof_an_adapter_is_unproven(once, tmp_path, capsys):
    folder = Path(shutil.copytree(once["alpaca"], tmp_path / "adapter"))
    receipt(lambda held: held.pop("proof"))(folder)
    reseal(folder)
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(folder)])) == 3
    said = capsys.readouterr()
    assert said.err.startswith("unproven: its recipe.json holds no proof")
    assert "verified" not in said.out
    each(f"{UP}B", torch.zeros_like)(folder)
    reseal(folder)
    (line,) = complaints(folder, None, tmp_path)
    assert line.startswith("effect: ")


def no_adapter(folder):
    (folder / ADAPTER_CONFIG).unlink()


def base_elsewhere(folder):
    receipt(lambda held: held["base"].update(name_or_path="runs/no-such-base"))(folder)


def base_with_revision(folder):
    receipt(lambda held: held["base"].update(revision="main"))(folder)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (shutil.rmtree, "adapter"),
        (no_adapter, "adapter"),
        (base_elsewhere, "model.name_or_path"),
        (base_with_revision, "model.revision"),
    ],
)
def test_what_cannot_be_checked_is_no_answer(once, tmp_path, capsys, damage, where):
    """Exit 2: nothing was found out about an adapter."""
    folder = Path(shutil.copytree(once["alpaca"], tmp_path / "adapter"))
    damage(folder)
    if (folder / RECEIPT).is_file():
        reseal(folder)
    capsys.readouterr()
    assert run_command(lambda: adapter.main(["verify", str(folder)])) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = whole_lines(said.err.removesuffix("\n"))
    assert line.startswith(f"{where}: ")


def test_a_base_is_no_adapter(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=f"holds no {ADAPTER_CONFIG}"):
        verified(str(tiny_checkpoint), model=None, runs=tmp_path)
