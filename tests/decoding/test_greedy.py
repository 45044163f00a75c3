"""Greedy is greedy, whatever generation config came with the checkpoint."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe.answerer import load_answerer
from recipe.settings import UserError


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = {"repetition_penalty": 50.0, "num_beams": 3, "do_sample": True, "temperature": 9.0}
    (copy / "generation_config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_tokens_are_the_argmax_of_the_stock_model(checkpoint, tmp_path, template):
    answerer = load_answerer(
        adapter="none", model=str(checkpoint), template=template, runs=tmp_path
    )
    text, _ = answerer.answer("Name a fruit.", max_new_tokens=12, stream=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    prompt = answerer.template.prompt("Name a fruit.")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=template == "alpaca").input_ids
    begin = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
        if following == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(ids[0, begin:], skip_special_tokens=True)


def test_a_prompt_beyond_the_context_is_told(checkpoint, tmp_path):
    answerer = load_answerer(adapter="none", model=str(checkpoint), template=None, runs=tmp_path)
    with pytest.raises(UserError, match="do not fit into the model's context of 256"):
        answerer.answer("word " * 300, max_new_tokens=5, stream=False)
