"""The oracle: gradients of stock LlamaForCausalLM and peft on the padded whole.

It shares nothing with the recipe but the token ids of the rows: padding on the right, an attention
mask, labels of -100 and the model's own loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, TrainerCallback

from recipe import finetune as finetune_module
from recipe.settings import Settings, plain

Gradients = dict[str, torch.Tensor]


class CaptureGradients(TrainerCallback):
    """Keeps the accumulated gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append(gradients(model))


def gradients(model: torch.nn.Module) -> Gradients:
    """Copies of all gradients in float64, by the name the parameter has without a wrapper."""
    return {
        name.removeprefix("module."): p.grad.detach().cpu().double()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def recipe_gradients(settings: Settings) -> tuple[list[Gradients], list[Any], dict[str, Any]]:
    """Run the recipe's real training; return each step's gradient, the rows, the initial adapter.

    B starts at zero in LoRA, and then A has no gradient: here it starts small instead.
    """
    seen: dict[str, Any] = {}
    build = finetune_module.build_trainer

    def perturb_and_keep(model, arguments, train, *rest, **named):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        seen["rows"] = train
        seen["adapter"] = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        return build(model, arguments, train, *rest, **named)

    capture = CaptureGradients()
    with mock.patch.object(finetune_module, "build_trainer", perturb_and_keep):
        finetune_module.finetune(settings, watchers=[capture])
    return capture.steps, seen["rows"], seen["adapter"]


def stock_gradients(
    settings: Settings,
    rows: Sequence[Any],
    adapter: Mapping[str, torch.Tensor],
    *,
    rows_per_step: int,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> list[Gradients]:
    """Gradient of stock code for each window of rows, at the adapter's initial values."""
    base = LlamaForCausalLM.from_pretrained(
        settings.model.name_or_path, dtype=torch.float32, attn_implementation=attn_implementation
    )
    lora = LoraConfig(task_type="CAUSAL_LM", **plain(settings.lora))
    model = get_peft_model(base, lora).train()
    model.load_state_dict(adapter, strict=False)
    model.to(dtype)
    windows = [rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step)]
    steps = []
    for window in windows:
        model.zero_grad()
        model(**padded(window, base.config.eos_token_id)).loss.backward()
        steps.append(gradients(model))
    return steps


def padded(rows: Sequence[Any], pad: int) -> dict[str, torch.Tensor]:
    """A padded batch: input_ids, attention_mask and labels, each (rows, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row)
        ids[i, :n] = torch.from_numpy(row.input_ids.astype("int64"))
        labels[i, :n] = torch.where(torch.from_numpy(row.trained), ids[i, :n], -100)
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def relative_difference(ours: Gradients, stock: Gradients) -> float:
    """||ours - stock|| / ||stock|| over all parameters that have a gradient."""
    assert ours.keys() == stock.keys()
    difference = torch.stack([(ours[n] - stock[n]).norm() for n in stock]).norm()
    return float(difference / torch.stack([stock[n].norm() for n in stock]).norm())
