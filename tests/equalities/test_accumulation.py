"""Gradients of the real run against stock LlamaForCausalLM on the padded whole.

The oracle shares nothing with the recipe but the token ids: padding, an attention mask, labels of
-100 and the model's own loss.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, TrainerCallback

from recipe import finetune as finetune_module
from recipe.settings import load_settings

LORA = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
ROWS_PER_STEP = 8
ROWS_IN_ALL = 10  # a window of 8 and a short last one of 2


class CaptureGradients(TrainerCallback):
    """Keeps the accumulated gradient of each optimizer step, before clipping could matter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def stock_gradients(checkpoint: Path, rows: list, initial: dict[str, torch.Tensor]) -> list[dict]:
    """Gradient of stock code for each window of rows, padded on the right with eos."""
    base = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    model.load_state_dict(initial)
    steps = []
    for start in range(0, len(rows), ROWS_PER_STEP):
        window = rows[start : start + ROWS_PER_STEP]
        longest = max(len(row) for row in window)
        ids = torch.full((len(window), longest), base.config.eos_token_id)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(window):
            n = len(row)
            ids[i, :n] = torch.from_numpy(row.input_ids.astype("int64"))
            mask[i, :n] = 1
            labels[i, :n] = torch.where(torch.from_numpy(row.trained), ids[i, :n], -100)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return steps


def relative_difference(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == stock.keys()
    difference = torch.stack([(ours[n] - stock[n]).norm() for n in stock]).norm()
    return float(difference / torch.stack([stock[n].norm() for n in stock]).norm())


@pytest.fixture
def compare(write_config: Callable[..., Path], tiny_checkpoint: Path, monkeypatch):
    """Run the recipe with the given settings; return the relative difference of each step."""

    def run(
        checkpoint: Path | None = None,
        data: dict | None = None,
        model: dict | None = None,
        **training: object,
    ) -> list[float]:
        checkpoint = checkpoint or tiny_checkpoint
        config = write_config(
            model={"name_or_path": str(checkpoint), **(model or {})},
            lora=LORA,
            data={"rows": f"0:{ROWS_IN_ALL}", **(data or {})},
            training={
                "num_train_epochs": 1,
                "learning_rate": 1e-30,  # step 2 sees step 1's weights, so one oracle serves both
                "weight_decay": 0.0,
                "max_grad_norm": 0.0,
                "train_sampling_strategy": "sequential",
                **training,
            },
        )
        seen: dict[str, object] = {}
        build = finetune_module.build_trainer

        def keep(model, arguments, train, *rest, **named):
            seen["rows"] = train
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start, and then A would have no gradient
                    torch.nn.init.normal_(parameter, std=0.02)
            seen["initial"] = {k: v.clone() for k, v in model.state_dict().items()}
            return build(model, arguments, train, *rest, **named)

        monkeypatch.setattr(finetune_module, "build_trainer", keep)
        capture = CaptureGradients()
        finetune_module.finetune(load_settings(str(config)), watchers=[capture])
        stock = stock_gradients(checkpoint, seen["rows"], seen["initial"])
        assert len(capture.steps) == len(stock) == 2
        return [relative_difference(a, b) for a, b in zip(capture.steps, stock, strict=True)]

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_gradient_is_that_of_the_padded_whole(compare, batch, accumulation, checkpointing):
    differences = compare(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    assert max(differences) < 1e-6, differences


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_every_attention_keeps_rows_apart(compare, attn_implementation):
    differences = compare(
        model={"attn_implementation": attn_implementation},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert max(differences) < 1e-6, differences


def test_chat_template_trains_the_same_way(compare):
    differences = compare(
        data={"template": "chat"}, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert max(differences) < 1e-6, differences


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_starter_model_on_alpaca(compare, starter, alpaca, batch, accumulation, checkpointing):
    differences = compare(
        checkpoint=starter,
        data={"path": str(alpaca)},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    print(f"{batch}x{accumulation} checkpointing={checkpointing}: {differences}")
    assert max(differences) < 1e-6, differences
