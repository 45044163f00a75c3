"""The model card: what an adapter is, from its receipt and its run, in the hub's own metadata."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from recipe.data.templates import ALPACA_WITHOUT_INPUT
from recipe.settings import is_repo_id
from recipe.sharing.receipt import Receipt

PICTURE = "loss.png"
_SHOWN = 600


@dataclass(frozen=True)
class Sample:
    """One prompt, and what base and tuned model answer to it."""

    prompt: str
    base: str
    tuned: str


@dataclass(frozen=True)
class RunFacts:
    """What the folder of a run says; empty for an adapter that lies elsewhere."""

    settings: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    picture: Path | None = None


def read_run(run: Path, manifest_sha256: str | None) -> RunFacts:
    """What the folder around an adapter says of its run, if it is the one that made it."""
    manifest = run / "manifest.json"
    if not manifest.is_file():
        return RunFacts()
    if hashlib.sha256(manifest.read_bytes()).hexdigest() != manifest_sha256:
        return RunFacts()
    try:
        metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        return RunFacts(
            settings=yaml.safe_load((run / "settings.yaml").read_text()),
            manifest=json.loads(manifest.read_text()),
            metrics=metrics,
            picture=run / PICTURE if (run / PICTURE).is_file() else None,
        )
    except (OSError, ValueError, yaml.YAMLError):
        return RunFacts()


@dataclass(frozen=True)
class Card:
    """Everything that goes into ``README.md``; ``base_model`` is None for a base without hub id."""

    repo_id: str
    receipt: Receipt
    run: RunFacts
    samples: Sequence[Sample]
    license: str | None
    base_model: str | None

    def text(self) -> str:
        """Metadata in front, then the parts that there is something to say for."""
        parts = [
            f"---\n{self.metadata().to_yaml(line_break=chr(10))}\n---\n",
            f"# {self.repo_id.partition('/')[2]}\n",
            self._introduction(),
            self._use(),
            self._measured(),
            self._samples(),
            self._settings(),
            self._check(),
            self._limits(),
        ]
        return "\n".join(part for part in parts if part)

    def metadata(self) -> ModelCardData:
        """The hub's own fields."""
        dataset = self._dataset()
        return ModelCardData(
            base_model=self.base_model,
            datasets=[dataset] if dataset else None,
            library_name="peft",
            license=self.license,
            pipeline_tag="text-generation",
            tags=["lora", "transformers", *(["sft"] if self.run.manifest else [])],
            model_name=self.repo_id.partition("/")[2],
            eval_results=self._eval_results() or None,
            base_model_relation="adapter" if self.base_model else None,
            ignore_metadata_errors=False,
        )

    def _dataset(self) -> str | None:
        """The hub id of the rows; a local file is nobody else's business."""
        path = str((self.run.settings.get("data") or {}).get("path", ""))
        is_file = Path(path).suffix.lower() in (".json", ".jsonl", ".csv", ".parquet")
        return path if is_repo_id(path) and not is_file and not os.path.exists(path) else None  # noqa: PTH110

    def _eval_results(self) -> list[EvalResult]:
        evaluated = [m for m in self.run.metrics if "eval_perplexity" in m]
        if not evaluated:
            return []
        held_out = (self.run.settings.get("data") or {}).get("held_out")
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=self._dataset() or "local",
                dataset_name=f"held-out rows {held_out}",
                metric_type=kind,
                metric_name=name,
                metric_value=round(evaluated[-1][key], 4),
            )
            for kind, name, key in (
                ("perplexity", "held-out perplexity", "eval_perplexity"),
                ("loss", "held-out loss, nats a token", "eval_loss"),
            )
        ]

    def _introduction(self) -> str:
        lora = self.receipt.proof.lora if self.receipt.proof else {}
        base = self.base_model or f"`{_inline(self.receipt.base.name_or_path)}`"
        targets = lora.get("target_modules")
        named = _inline(targets if isinstance(targets, str) else ", ".join(targets or []))
        count = self.receipt.trainable_parameters
        size = f" {count:,} parameters." if count else ""
        parts = self.receipt.combined
        made = f"Combined from {len(parts)} adapters. " if parts else ""
        return (
            f"A LoRA adapter (r={_inline(lora.get('r'))}, alpha={_inline(lora.get('lora_alpha'))}, "
            f"on {named}) for {base}.{size} {made}\n"
        )

    def _use(self) -> str:
        base = self.base_model or _inline(self.receipt.base.name_or_path)
        revision = _inline(self.receipt.base.revision or "")
        pinned = f', revision="{revision}"' if revision and self.base_model else ""
        return (
            "## Use\n\n```python\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{base}"{pinned})\n'
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{pinned})\n'
            f'model = PeftModel.from_pretrained(base, "{self.repo_id}")\n```\n' + self._prompt()
        )

    def _prompt(self) -> str:
        """What stands around a prompt; a model that is asked otherwise answers otherwise."""
        if self.receipt.template == "chat":
            return "\nPrompts are written by `tokenizer.apply_chat_template`.\n"
        if self.receipt.template == "raw":
            return "\nPrompts are written as they are.\n"
        return f"\nPrompts are written so:\n\n```\n{ALPACA_WITHOUT_INPUT}```\n"

    def _measured(self) -> str:
        epochs = [m for m in self.run.metrics if "epoch_loss" in m]
        evaluated = [m["eval_perplexity"] for m in self.run.metrics if "eval_perplexity" in m]
        lines = []
        if epochs:
            losses = ", ".join(f"{m['epoch_loss']:.3f}" for m in epochs)
            seconds = sum(m["epoch_seconds"] for m in epochs)
            lines.append(f"| training loss of each epoch | {losses} |")
            lines.append(f"| training time | {seconds:.0f} s on {self.run.manifest['device']} |")
            for place, size in (epochs[-1].get("peak_memory_bytes") or {}).items():
                lines.append(f"| peak memory, {place} | {size / 2**30:.2f} GiB |")
        if evaluated:
            path = " → ".join(f"{value:.2f}" for value in (evaluated[0], evaluated[-1]))
            lines.append(f"| held-out perplexity, before → after | {path} |")
        data = self.run.manifest.get("data") or {}
        if data:
            lines.append(
                f"| rows | {data['rows']} trained, {data['held_out']} held out; "
                f"{data['trained_tokens']:,} trained tokens |"
            )
        if not lines:
            return ""
        picture = f"\n![Loss by step]({PICTURE})\n" if self.run.picture else ""
        return "\n".join(["## Measured\n", "| | |", "|---|---|", *lines, picture])

    def _samples(self) -> str:
        blocks = [
            f"**{_quoted(one.prompt)}**\n\n| base | tuned |\n|---|---|\n"
            f"| {_cell(one.base)} | {_cell(one.tuned)} |\n"
            for one in self.samples
        ]
        return "\n".join(["## Answers, greedy, not selected\n", *blocks]) if blocks else ""

    def _settings(self) -> str:
        kept: dict[str, Any] = {
            k: self.run.settings[k] for k in ("lora", "training") if k in self.run.settings
        }
        data = self.run.settings.get("data") or {}
        if not kept:
            return ""
        # Paths of the machine that trained are left out; the rows are named where they are public.
        shown = {key: value for key, value in data.items() if key != "path" or self._dataset()}
        kept["data"] = shown
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        return f"## Settings\n\n```yaml\n{text}```\n"

    def _check(self) -> str:
        if self.receipt.proof is None:
            return ""
        versions = ", ".join(f"{name} {number}" for name, number in self.receipt.versions.items())
        return (
            "## Check it\n\n`recipe.json` holds the sha256 of the base's weights "
            f"(`{self.receipt.proof.base_sha256[:16]}…`), of tokenizer and template, and the "
            f"logits of {len(self.receipt.proof.probes)} prompts under base and tuned model. "
            f"`python recipe/adapter.py verify {self.repo_id}` compares them on your machine. "
            f"Trained with {_inline(versions)}.\n"
        )

    def _limits(self) -> str:
        return (
            "## Limits\n\nIt has what its base has: errors, bias, and a licence that holds for "
            "this adapter too. What it learned is what its rows show; nothing beyond the figures "
            "above has been evaluated.\n"
        )


def _quoted(text: str) -> str:
    return " ".join(_escaped(text).split())


def _cell(text: str) -> str:
    cut = text.strip() if len(text) <= _SHOWN else text[:_SHOWN].strip() + "…"
    return _escaped(cut).replace("\n", "<br>") or "*(nothing)*"


def _inline(text: object) -> str:
    """Of a receipt, which is data: on one line, and it cannot end the code that it stands in."""
    return "".join(x for x in str(text) if x.isprintable() and x not in '`"<>')[:200]


def _escaped(text: str) -> str:
    """What a model wrote is text: no markup of it may act on the page, or on a terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(x if x.isprintable() or x == "\n" else " " for x in text)
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, entity)
    for mark in "\\`*_[]!#|~$":
        text = text.replace(mark, f"\\{mark}")
    return text
