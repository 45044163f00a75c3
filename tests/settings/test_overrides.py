"""Overrides: the same keys, types and messages as in the file."""

import pytest

from recipe.settings import UserError, load_settings, plain

RIGHT = [
    ("lora.r=4", "lora", "r", 4),
    ("training.learning_rate=3e-4", "training", "learning_rate", 3e-4),
    ("lora.target_modules=[k_proj,o_proj]", "lora", "target_modules", ["k_proj", "o_proj"]),
    ("lora.target_modules=all-linear", "lora", "target_modules", "all-linear"),
    ("lora.rank_pattern={q_proj: 4}", "lora", "rank_pattern", {"q_proj": 4}),
    ("lora.rank_pattern.q_proj=4", "lora", "rank_pattern", {"q_proj": 4}),
    ("training.eval_strategy=no", "training", "eval_strategy", "no"),
    ("training.run_name=a=b", "training", "run_name", "a=b"),
    ("training.save_total_limit=null", "training", "save_total_limit", None),
    ("model.quantization.load_in_4bit=true", "model", "quantization", {"load_in_4bit": True}),
    ("data.rows=0:20", "data", "rows", "0:20"),
]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"), RIGHT, ids=[case[0] for case in RIGHT]
)
def test_override(write_config, override: str, section: str, key: str, value: object) -> None:
    settings = load_settings(str(write_config()), [override])
    held = getattr(settings, section)
    assert plain(held[key] if section in ("lora", "training") else getattr(held, key)) == value


def test_a_whole_section_is_replaced(write_config) -> None:
    settings = load_settings(str(write_config()), ["lora={lora_alpha: 3}", "lora.r=2"])
    assert dict(settings.lora) == {"lora_alpha": 3, "r": 2}


def test_the_name_of_the_run(write_config) -> None:
    assert load_settings(str(write_config()), ["name=other"]).name == "other"


WRONG = [
    (["lora.rr=8"], "lora.rr", "unknown key. Did you mean lora.r?"),
    (["lora.r=eight"], "lora.r", "expected a whole number"),
    (["trainin.seed=1"], "trainin.seed", "unknown section. Did you mean training?"),
    (["learning_rate=1"], "learning_rate", "write training.learning_rate"),
    (["--lora.r=8"], "--lora.r", "Write keys without dashes: lora.r=VALUE."),
    (["--hub_token=hf_secret"], "--hub_token", "without dashes: hub_token=VALUE."),
    (["training.hub_token=hf_secret"], "training.hub_token", "must never stand"),
    (["lora.r"], "lora.r", "Write section.key=value, such as lora.r=8."),
    (["8"], "8", "Write section.key=value, such as lora.r=8."),
    (["=8"], "", "Write section.key=value"),
    (["lora.=8"], "lora.", "Write section.key=value"),
    (["lora .r=8"], "lora .r", "Write section.key=value"),
    (["lora.r="], "lora.r", "nothing after '='. Write lora.r=null to say none."),
    (["lora=8"], "lora", "a section. Write lora.KEY=value"),
    (["lora.r.x=8"], "lora.r.x", "lora.r holds no keys. Write lora.r=value."),
    (["lora.r=010"], "lora.r", "010 starts with 0"),
    (["lora.r=[1"], "lora.r", "not valid YAML"),
    (["lora.target_modules=*q"], "lora.target_modules", "alias *q"),
    (["training.run_name=run #3"], "training.run_name", "'#3' would not be read"),
    (["lora.r=8", "lora.r=16"], "lora.r", "given after an override that it undoes"),
    (["lora.r=8", "lora={r: 16}"], "lora", "given after an override that it undoes"),
    (["data.held_out=150:250"], "data.held_out", "share rows"),
    (["a\nb=1"], "'a\\nb'", "unknown section"),
]


@pytest.mark.parametrize(
    ("overrides", "key", "fragment"), WRONG, ids=[" ".join(case[0]) for case in WRONG]
)
def test_wrong_override(write_config, overrides: list[str], key: str, fragment: str) -> None:
    with pytest.raises(UserError) as error:
        load_settings(str(write_config()), overrides)
    (problem,) = error.value.problems
    assert problem.where == f"override {key}"
    assert fragment in problem.message
    assert problem.message.isprintable()
    assert "secret" not in str(problem)
