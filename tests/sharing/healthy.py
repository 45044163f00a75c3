"""Adapters that are what was trained, however they were made and wherever they lie now."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from recipe.finetune import finetune
from recipe.settings import load_settings
from recipe.sharing.receipt import ADAPTER_CONFIG
from tests.conftest import ROWS
from tests.sharing.damage import Damage, also, base_config, config, each, tensors, written

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "all linear layers": {},
    "DoRA": {"lora": {"use_dora": True}},
    "rsLoRA": {"lora": {"use_rslora": True}},
    "PiSSA": {"lora": {"init_lora_weights": "pissa"}},
    "trained head": {"lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}},
    "embedding": {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    "a few new tokens": {"lora": {"trainable_token_indices": [3, 7]}},
    "ranks by layer": {"lora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}}},
    "dropout": {"lora": {"lora_dropout": 0.3}},
    "bfloat16 base": {"model": {"dtype": "bfloat16"}},
    "float16 base": {"model": {"dtype": "float16"}},
    "mixed precision": {"training": {"bf16": True}},
    "4-bit base": {"model": {"quantization": NF4}},
    "8-bit base": {"model": {"quantization": {"load_in_8bit": True}}},
    "chat": {"data": {"template": "chat"}},
    "raw": {"data": {"template": "raw"}},
}


class PowerCut(TrainerCallback):
    """Ends a run in the middle of its third step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("power cut")


def settings_file(folder: Path, checkpoint: Path, **sections: dict[str, Any]) -> Path:
    """A config for ``checkpoint`` whose run will lie in ``folder``."""
    (folder / "rows.json").write_text(json.dumps(ROWS))
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(checkpoint), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"path": str(folder / "rows.json")},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "save_strategy": "no",
        },
    }
    for section, given in sections.items():
        values[section].update(given)
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def trained(folder: Path, checkpoint: Path, **sections: dict[str, Any]) -> Path:
    """Train in ``folder``, so that every part of the base is adapted; the adapter's folder."""
    return finetune(load_settings(str(settings_file(folder, checkpoint, **sections)))) / "adapter"


def resumed(folder: Path, checkpoint: Path) -> Path:
    """The adapter of a run that was cut off and went on."""
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    saving["per_device_train_batch_size"] = 2
    file = str(settings_file(folder, checkpoint, training=saving))
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(load_settings(file), watchers=[PowerCut()])
    resume = f"training.resume_from_checkpoint={folder / 'run'}"
    return finetune(load_settings(file, [resume])) / "adapter"


def in_shards(base: Path) -> None:
    """The weights in several files, written by stock transformers."""
    model = LlamaForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("model-*.safetensors"))) > 3


def saved_again(base: Path) -> None:
    """Everything written anew by stock transformers."""
    model = LlamaForCausalLM.from_pretrained(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    shutil.rmtree(base)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)


# The base at another place, changed in what no answer of an Alpaca adapter depends on.
BASES: dict[str, Damage] = {
    "at another place": lambda base: None,
    "in several files": in_shards,
    "saved again": saved_again,
    "another chat template": written("chat_template.jinja", "{{ messages[0]['content'] }}"),
    "dropout": base_config(attention_dropout=0.5),
    "longer contexts": base_config(max_position_embeddings=512),
}


def _by(rows: slice | list[int]) -> Damage:
    return also(each("lora_A", lambda a: a[rows]), each("lora_B", lambda b: b[:, rows]))


# Changed, sealed anew, and still the same adapter.
SAME: dict[str, Damage] = {
    "written once more": tensors(lambda old: dict(reversed(old.items()))),
    "signs of A and B": each("lora_", torch.neg),
    "rank dimensions in another order": _by([2, 0, 3, 1]),
    "float64": each("", torch.Tensor.double),
    "B times 1.00002": each("lora_B", lambda b: 1.00002 * b),
    "another README": written("README.md", "Mine."),
    "a note beside": written("notes.txt", "Mine."),
    "where it was made": config(
        base_model_name_or_path="elsewhere", revision="main", peft_version="0", inference_mode=False
    ),
    "targets in another order": lambda adapter: _reordered(adapter / ADAPTER_CONFIG),
}


def _reordered(file: Path) -> None:
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "target_modules": held["target_modules"][::-1]}))


Make = Callable[[Path, Path], Path]
RUNS: dict[str, Make] = {
    **{
        name: lambda folder, checkpoint, sections=sections: trained(folder, checkpoint, **sections)
        for name, sections in SETTINGS.items()
    },
    "resumed": resumed,
}
