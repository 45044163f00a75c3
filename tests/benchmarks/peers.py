"""One subject of ``tests.benchmarks.speed``, in a process of its own.

    python -m tests.benchmarks.peers trainer config.yaml result.json

Every subject takes model, rows, LoRA and training from the one config, gets its rows from the
recipe's data room, so ids and trained masks are the very same, and is watched by the one callback.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.quiet import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
import yaml  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from recipe.data.tokens import TokenizedRow  # noqa: E402
from recipe.finetune import finetune  # noqa: E402
from recipe.memory.probe import peak_memory  # noqa: E402
from recipe.model.checkpoint import load_config  # noqa: E402
from recipe.run_data import Data, load_data  # noqa: E402
from recipe.settings import Settings, load_settings, plain  # noqa: E402

IGNORED = -100
PRODUCTS = 5  # timed at least for each shape and direction, one more to warm up
PRODUCTS_SECONDS = 1.0  # or as many as take that long
WARM_UP = 1  # steps of the growth mode that do not count
COUNTED = 2
GROUPED = {"train_sampling_strategy": "group_by_length"}
# TRL at its best without flash attention: its packing and padding_free need it to part rows.
TRL = {
    **GROUPED,
    "gradient_checkpointing": False,  # on by default in TRL, and a third more work
    "bf16": False,  # on by default in TRL; the dtype is the base's, as for all
    "packing": False,
    "max_length": None,
    "completion_only_loss": True,
}


class Watch(TrainerCallback):
    """Seconds between on_train_begin and on_train_end, peak memory then, and what the model saw.

    The peak is read when training ends and not when the process does: the recipe checks and saves
    after that, which a peer does not.
    """

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}
        self.adapter: dict[str, torch.Tensor] = {}
        self.began: list[float] = []  # each step
        self._seen: list[tuple[Any, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._hook = named["model"].register_forward_pre_hook(self._count, with_kwargs=True)
        self.report["bytes_before"] = peak_bytes()
        self._started = now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        # The loss is logged each step, which waits for the GPU: no further wait is added here.
        self.began.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        ended = now()
        self._hook.remove()
        self.began.append(ended)
        losses = [record["loss"] for record in state.log_history if "loss" in record]
        seen, trained = (
            sum(int(count) for count in kind) for kind in zip(*self._seen, strict=True)
        )
        self.adapter = {k: v.cpu() for k, v in get_peft_model_state_dict(named["model"]).items()}
        self.report |= {
            "seconds": ended - self._started,
            "bytes": peak_bytes(),
            "steps": state.global_step,
            "tokens_seen": seen,
            "trained_seen": trained,
            "last_quarter_loss": statistics.fmean(losses[-max(len(losses) // 4, 1) :]),
        }

    def _count(self, module: Any, args: Any, named: dict[str, Any]) -> None:
        mask, labels = named.get("attention_mask"), named.get("shift_labels")
        if labels is None:
            labels = named["labels"][:, 1:]
        # Summed when training has ended: a number taken here would make the GPU wait.
        # An opening that rows share counts for each of them, and what predicts nothing as well.
        seen = named["input_ids"].numel() if mask is None else mask.sum()
        seen = seen + sum(named.get("openings", ())) + sum(named.get("endings", ()))
        self._seen.append((seen, (labels != IGNORED).sum()))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    return next(iter(peak_memory().values()))


def recipe(settings: Settings, data: Data, watch: Watch) -> None:
    """What ``recipe/train.py`` calls, nothing left out; the data is read once more within."""
    finetune(settings, watchers=[watch])


def trainer(settings: Settings, data: Data, watch: Watch, **more: Any) -> None:
    """The plain way: padded batches, -100 on prompts, the model's own loss."""
    tokenizer = data.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": row.input_ids.tolist(), "labels": labels(row)} for row in data.train.rows]
    Trainer(
        model=stock_model(settings),
        args=TrainingArguments(disable_tqdm=True, **{**plain(settings.training), **more}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        callbacks=[watch],
    ).train()


def trainer_grouped(settings: Settings, data: Data, watch: Watch) -> None:
    trainer(settings, data, watch, **GROUPED)


def trl(settings: Settings, data: Data, watch: Watch) -> None:
    """SFTTrainer on rows that are tokenised already, which it takes as they are."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": row.input_ids.tolist(), "completion_mask": row.trained.astype(int).tolist()}
        for row in data.train.rows
    ]
    SFTTrainer(
        model=stock_model(settings),
        args=SFTConfig(disable_tqdm=True, **{**plain(settings.training), **TRL}),
        train_dataset=Dataset.from_list(rows),
        processing_class=data.tokenizer,
        callbacks=[watch],
    ).train()


def labels(row: TokenizedRow) -> list[int]:
    pairs = zip(row.input_ids.tolist(), row.trained.tolist(), strict=True)
    return [token if trained else IGNORED for token, trained in pairs]


def stock_model(settings: Settings) -> PeftModel:
    """A fresh adapter on the base, both as the libraries make them."""
    set_seed(settings.training["seed"])
    path, dtype = settings.model.name_or_path, settings.model.dtype
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **plain(settings.lora)))


def loss_after(settings: Settings, data: Data, adapter: dict[str, torch.Tensor]) -> float:
    """Nats a trained token of ``data``, with the trained adapter on a fresh stock base: the same
    rows, one at a time, the same code and no dropout for all.
    """
    model = stock_model(settings).eval()
    set_peft_model_state_dict(model, adapter)
    if torch.cuda.is_available():
        model.cuda()
    nll, count = 0.0, 0
    for row in data.train.rows:
        ids = torch.from_numpy(row.input_ids).long()[None].to(model.device)
        targets = torch.tensor(labels(row)[1:], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != IGNORED).sum())
    return nll / count


def train(subject: Callable[..., None], settings: Settings, judged: str) -> dict[str, Any]:
    data, watch = load_data(settings), Watch()
    rows = settings.data.model_copy(update={"rows": judged})
    held_out = load_data(settings.model_copy(update={"data": rows}))
    subject(settings, data, watch)
    return {
        **watch.report,
        **where(),
        "rows": len(data.train.rows),
        "tokens": data.train.tokens,
        # A row's first token has nothing before it that could predict it.
        "trained": sum(int(row.trained[1:].sum()) for row in data.train.rows),
        "tokens_sha256": data.tokens_sha256,
        "loss": loss_after(settings, held_out, watch.adapter),
    }


def where() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    return {"device": device, "threads": torch.get_num_threads()}


def bound(settings: Settings) -> dict[str, Any]:
    """FLOP/s of plain matrix products in the shapes of this model, forward and backward.

    Each shape counts as often as the model has it: the rate is all FLOPs over all seconds.
    """
    data, config = load_data(settings), load_config(settings.model)
    batch = settings.training["per_device_train_batch_size"]
    tokens = round(data.train.tokens / len(data.train.rows) * min(batch, len(data.train.rows)))
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads
    shapes = [
        (heads, hidden, layers),
        (kv * config.head_dim, hidden, 2 * layers),
        (hidden, heads, layers),
        (inner, hidden, 2 * layers),
        (hidden, inner, layers),
        (config.vocab_size, hidden, 1),
    ]
    seconds = sum(times * product_seconds(settings, tokens, a, b) for a, b, times in shapes)
    weights = sum(a * b * times for a, b, times in shapes)
    rate = 4 * weights * tokens / seconds
    return {**where(), "flops": rate, "weights": weights, "tokens_per_second": rate / 4 / weights}


def product_seconds(settings: Settings, tokens: int, outputs: int, inputs: int) -> float:
    """Of one weight: there, and back to what went in; the median of several.

    Written into memory that is there already: fresh pages would be timed as well.
    """
    dtype = getattr(torch, str(settings.model.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    gradient = torch.randn(tokens, outputs, dtype=dtype, device=device)
    output, back = torch.empty_like(gradient), torch.empty_like(x)
    found: list[float] = []
    while len(found) <= PRODUCTS or sum(found[1:]) < PRODUCTS_SECONDS:
        started = now()
        torch.mm(x, weight.T, out=output)
        torch.mm(gradient, weight, out=back)
        found.append(now() - started)
    return statistics.median(found[1:])


def growth(settings: Settings, tokens: int, folder: Path) -> dict[str, Any]:
    """Steps of one micro-batch of about ``tokens`` tokens, through the real run.

    Rows are taken in order, and again, as long as one fits.
    """
    data, source = load_data(settings), json.loads(Path(settings.data.path).read_text())
    filled: list[Any] = []
    left, fits = tokens, True
    while fits:
        fits = False
        for row in data.train.rows:
            if len(row) <= left:
                filled.append(source[row.index])
                left, fits = left - len(row), True
    config = {
        "model": settings.model.model_dump(),
        "lora": plain(settings.lora),
        "data": {**settings.data.model_dump(), "path": str(folder / "filled.json"), "rows": None},
        "training": {
            **plain(settings.training),
            "max_steps": WARM_UP + COUNTED,
            "per_device_train_batch_size": len(filled),
        },
    }
    (folder / "filled.json").write_text(json.dumps(filled))
    (folder / "growth.yaml").write_text(yaml.safe_dump(config))
    watch = Watch()
    finetune(load_settings(str(folder / "growth.yaml")), watchers=[watch])
    if watch.report["tokens_seen"] != watch.report["steps"] * (tokens - left):
        raise AssertionError(
            f"{watch.report['tokens_seen']} tokens seen in {WARM_UP + COUNTED} steps"
        )
    steps = [b - a for a, b in zip(watch.began, watch.began[1:], strict=False)]
    seconds = statistics.fmean(steps[WARM_UP:])
    told = {"tokens": tokens - left, "rows": len(filled), "step_seconds": seconds}
    return {**watch.report, **where(), **told}


SUBJECTS: dict[str, Callable[..., None]] = {
    "recipe": recipe,
    "recipe, shared openings": recipe,
    "trainer": trainer,
    "trainer, length grouped": trainer_grouped,
    "trl": trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=[*SUBJECTS, "bound", "growth"])
    parser.add_argument("config", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch, for growth")
    parser.add_argument("--judged", default="200:300", help="rows for the loss after training")
    args = parser.parse_args()
    settings = load_settings(str(args.config))
    if args.subject == "bound":
        result = bound(settings)
    elif args.subject == "growth":
        result = growth(settings, args.tokens, args.result.parent)
    else:
        result = train(SUBJECTS[args.subject], settings, args.judged)
    args.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
