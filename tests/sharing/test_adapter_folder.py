"""Any LoraConfig field trains, and stock peft alone brings the same model back."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, TrainerCallback

from recipe.answerer import load_answerer
from recipe.finetune import finetune
from recipe.settings import UserError, load_settings
from recipe.sharing.adapter_folder import newest_adapter
from recipe.sharing.receipt import read_receipt
from recipe.verify import verified

VARIANTS = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "one layer": {"layers_to_transform": [1]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


CHECKS = [
    "whole", "config", "keys", "shapes", "finite", "effect", "weights",
    "base", "tokenizer", "template", "probes",
]  # fmt: skip


class Logits(TrainerCallback):
    """Keeps what the trained model says of a few tokens, without the recipe's attention."""

    IDS = torch.arange(5, 25)[None]

    def on_train_end(self, args, state, control, model=None, **_):
        model.eval()
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            self.kept = model(self.IDS).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_peft_brings_the_trained_model_back(write_config, tiny_checkpoint, name):
    logits = Logits()
    settings = load_settings(str(write_config(lora=VARIANTS[name])))
    folder = finetune(settings, watchers=[logits])
    # Five lines of stock code; nothing of the recipe.
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        again = model(Logits.IDS).logits
        untrained = LlamaForCausalLM.from_pretrained(tiny_checkpoint)(Logits.IDS).logits
    torch.testing.assert_close(again, logits.kept, rtol=1e-4, atol=1e-4)
    assert (again - untrained).abs().max() > 0.05
    # And the recipe, which loads both anew, finds what it wrote.
    found = verified(str(folder), model=None, runs=folder).verification
    assert [check for check, _ in found.passed] == CHECKS
    assert found.unproven is None


def test_the_receipt_carries_base_and_template(write_config, tiny_checkpoint):
    folder = finetune(load_settings(str(write_config(data={"template": "chat"}))))
    receipt = read_receipt(folder / "adapter")
    assert receipt.base.name_or_path == str(tiny_checkpoint)
    assert receipt.template == "chat"
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_checkpoint)


def test_a_changed_adapter_is_refused(write_config):
    adapter = finetune(load_settings(str(write_config()))) / "adapter"
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: changed since"):
        load_answerer(adapter=str(adapter), model=None, template=None, runs=adapter)


def test_the_newest_adapter_is_the_one_finished_last(tmp_path):
    import os

    for seconds, name in ((30, "b-001"), (10, "c-001"), (20, "a-001")):
        (tmp_path / name / "adapter").mkdir(parents=True)
        receipt = tmp_path / name / "adapter/recipe.json"
        receipt.write_text("{}")
        os.utime(receipt, (seconds, seconds))
    assert newest_adapter(tmp_path) == tmp_path / "b-001/adapter"
    with pytest.raises(UserError, match="no adapter under"):
        newest_adapter(tmp_path / "b-001")
