"""The last layer computes its feed-forward part where a logit is asked for, and there as ever."""

import numpy as np
import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from recipe.data.batch import IGNORED, flatten
from recipe.data.tokens import TokenizedRow
from recipe.finetune import finetune
from recipe.model.attention import PER_ROW_SDPA, register
from recipe.model.lora import add_lora
from recipe.settings import load_settings

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": False}


@pytest.fixture
def adapted(tiny_checkpoint):
    register()
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation=PER_ROW_SDPA)
    return add_lora(base, LORA).train()


def row(index: int, prompt: int, answer: int) -> TokenizedRow:
    ids = np.random.default_rng(index).integers(2, 300, prompt + answer, dtype=np.int32)
    return TokenizedRow(index, ids, np.arange(prompt + answer) >= prompt)


def logits_and_gradients(model, batch, *, scale: torch.Tensor):
    """Of a weighted sum of the logits at the kept positions that predict something."""
    model.zero_grad()
    logits = model(**batch).logits[0]
    (logits[scale != 0] * scale[scale != 0, None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), gradients


def close(found, gradients, expected, whole, scale) -> None:
    torch.testing.assert_close(found[scale != 0], expected[scale != 0], rtol=1e-5, atol=1e-6)
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        distance = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert distance < 1e-5, name


def batch_of(*rows):
    return prepared(flatten([row(index, *lengths) for index, lengths in enumerate(rows)]))


def prepared(batch):
    """As the model takes it, and a weight for each kept position, 0 where it only fills up."""
    labels = batch.pop("labels")
    for name in ("row_indices", "shift_labels"):
        del batch[name]
    return batch, torch.linspace(0.5, 2, len(labels)) * (labels != IGNORED)


# In the second, position 0 predicts, and fills up; in the third, none fills up; in the fourth, none
# predicts.
ROWS = [[(5, 3), (9, 1), (2, 6)], [(1, 3), (4, 2)], [(3, 8)], [(4, 0)]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_the_whole_layer(adapted, rows, checkpointing):
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    batch, scale = batch_of(*rows)
    found, gradients = logits_and_gradients(adapted, batch, scale=scale)
    del batch["predicting"]
    expected, whole = logits_and_gradients(adapted, batch, scale=scale)
    close(found, gradients, expected, whole, scale)


def test_the_feed_forward_part_sees_what_predicts_alone(adapted):
    seen = []
    last, before = (adapted.get_base_model().model.layers[i].mlp for i in (-1, -2))
    for part in (last, before):
        part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    batch, _ = batch_of((5, 3), (9, 1), (2, 6))
    adapted(**batch)
    assert seen == [23, 10]
    del batch["predicting"]
    adapted(**batch)
    assert seen[2:] == [23, 23]


def test_batches_of_a_run_say_what_predicts(write_config, capsys):
    """Without ``predicting`` in the batch all would still be right, and slower."""
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            model.get_base_model().model.layers[-1].mlp.register_forward_hook(
                lambda module, inputs, output: seen.append(
                    inputs[0].shape[1] * output.requires_grad
                )
            )

    config = write_config(training={"num_train_epochs": 1})
    finetune(load_settings(str(config)), watchers=[Watch()])
    assert f"{sum(seen):,} of them trained" in capsys.readouterr().out


def test_with_shared_openings(adapted):
    common = row(7, 12, 0).input_ids
    rows = [row(0, 5, 3), row(1, 2, 4), row(2, 1, 6)]
    rows = [
        TokenizedRow(
            one.index,
            np.concatenate([common, one.input_ids]),
            np.concatenate([np.zeros(12, dtype=bool), one.trained]),
        )
        for one in rows
    ]
    batch, scale = prepared(flatten(rows, share_openings=True))
    assert sum(batch["openings"]) == 24
    found, gradients = logits_and_gradients(adapted, batch, scale=scale)
    del batch["predicting"]
    expected, whole = logits_and_gradients(adapted, batch, scale=scale)
    close(found, gradients, expected, whole, scale)


@pytest.mark.parametrize("trained", ["layers.1", "layers.1.mlp"])
def test_a_last_layer_that_is_trained_whole(tiny_checkpoint, trained):
    """peft wraps it, and the model computes what it did."""
    register()
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation=PER_ROW_SDPA)
    assert base.config.num_hidden_layers == 2
    model = add_lora(base, {**LORA, "target_modules": ["q_proj"], "modules_to_save": [trained]})
    batch, scale = batch_of((5, 3), (9, 1))
    found, gradients = logits_and_gradients(model, batch, scale=scale)
    del batch["predicting"]
    expected, whole = logits_and_gradients(model, batch, scale=scale)
    close(found, gradients, expected, whole, scale)


def test_an_only_layer_keeps_the_name_that_fsdp_looks_for():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    for layers in (1, 2):
        config.num_hidden_layers = layers
        model = add_lora(LlamaForCausalLM(config), LORA)
        assert get_module_class_from_name(model, "LlamaDecoderLayer") is LlamaDecoderLayer
