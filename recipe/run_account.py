"""What a run says of itself: on the screen, in ``manifest.json`` and in ``recipe.json``."""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

import recipe
from recipe.data.batch import LAYOUT
from recipe.data.fingerprint import template_sha256, tokenizer_sha256
from recipe.memory.probe import in_words, peak_memory
from recipe.model.checkpoint import generation_config_notes
from recipe.model.fingerprint import computing_config
from recipe.model.lora import dtype_plan, total_parameters, trainable_parameters
from recipe.model.quantization import bytes_by_kind
from recipe.run_data import Data, left_out, share_openings, summary
from recipe.settings import Settings, plain
from recipe.sharing.probes import Probe
from recipe.training.arguments import world_size
from recipe.training.engine import asked_engine
from recipe.training.faults import launch
from recipe.training.machine import device_name, idle_threads
from recipe.training.run_log import RunLog


@dataclass(frozen=True)
class Run:
    """Everything that was decided before the first step."""

    settings: Settings
    arguments: TrainingArguments
    data: Data
    model: PeftModel
    base_sha256: str

    @property
    def dtypes(self) -> dict[str, str]:
        """Which dtype holds base, adapter and computation."""
        return dtype_plan(self.model, fp16=self.arguments.fp16, bf16=self.arguments.bf16)


def introduction(run: Run, folder: Path | None) -> list[str]:
    """Lines for the screen before the first step; ``folder`` is None when nothing is written."""
    settings, arguments, data = run.settings, run.arguments, run.data
    total, trainable = total_parameters(run.model), trainable_parameters(run.model)
    lora = run.model.peft_config["default"]
    batch, accumulation = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    processes = arguments.world_size
    threads = idle_threads(arguments)
    return [
        f"run       {settings.name} → {folder or 'no folder (--check)'} · {device_name(arguments)}",
        *([f"          {threads}"] if threads else []),
        f"base      {settings.model.name_or_path} · {total:,} parameters in {run.dtypes['base']}",
        *_quantized(run),
        *(f"          {note}" for note in generation_config_notes(settings.model)),
        f"adapter   LoRA r={lora.r} alpha={lora.lora_alpha} dropout={lora.lora_dropout} · "
        f"{trainable:,} trainable of {total + trainable:,} in {run.dtypes['adapter']} · "
        f"compute {run.dtypes['compute']}",
        summary(settings, data),
        *left_out(data),
        f"step      {batch * accumulation * processes} rows = {batch} × {accumulation} accumulated "
        f"× {processes} process{f'es, {asked_engine().name}' if processes > 1 else ''}",
    ]


def _quantized(run: Run) -> list[str]:
    """What a base in 4 or 8 bit takes, and what of it stays whole."""
    if run.settings.model.quantization is None:
        return []
    counted = bytes_by_kind(run.model)
    listed = ", ".join(f"{n / 2**20:,.1f} {kind}" for kind, n in counted.items())
    return [f"          MiB of it: {sum(counted.values()) / 2**20:,.1f} = {listed}"]


def conclusion(
    run: Run,
    log: RunLog,
    folder: Path,
    *,
    before: float | None,
    after: float | None,
    seconds: float,
    memory: Sequence[str] = (),
) -> list[str]:
    """Lines for the screen after the adapter was saved; perplexities are None without rows.

    Args:
        memory: lines on what was forecast of it.
    """
    losses = log.epoch_losses
    result = f"training loss {losses[0]:.3f}"
    if len(losses) > 1:
        result += f" → {losses[-1]:.3f}"
    if before is not None and after is not None:
        result = f"held-out perplexity {before:.2f} → {after:.2f} · {result}"
    return [
        f"result    {result}",
        f"cost      {seconds:.0f} s in all, {log.seconds:.0f} s of them training · peak memory "
        f"{in_words(peak_memory())} · {log.skipped_steps} skipped steps",
        *memory,
        _not_computed(**log.token_counts(run.arguments.device)),
        f"saved     {folder / 'adapter'} (reopened: whole, finite, as trained)",
        f"          {folder / 'loss.png'}, {folder / 'metrics.jsonl'}",
        'next      make infer PROMPT="…"  asks it; ADAPTER=none asks the base',
        "          make compare  tells whether it learned, memorised or forgot",
        "          make verify  checks it; make push REPO=user/name  publishes it",
        f"          {_again(folder / 'settings.yaml')}  repeats this run",
    ]


def _again(settings: Path) -> str:
    if world_size() == 1:
        return f"make train CONFIG={settings}"
    return shlex.join([*launch(), "recipe/train.py", "--config", str(settings)])


def manifest_facts(run: Run) -> dict[str, Any]:
    """What the run was made of, beside the versions that every manifest has."""
    data = run.data
    return {
        "device": device_name(run.arguments),
        "engine": asked_engine().name,
        "base": run.settings.model.name_or_path,
        "base_sha256": run.base_sha256,
        "dtypes": run.dtypes,
        "base_bytes": dict(bytes_by_kind(run.model)),
        "parameters": {
            "base": total_parameters(run.model),
            "trainable": trainable_parameters(run.model),
        },
        "data": {
            "sha256": data.rows.sha256,
            "tokens_sha256": data.tokens_sha256,
            "rows": len(data.train.rows),
            "held_out": len(data.held_out.rows),
            "tokens": data.train.tokens,
            "trained_tokens": data.train.trained_tokens,
            "format": data.rows.format,
            "template": data.template.name,
            "dropped_empty": data.rows.empty,
            "dropped_overlap": data.rows.overlap,
            "repeated": data.rows.repeated,
            "share_openings": share_openings(run.settings),
            "layout": LAYOUT,
            "dropped_long": data.train.dropped + data.held_out.dropped,
            "truncated": data.train.truncated + data.held_out.truncated,
        },
        "initial_adapter_sha256": _adapter_sha256(run.model),
    }


def receipt(run: Run, folder: Path, probes: Sequence[Probe]) -> dict[str, Any]:
    """The fields of ``recipe.json`` that the run knows; see ``recipe.sharing.receipt``."""
    model = run.settings.model
    commit = run.model.peft_config["default"].revision
    return {
        "recipe": recipe.__version__,
        "base": {
            "name_or_path": model.name_or_path,
            "revision": commit or model.revision,
            "dtype": model.dtype,
            "quantization": plain(model.quantization),
        },
        "template": run.data.template.name,
        "trainable_parameters": trainable_parameters(run.model),
        "data_sha256": run.data.rows.sha256,
        "manifest_sha256": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "proof": {
            "base_sha256": run.base_sha256,
            "config": computing_config(run.model.config),
            "tokenizer_sha256": tokenizer_sha256(run.data.tokenizer),
            "template_sha256": template_sha256(run.data.template),
            "probes": [probe.model_dump() for probe in probes],
        },
    }


def _not_computed(*, computed_tokens: int, shared_tokens: int, ending_tokens: int) -> str:
    left_out = shared_tokens + ending_tokens
    openings = f"{shared_tokens:,} of shared openings, " if shared_tokens else ""
    return (
        f"          {left_out:,} of {computed_tokens + left_out:,} tokens not computed: {openings}"
        f"{ending_tokens:,} at the ends of rows, which predict nothing"
    )


def _adapter_sha256(model: PeftModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
