"""What holds is found to hold, in every kind of config; what cannot be compared says why."""

import json

import pytest

from recipe.proving import gradients, processes, texts, trained
from recipe.proving.claims import CLAIMS
from recipe.proving.finding import HEADING, Finding, compared, not_applicable
from recipe.settings import UserError, load_settings

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
}
CONFIGS = {
    "plain": ({}, set()),
    "dora": ({"lora": {"use_dora": True}}, set()),
    "trained head": ({"lora": {"modules_to_save": ["lm_head"]}}, {gradients.CHUNKED}),
    "pissa": ({"lora": {"init_lora_weights": "pissa"}}, set()),
    "all-linear": ({"lora": {"target_modules": "all-linear"}}, set()),
    "eager": ({"model": {"attn_implementation": "eager"}}, {gradients.OPENINGS}),
    "nf4": ({"model": {"quantization": NF4}}, set()),
    "bfloat16 base": ({"model": {"dtype": "bfloat16"}}, set()),
    "chat template": ({"data": {"template": "chat"}}, set()),
    "own shape, every row": (
        {
            "data": {"rows": None, "held_out": None},
            "training": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        },
        set(),
    ),
    "three rows": ({"data": {"rows": "2:5", "held_out": None}}, set()),
    "one row, checkpointing": (
        {
            "data": {"rows": "2:3", "held_out": None},
            "training": {"gradient_checkpointing": True},
        },
        {gradients.OPENINGS},
    ),
}


QUICK = {"plain", "dora", "trained head", "one row, checkpointing"}


def slow_unless_quick(name):
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", [slow_unless_quick(one) for one in CONFIGS])
def test_what_holds_passes(proof, name):
    sections, apart = CONFIGS[name]
    found = proof(**sections)
    assert [claim for claim, finding in found.items() if finding.passed is False] == []
    left = {claim for claim, finding in found.items() if finding.passed is None}
    assert left == apart
    if name == "plain":
        note = found[trained.RESUMED].note
        assert note.startswith("6 steps of 2 × 2 rows, stopped within step 4;")


def test_conversations_and_cut_rows(proof, tmp_path, tiny_checkpoint):
    turns = [
        {"role": "system" if n == 0 else ("user", "assistant")[(n + 1) % 2], "content": f"Say {n}."}
        for n in range(5)
    ]
    rows = [
        {"messages": [*turns[:-1], {"role": "assistant", "content": "Yes. " * n}]}
        for n in (1, 2, 40)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    data = {
        "path": str(tmp_path / "chat.json"),
        "rows": None,
        "held_out": None,
        "max_length": 150,
        "too_long": "truncate",
    }
    found = proof(texts.MASK, texts.PROMPT, data=data)
    assert all(finding.passed is not False for finding in found.values())
    assert found[texts.MASK].note.startswith("3 rows")
    assert found[texts.PROMPT].note.startswith("6 prompts")


def test_fp16_on_a_laptop_is_proven_in_float32(proof):
    claims = gradients.FLATTENED, trained.BASE, trained.RELOADED
    found = proof(*claims, model={"dtype": "float16"}, training={"fp16": True, "use_cpu": False})
    assert [finding.passed for finding in found.values()] == [True] * 3


def test_qlora_on_a_laptop_is_proven_without_16_bit_and_paging(proof):
    claims = gradients.FLATTENED, trained.BASE, trained.RESUMED
    quantization = load_settings("qlora_alpaca.yaml").model.quantization
    training = {"bf16": True, "use_cpu": False, "optim": "paged_adamw_8bit"}
    model = {"dtype": "bfloat16", "quantization": dict(quantization)}
    found = proof(*claims, model=model, training=training)
    assert [finding.passed for finding in found.values()] == [True] * 3


@pytest.mark.slow
def test_two_processes_are_one(proof):
    found = proof(*(claim.name for claim in CLAIMS))
    assert list(found) == [claim.name for claim in CLAIMS]
    assert all(finding.passed for finding in found.values())
    assert found[processes.PROCESSES].measured < 1e-5


def test_a_proof_is_one_process(proof, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="starts its own processes"):
        proof()


def test_a_mistake_that_only_a_run_finds_is_the_users(proof):
    with pytest.raises(UserError, match="matches no module"):
        proof(lora={"target_modules": ["q_porj"]})


@pytest.mark.parametrize(
    ("measured", "passed"), [(0.0, True), (1e-6, True), (2e-6, False), (float("nan"), False)]
)
def test_a_difference_passes_within_its_tolerance(measured, passed):
    assert compared("a", measured, tolerance=1e-6, note="").passed is passed


def test_lines_stand_in_columns():
    lines = [
        HEADING,
        compared("one", 1.54e-6, tolerance=1e-5, note="so").line,
        compared("two", 3, tolerance=0, note="so").line,
        not_applicable("three", "none here").line,
    ]
    assert lines[1].endswith("    1.5e-06    1.0e-05  pass  so")
    assert lines[2].endswith("          3          0  FAIL  so")
    assert lines[3].endswith("          –          –  not applicable: none here")
    end = len(HEADING)
    assert [line[end : end + 2] for line in lines[1:]] == ["  "] * 3


def test_a_record_is_json_whatever_was_measured():
    record = Finding("a", float("inf"), 1e-6, False, "b").record()
    assert json.loads(json.dumps(record, allow_nan=False))["measured"] == "inf"
