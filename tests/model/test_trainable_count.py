"""Trainable parameters: the closed form, and the reports' 8,388,608 of a Llama-2-7B."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.model.lora import closed_form, total_parameters, trainable_parameters


def test_llama_2_7b_shape():
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4_096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base, lora)
    assert trainable_parameters(model) == closed_form(model) == 8_388_608
    # Embedding and head; per layer 4 attention and 3 feed-forward matrices and 2 norms; last norm.
    by_hand = 2 * 32_000 * 4_096 + 32 * (4 * 4_096**2 + 3 * 4_096 * 11_008 + 2 * 4_096) + 4_096
    assert by_hand == 6_738_415_616
    # The total that tools print counts the adapter too.
    assert total_parameters(model) == by_hand
    assert total_parameters(model) + trainable_parameters(model) == 6_746_804_224
