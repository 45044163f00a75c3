"""Valid configs, where they are found, that they cannot be changed, and that they round-trip."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recipe.settings import (
    DataSettings,
    ModelSettings,
    Settings,
    UserError,
    dump,
    find_config,
    load,
    load_settings,
    plain,
)

RIGHT = {
    "nothing more": {},
    "null sections": {"rest": ""},
    "whole number for a float": {"training": "learning_rate: 1\nweight_decay: 0"},
    "float as 1e-4": {"training": "learning_rate: 1e-4"},
    "library defaults of refused keys": {
        "training": "push_to_hub: false\nlabel_smoothing_factor: 0\nhub_token: null\n"
        "average_tokens_across_devices: true\ntrain_sampling_strategy: random\nfsdp: null"
    },
    "sequential rows": {"training": "train_sampling_strategy: sequential"},
    "resume from a path": {"training": "resume_from_checkpoint: runs/x"},
    "warm-up as a fraction": {"training": "warmup_steps: 0.03"},
    "evaluation": {"training": "eval_strategy: steps\neval_steps: 10"},
    "best model": {
        "training": "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 0.1\n"
        "save_steps: 0.3"
    },
    "report to a list": {"training": "report_to: [tensorboard]"},
    "old and new name agree": {
        "training": "gradient_checkpointing: true\nactivation_checkpointing: true"
    },
    "all linear layers": {"lora": "target_modules: all-linear"},
    "regex": {"lora": "target_modules: '.*[qv]_proj'"},
    "pissa": {"lora": "init_lora_weights: pissa_niter_16"},
    "task": {"lora": "task_type: CAUSAL_LM"},
    "patterns": {"lora": "rank_pattern: {q_proj: 4}\nalpha_pattern: {q_proj: 8}"},
    "variant with a config": {"lora": "velora_config: {num_groups: 4}"},
    "token indices": {"lora": "trainable_token_indices: {embed_tokens: [1, 2]}"},
    "nf4": {
        "model": "quantization:\n    load_in_4bit: true\n    bnb_4bit_quant_type: nf4\n"
        "    bnb_4bit_compute_dtype: float32"
    },
    "int8": {"model": "quantization: {load_in_8bit: true, llm_int8_threshold: 6}"},
    "apart": {"data": "rows: 10:20\nheld_out: ':10'"},
    "no held-out rows": {"data": "rows: '5:'\nheld_out:"},
    "named": {"rest": "name: my-run.1\n"},
    "text that looks like numbers": {"training": "run_name: '3e-4'\nproject: '010'"},
    "unusual text": {"training": 'run_name: "a\\tb: #\\u00e9 \\u2028 \\U0001F600"'},
}


@pytest.mark.parametrize("extra", RIGHT.values(), ids=RIGHT.keys())
def test_right_config_round_trips(write_config, tmp_path, extra: dict[str, str]) -> None:
    settings = load_settings(str(write_config(**extra)))
    again = tmp_path / "settings.yaml"
    again.write_text(dump(settings), encoding="utf-8")
    expected = {
        key: value for key, value in settings.training.items() if key != "resume_from_checkpoint"
    }
    assert load_settings(str(again)) == settings.model_copy(update={"training": expected})


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    settings = Settings(
        name="x",
        model=ModelSettings(name_or_path="m"),
        data=DataSettings(path="d"),
        lora={},
        training={"run_name": text},
    )
    try:
        from_yaml = load.read(dump(settings), name="x").values["training"]["run_name"]
    except KeyError:
        assert not text.isprintable()
    else:
        assert from_yaml == text


def test_defaults(write_config) -> None:
    settings = load_settings(str(write_config()))
    assert settings.name == "c"
    assert settings.model == ModelSettings(name_or_path="base")
    assert (settings.model.dtype, settings.model.attn_implementation) == ("auto", "per_row_sdpa")
    assert settings.model.quantization is None
    assert (settings.data.split, settings.data.template, settings.data.too_long) == (
        "train",
        None,
        "error",
    )
    assert plain(settings.training) == {"seed": 1}


def test_training_may_be_missing_and_sections_empty(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {name_or_path: x}\ndata: {path: x}\nlora:\n")
    settings = load_settings(str(config))
    assert (dict(settings.lora), dict(settings.training)) == ({}, {})


def test_dump_leaves_out_what_belongs_to_one_run(write_config) -> None:
    training = "output_dir: runs/a\nresume_from_checkpoint: runs/b\nseed: 3"
    text = dump(load_settings(str(write_config(training=training))))
    assert "runs/" not in text
    assert "seed: 3" in text


def test_settings_cannot_be_changed(write_config) -> None:
    settings = load_settings(str(write_config(lora="rank_pattern: {q_proj: 4}")))
    with pytest.raises(ValidationError):
        settings.model.dtype = "float32"
    with pytest.raises(TypeError):
        settings.lora["r"] = 1
    with pytest.raises(TypeError):
        settings.lora["rank_pattern"]["q_proj"] = 1
    assert settings.lora["target_modules"] == ("q_proj", "v_proj")
    assert plain(settings.lora) == {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4},
        "r": 8,
    }
    assert settings.model_dump()["lora"] == plain(settings.lora)


def test_quantization_numbers_have_the_type_that_the_library_insists_on(write_config) -> None:
    config = write_config(model="quantization: {load_in_8bit: true, llm_int8_threshold: 6}")
    threshold = load_settings(str(config)).model.quantization["llm_int8_threshold"]
    assert isinstance(threshold, float)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for ``configs/``; the working directory is elsewhere and empty."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "a.yaml").touch()
    (folder / "b.yaml").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(load, "CONFIGS", folder)
    return folder


@pytest.mark.parametrize("name", ["a", "a.yaml"])
def test_find_config_in_the_folder(configs: Path, name: str) -> None:
    assert find_config(name) == configs / "a.yaml"


def test_find_config_prefers_a_path(configs: Path) -> None:
    Path("a.yaml").touch()
    assert find_config("a.yaml") == Path("a.yaml")


@pytest.mark.parametrize("name", ["c", "", "x" * 5000, "a\0b", "../configs"])
def test_find_config_lists_what_is_there(configs: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such file\. configs/ holds a\.yaml, b\.yaml\."):
        find_config(name)


def test_find_config_points_into_a_run_folder(configs: Path) -> None:
    Path("run").mkdir()
    Path("run/settings.yaml").touch()
    with pytest.raises(UserError, match=r"Use run/settings\.yaml\."):
        find_config("run")


def test_the_folder_of_configs_is_beside_the_package() -> None:
    assert (load.CONFIGS.parent / "recipe" / "settings").is_dir()


def test_not_utf8(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_bytes(b"model:\n  name_or_path: caf\xe9\n")
    with pytest.raises(UserError, match=r"c\.yaml:2: not UTF-8"):
        load_settings(str(config))


def test_no_file_name_for_a_run(tmp_path) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text("model: {name_or_path: x}\ndata: {path: x}\nlora: {r: 8}\n")
    with pytest.raises(UserError, match=r"my config\.yaml: name: 'my config' cannot name"):
        load_settings(str(config))
    assert load_settings(str(config), ["name=mine"]).name == "mine"


def test_no_heavy_import_and_well_under_a_second(write_config) -> None:
    code = (
        "import sys; from recipe.settings import load_settings; load_settings(sys.argv[1]); "
        "print({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'peft', "
        "'accelerate', 'datasets', 'huggingface_hub', 'numpy'})"
    )
    config = write_config(model="quantization: {load_in_4bit: true}")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
    # 0.3 s alone on two cores; the bound leaves room for a busy machine.
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_openings_are_shared_by_the_one_attention_that_can(attention: str) -> None:
    config, attended = "lora_alpaca.yaml", f"model.attn_implementation={attention}"
    with pytest.raises(UserError, match=f"needs model.attn_implementation: .*, found {attention}"):
        load_settings(config, [attended, "data.share_openings=true"])
    assert load_settings(config, [attended, "data.share_openings=false"])
