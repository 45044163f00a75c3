"""A tiny Llama checkpoint and tiny configs, built on the spot; nothing here touches a network."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read once, when huggingface_hub is imported. The token cache of the tests is not the user's.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="recipe-tests-")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import hypothesis_profiles  # noqa: F401
from tests.blocked_sockets import sitecustomize

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
sitecustomize.block()
# Each Python process that a test starts blocks itself.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH")])
)

REPOSITORY = Path(__file__).parents[1]
STARTER = REPOSITORY / "models/smollm2-135m-instruct"
SHARED_ALPACA = REPOSITORY.parent / "shared/data/alpaca_first1000.json"

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes",
    "the request. ### Instruction: ### Input: ### Response: paired with an input that provides",
    "Name the colour of the sky. Blue. Count to three. One, two, three. What is two plus two? 4",
]
ROWS = [
    {"instruction": "Name the colour of the sky.", "input": "", "output": "Blue."},
    {"instruction": "Count to three.", "input": "", "output": "One, two, three."},
    {"instruction": "What is two plus two?", "input": "", "output": "Four"},
    {"instruction": "Repeat the word.", "input": "river", "output": "river"},
    {"instruction": "Say what you see.", "input": "a red house", "output": "I see a house, red."},
    {"instruction": "Greet.", "input": "", "output": "Hello, and welcome to all of you tonight."},
    {"instruction": "Is water wet?", "input": "", "output": "Yes"},
    {"instruction": "Describe rain in a few words.", "input": "", "output": "Drops that fall."},
    {"instruction": "Give the plural.", "input": "cat", "output": "cats"},
    {"instruction": "Say nothing much.", "input": "", "output": "Nothing much, really, at all."},
    {"instruction": "Name a fruit.", "input": "", "output": "Apple"},
    {"instruction": "Name a city.", "input": "in Spain", "output": "Madrid"},
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; pad is eos, as in many checkpoints."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM of two layers with grouped-query attention, as safetensors."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # large enough that every path through the model matters
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def starter() -> Path:
    if not (STARTER / "sha256.json").is_file():
        pytest.skip("the starter model is not there; make setup converts it")
    return STARTER


@pytest.fixture(scope="session")
def alpaca() -> Path:
    if not SHARED_ALPACA.is_file():
        pytest.skip(f"no Alpaca rows beside the repository ({SHARED_ALPACA.name})")
    return SHARED_ALPACA


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON (or JSONL by suffix) and return the file."""

    def write(rows: list[Any] = ROWS, name: str = "rows.json") -> Path:
        file = tmp_path / name
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(json.dumps(rows))
        return file

    return write


@pytest.fixture
def write_config(
    tmp_path: Path, tiny_checkpoint: Path, write_rows: Callable[..., Path]
) -> Callable[..., Path]:
    """Write a config for the tiny checkpoint; sections given replace keys of the default ones."""

    def write(name: str = "tiny.yaml", **sections: dict[str, Any]) -> Path:
        config: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(tiny_checkpoint), "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "data": {"path": str(write_rows())},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "save_strategy": "no",
            },
        }
        for section, values in sections.items():
            config.setdefault(section, {}).update(values)
        file = tmp_path / name
        file.write_text(yaml.safe_dump(config))
        return file

    return write
