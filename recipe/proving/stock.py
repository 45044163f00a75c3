"""The oracle: stock LlamaForCausalLM and peft on rows padded to the same length.

It shares nothing with the recipe but the token ids of the rows: padding on the right, an attention
mask, labels of -100 and the model's own loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from recipe.finetune import finetune
from recipe.model.quantization import keep_layout
from recipe.settings import Settings, plain

Gradients = dict[str, torch.Tensor]
_IGNORED = -100
# peft's own names of what starts at zero, so that A gets no gradient.
_ZERO_AT_START = ("lora_B", "lora_embedding_B")
_LIBRARY_SEED = 42  # TrainingArguments.seed


class CaptureGradients(TrainerCallback):
    """Keeps the accumulated gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.steps.append(gradients(model))


class StartAway(TrainerCallback):
    """Where the adapter starts, kept in ``adapter`` by the parameters' names.

    B starts at zero in LoRA, and then A has no gradient: here it starts small instead, and with
    PiSSA a little beside its start, which else could not be saved. A resumed run is left alone.
    torch's global random state is not touched.

    Args:
        adapter: the values to start from; without them those that the run has drawn.
        attention_dropout: False sets that of the checkpoint's config to 0.
    """

    def __init__(
        self, adapter: Mapping[str, torch.Tensor] | None = None, *, attention_dropout: bool = True
    ) -> None:
        self.adapter: Mapping[str, torch.Tensor] = adapter or {}
        self._attention_dropout = attention_dropout

    @torch.no_grad()
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if not self._attention_dropout:
            without_attention_dropout(model)
        if state.global_step:
            return
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name in self.adapter:
                parameter.copy_(self.adapter[name])
            elif any(one in name for one in _ZERO_AT_START):
                small = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.add_(small.to(parameter))
        self.adapter = adapter_values(model)


def adapter_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that is trained and of all LoRA tensors, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".lora_" in name
    }


def without_attention_dropout(model: torch.nn.Module) -> None:
    """Set ``attention_dropout``, which few checkpoints have, to 0 in all layers."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def gradients(model: torch.nn.Module) -> Gradients:
    """Copies of all gradients on the CPU, by the name the parameter has without a wrapper."""
    return {
        name.removeprefix("module."): p.grad.detach().cpu().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def recipe_gradients(
    settings: Settings,
) -> tuple[list[Gradients], Sequence[Any], Mapping[str, torch.Tensor]]:
    """Run the recipe's real training; return each step's gradient, the rows, the start."""
    start, capture, rows = StartAway(), CaptureGradients(), _KeepRows()
    finetune(settings, watchers=[start, rows, capture])
    return capture.steps, rows.rows, start.adapter


class _KeepRows(TrainerCallback):
    def __init__(self) -> None:
        self.rows: Sequence[Any] = ()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        self.rows = train_dataloader.dataset


def stock_base(
    settings: Settings, *, dtype: Any, attn_implementation: str = "sdpa"
) -> LlamaForCausalLM:
    """The checkpoint as stock code loads it, quantized where the settings say so."""
    model = settings.model
    quantization = plain(model.quantization)
    base = LlamaForCausalLM.from_pretrained(
        model.name_or_path,
        revision=model.revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
        use_safetensors=True,
        trust_remote_code=False,
    )
    base.config.use_cache = False
    keep_layout(base)  # a defect of bitsandbytes on some CPUs, and not what is compared
    without_attention_dropout(base)
    use_cpu = settings.training.get("use_cpu") or not torch.accelerator.is_available()
    return base if quantization or use_cpu else base.to(torch.accelerator.current_accelerator())


def stock_model(
    settings: Settings,
    adapter: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> PeftModel:
    """peft on the stock base, with the values of ``adapter``."""
    base = stock_base(settings, dtype=torch.float32, attn_implementation=attn_implementation)
    # PiSSA with niter draws at random what it takes out of the base.
    torch.manual_seed(settings.training.get("seed", _LIBRARY_SEED))
    lora = LoraConfig(**{"task_type": "CAUSAL_LM", **plain(settings.lora)})
    model = get_peft_model(base, lora).train()
    model.load_state_dict(adapter, strict=False)
    return model if dtype == torch.float32 else model.to(dtype)


def stock_gradients(
    settings: Settings,
    rows: Sequence[Any],
    adapter: Mapping[str, torch.Tensor],
    *,
    rows_per_step: int,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    own_loss: bool = False,
) -> list[Gradients]:
    """Gradient of stock code for each window of rows, at the adapter's initial values; see
    ``window_gradients``.
    """
    model = stock_model(settings, adapter, dtype=dtype, attn_implementation=attn_implementation)
    return window_gradients(model, rows, rows_per_step=rows_per_step, own_loss=own_loss)


def window_gradients(
    model: PeftModel, rows: Sequence[Any], *, rows_per_step: int, own_loss: bool = False
) -> list[Gradients]:
    """Of the stock model's mean loss, for each window of padded rows.

    Args:
        own_loss: take the model's own, which is float32 even of a float64 model, in place of
            torch's in float64 of its logits. ``make bench-exactness`` shows what that costs.
    """
    windows = [rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step)]
    steps = []
    for window in windows:
        model.zero_grad()
        batch = padded(window, _pad(model), device=model.device)
        loss = model(**batch).loss if own_loss else _token_losses(model, batch).mean()
        torch.autograd.backward(loss)
        steps.append(gradients(model))
    model.zero_grad()
    return steps


def stock_nll(model: PeftModel, rows: Sequence[Any]) -> torch.Tensor:
    """Negative log-likelihood in nats of each trained token of padded rows, row by row, in
    float64 (tokens,) on the CPU.
    """
    with torch.no_grad():
        batch = padded(rows, _pad(model), device=model.device)
        return _token_losses(model, batch).cpu()


def _token_losses(model: PeftModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    trained = labels != _IGNORED
    return F.cross_entropy(logits[trained].double(), labels[trained], reduction="none")


def _pad(model: PeftModel) -> int:
    pad = model.config.eos_token_id
    return int(pad[0] if isinstance(pad, list) else pad or 0)


def padded(rows: Sequence[Any], pad: int, *, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """A padded batch: input_ids, attention_mask and labels, each int64 (rows, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for i, row in enumerate(rows):
        n = len(row)
        ids[i, :n] = torch.from_numpy(row.input_ids.astype("int64"))
        labels[i, :n] = torch.where(torch.from_numpy(row.trained), ids[i, :n], _IGNORED)
        mask[i, :n] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def relative_difference(ours: Gradients, stock: Gradients) -> float:
    """||ours - stock|| / ||stock|| over all parameters that have a gradient, in float64."""
    assert ours.keys() == stock.keys()
    difference = torch.stack([(ours[n].double() - stock[n].double()).norm() for n in stock]).norm()
    return float(difference / torch.stack([stock[n].double().norm() for n in stock]).norm())
