"""How quick training is on a GPU in the shape of Llama-2-7B, against stock Trainer and TRL.

    make bench-gpu ARGS="--arms bf16 fp16-ckpt --subjects recipe trainer --json gpu.json"
    make bench-gpu ARGS="--shape tiny --device cpu"         a rehearsal, whose numbers say nothing

Weights are random and drawn on the device; rows are ids of a fixed seed, about as long as Alpaca's.
LoRA and batch are those of configs/lora_alpaca.yaml. An arm is a dtype, of the weights and of
autocast (fp16 with its scaler; NF4 computes in bf16), and "-ckpt" is with checkpointing. Each
subject of each arm has a process of its own; all see the same rows in the same order.

Speed is in tokens of the rows, padding not counted, shared openings and the ends of rows in full.
MFU is against a large matrix product in the arm's dtype, timed in the same process before. A token
is worth 4 FLOP for each weight of a matrix product, the head's included and the embedding table's
not: 2 forward, 2 back to the inputs, since frozen weights need no gradient. Not counted are
attention's scores and the 2 FLOP a weight that checkpointing computes again. Whoever leaves out the
head where nothing is trained, or the ends of rows, or computes an opening once, is credited as if
it had done all.

recipe/settings needs pydantic and PyYAML; trl-liger also datasets, trl and liger_kernel.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

NEEDED = "torch transformers accelerate peft numpy safetensors tqdm pydantic annotated_types yaml"
MISSING = [name for name in NEEDED.split() if find_spec(name) is None]
if MISSING:
    print(f"gpu_speed needs packages that are not here: {', '.join(MISSING)}", file=sys.stderr)
    sys.exit(2)

from recipe.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from recipe.data.batch import IGNORED  # noqa: E402
from recipe.data.tokens import TokenizedRow  # noqa: E402
from recipe.memory.probe import peak_memory  # noqa: E402
from recipe.model import attention  # noqa: E402
from recipe.model.lora import add_lora  # noqa: E402
from recipe.model.quantization import keep_layout  # noqa: E402
from recipe.training.arguments import autocast_dtype  # noqa: E402
from recipe.training.build import build_trainer  # noqa: E402
from recipe.training.head import OutputHead  # noqa: E402
from recipe.training.loss import TokenLoss  # noqa: E402
from recipe.training.run_log import RunLog  # noqa: E402

HOME = Path(__file__).parents[2]
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers"]
SIZES += ["num_attention_heads", "vocab_size"]
SHAPES = {"llama-2-7b": (4096, 11008, 32, 32, 32000), "tiny": (64, 172, 2, 4, 512)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "nf4": torch.bfloat16}
ARMS = [f"{dtype}{checkpointing}" for dtype in DTYPES for checkpointing in ("", "-ckpt")]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
MICRO_BATCH, ACCUMULATION = 8, 4
ROWS_A_STEP = MICRO_BATCH * ACCUMULATION
OPENING = 29  # tokens that Alpaca's prompts begin with in common
SEED = 0
PRODUCT = {"cuda": 8192, "cpu": 512}  # rows and columns of the matrix product
Args = argparse.Namespace
Rows = Sequence[TokenizedRow]
Result = dict[str, Any]


class StepEnds(TrainerCallback):
    """When each step ended. Its loss is logged, which waits for the device anyhow."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(now(args.device.type))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def synthetic_rows(args: Args) -> list[TokenizedRow]:
    """All rows of a run, in the order they are trained in; the first ids of each are the same."""
    generator = np.random.default_rng(SEED)
    vocabulary = SHAPES[args.shape][-1]
    often = 1 / np.arange(13, vocabulary + 10)  # some ids are often there, as words are
    often /= often.sum()

    def ids(count: int) -> Any:
        return generator.choice(vocabulary - 3, size=count, p=often).astype(np.int32) + 3

    opening, rows = ids(OPENING), []
    for index in range(ROWS_A_STEP * (args.warm_up + args.steps)):
        own, answer = np.clip(generator.lognormal([2.9, 3.55], [0.7, 0.95]).round(), 1, 512)
        prompt, answer = OPENING + int(own), int(answer)
        if args.row_tokens:
            prompt, answer = args.row_tokens // 2, args.row_tokens - args.row_tokens // 2
        shared = opening[:prompt]
        whole = np.concatenate([shared, ids(prompt - len(shared) + answer)])
        rows.append(TokenizedRow(index, whole, np.arange(len(whole)) >= prompt))
    return rows


def base_model(args: Args, attn: str) -> PreTrainedModel:
    """Random weights, drawn on the device in the arm's dtype."""
    sizes = dict(zip(SIZES, SHAPES[args.shape], strict=True))
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=4096, use_cache=False)
    transformers.set_seed(SEED)
    make = transformers.AutoModelForCausalLM.from_config
    with torch.device(args.device):
        base = make(config, dtype=args.dtype, attn_implementation=attn)
    if "nf4" in args.arm:
        quantize(base, args.dtype, args.device)
    return base


def quantize(base: PreTrainedModel, dtype: torch.dtype, device: str) -> None:
    """NF4 in place, all but the head, as from_pretrained makes it of a file; here is no file."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(base.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            sizes, kind = (linear.in_features, linear.out_features), {"quant_type": "nf4"}
            made = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta", **kind)
            made.weight = Params4bit(linear.weight.data, requires_grad=False, **kind).to(device)
            base.set_submodule(name, made)
    base.is_loaded_in_4bit = True
    keep_layout(base)


def arguments(args: Args, **more: Any) -> Result:
    """Of TrainingArguments; the same for all."""
    return {
        **{"output_dir": str(args.result.parent), "max_steps": args.warm_up + args.steps},
        **{"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION},
        **{"bf16": args.dtype == torch.bfloat16, "fp16": args.dtype == torch.float16},
        **{"use_cpu": args.device == "cpu", "dataloader_pin_memory": args.device == "cuda"},
        **{"learning_rate": 2e-4, "lr_scheduler_type": "constant", "seed": SEED},
        **{"train_sampling_strategy": "sequential", "remove_unused_columns": False},
        **{"logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "no"},
        **{"gradient_checkpointing": "ckpt" in args.arm, "report_to": "none", "disable_tqdm": True},
        **{"gradient_checkpointing_kwargs": {"use_reentrant": False}, **more},
    }


def recipe(args: Args, rows: Rows) -> Trainer:
    """As ``recipe.finetune`` composes it, without the run's folder."""
    attention.register()
    asked = TrainingArguments(**arguments(args))
    model = add_lora(base_model(args, attention.PER_ROW_SDPA), LORA, mixed_precision=True)
    head = OutputHead(model, autocast=autocast_dtype(asked))
    loss = TokenLoss(head.nll)
    log = RunLog(loss, peak_memory=peak_memory)
    log.file = args.result.parent / "metrics.jsonl"
    named = {"loss": loss, "head": head, "share_openings": args.subject == "recipe-shared"}
    return build_trainer(model, asked, rows, [], callbacks=[log], **named)


def stock_model(args: Args) -> PeftModel:
    return get_peft_model(base_model(args, "sdpa"), LoraConfig(task_type="CAUSAL_LM", **LORA))


def padded(rows: Rows) -> dict[str, torch.Tensor]:
    """The plain way: one sequence a row, filled up on the right."""
    ids = [torch.from_numpy(row.input_ids).long() for row in rows]
    labels = [o.where(torch.from_numpy(r.trained), IGNORED) for o, r in zip(ids, rows, strict=True)]
    fill = partial(pad_sequence, batch_first=True)
    mask, labels = fill([torch.ones_like(o) for o in ids]), fill(labels, padding_value=IGNORED)
    return {"input_ids": fill(ids), "attention_mask": mask, "labels": labels}


def trainer(args: Args, rows: Rows) -> Trainer:
    named = {"args": TrainingArguments(**arguments(args)), "data_collator": padded}
    return Trainer(model=stock_model(args), train_dataset=rows, **named)


def trl_liger(args: Args, rows: Rows) -> Trainer:
    """SFTTrainer with Liger's kernels on rows that are tokenised already."""
    import liger_kernel.transformers  # noqa: F401 - one that cannot be imported is a reason to skip
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"<s>": 1, "</s>": 2}, unk_token="</s>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    ids = [row.input_ids.tolist() for row in rows]
    masks = [row.trained.astype(int).tolist() for row in rows]
    more = {"use_liger_kernel": True, "packing": False, "max_length": None}
    return SFTTrainer(
        model=stock_model(args),
        args=SFTConfig(**arguments(args, completion_only_loss=True, **more)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )


SUBJECTS = {"recipe": recipe, "recipe-shared": recipe, "trainer": trainer, "trl-liger": trl_liger}


def product_rate(args: Args) -> float:
    """FLOP/s of a large product of random matrices, by the median of a second's measurements."""
    size = PRODUCT[args.device]
    a = torch.randn(size, size, device=args.device).to(args.dtype)
    return 2 * size**3 / Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=1).median


def measure(args: Args) -> Result:
    """One subject of one arm, in this process."""
    rate, rows, ends = product_rate(args), synthetic_rows(args), StepEnds()
    built = SUBJECTS[args.subject](args, rows)
    built.add_callback(ends)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    built.train()
    hidden, inner, layers, _, vocabulary = SHAPES[args.shape]
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + vocabulary * hidden
    seconds = [after - before for before, after in pairwise(ends.seconds[args.warm_up - 1 :])]
    steps = [rows[at : at + ROWS_A_STEP] for at in range(0, len(rows), ROWS_A_STEP)]
    tokens = [sum(map(len, step)) for step in steps[args.warm_up :]]
    speed, log = sum(tokens) / sum(seconds), built.state.log_history
    return {
        **{"tokens_per_second": speed, "product_flops": rate, "mfu": 4 * weights * speed / rate},
        "of_each_step": [count / one for count, one in zip(tokens, seconds, strict=True)],
        "peak_bytes": peak_memory(),
        "losses": [record["loss"] for record in log if "loss" in record],
    }


def measure_or_reason(args: Args) -> Result:
    """Memory that is too small and a package that cannot be imported are answers too."""
    try:
        return measure(args)
    except ImportError as error:
        return {"not": f"skipped: {error}"}
    except Exception as error:  # the recipe gives some of the library's errors as its own
        if "out of memory" not in str(error).lower():
            raise
        return {"not": "out of memory"}


def run(arm: str, subject: str, args: Args) -> Result:
    """``measure`` in a process of its own, or why not."""
    needed = ["bitsandbytes"] if "nf4" in arm else []
    needed += ["trl", "liger_kernel", "datasets"] if subject == "trl-liger" else []
    missing = ", ".join(name for name in needed if find_spec(name) is None)
    if missing or (args.device == "cpu" and "bf16" not in arm):
        return {"not": f"skipped: no {missing} here" if missing else "skipped: needs CUDA"}
    # One card: on several the Trainer would lay a micro-batch over all.
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if args.device == "cuda" else ""
    card = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": cards.split(",")[0]}
    with tempfile.TemporaryDirectory(prefix="recipe-bench-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "tests.benchmarks.gpu_speed", *sys.argv[1:]]
        command += ["--one", arm, subject, str(file)]
        named = {"cwd": HOME, "env": {**os.environ, **card}, "capture_output": True, "text": True}
        done = subprocess.run(command, **named)
        if file.is_file():
            return dict(json.loads(file.read_text()))
    print(f"{arm}, {subject}:\n{(done.stdout + done.stderr)[-3000:]}", file=sys.stderr)
    return {"not": f"failed with {done.returncode}, see above", "failed": True}


def line(arm: str, subject: str, one: Result) -> str:
    if "not" in one:
        return f"| {arm} | {subject} | {one['not']} | | | | | |"
    speed, steps = one["tokens_per_second"], one["of_each_step"]
    peak = [f"{count / 2**30:.2f}" for count in one["peak_bytes"].values()]
    return (
        f"| {arm} | {subject} | {speed:,.0f} ({min(steps):,.0f}–{max(steps):,.0f}) | "
        f"{one['mfu']:.1%} | {one['product_flops'] / 1e12:,.1f} | {peak[0]} | "
        f"{peak[1] if len(peak) > 1 else '–'} | {one['losses'][-1]:.3f} |"
    )


def header(args: Args) -> str:
    names = ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger_kernel")
    told = " ".join(f"{name} {version(name) if find_spec(name) else 'absent'} ·" for name in names)
    rows = synthetic_rows(args)
    tokens, trained = sum(map(len, rows)), sum(int(row.trained.sum()) for row in rows)
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{device} ({platform.machine()}) · {told} {datetime.now(UTC):%Y-%m-%d}\n"
        f"{args.shape} · {MICRO_BATCH} × {ACCUMULATION} rows a step, {tokens / len(rows):.0f} "
        f"tokens a row, {trained / tokens:.0%} trained · {args.steps} steps after {args.warm_up}\n"
    )


def asked() -> Args:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--row-tokens", type=int, help="all rows of this length, at least 2")
    parser.add_argument("--warm-up", type=int, default=3, help="steps, at least 1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--device", choices=list(PRODUCT), default="cuda")
    parser.add_argument("--json", type=Path, help="all numbers, each step's too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # arm, subject, result's file
    args = parser.parse_args()
    if args.warm_up < 1 or args.steps < 1 or (args.row_tokens or 2) < 2:
        parser.error("--warm-up and --steps begin at 1, --row-tokens at 2")
    return args


def main() -> None:
    args = asked()
    if args.one:
        args.arm, args.subject, args.result = *args.one[:2], Path(args.one[2])
        args.dtype = DTYPES[args.arm.split("-")[0]]
        args.result.write_text(json.dumps(measure_or_reason(args)))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; rehearse with --shape tiny --device cpu", file=sys.stderr)
        sys.exit(2)
    print(header(args))
    print("| arm | subject | tokens/s (steps) | MFU | product TFLOP/s | GiB | reserved | loss |")
    print("|---" * 8 + "|", flush=True)
    found: list[Result] = []
    for arm, subject in product(args.arms, args.subjects):
        found.append({"arm": arm, "subject": subject, **run(arm, subject, args)})
        print(line(arm, subject, found[-1]), flush=True)
        if args.json:  # after each, so that what is stopped is not lost
            args.json.write_text(json.dumps([header(args), *found], indent=1) + "\n")
    sys.exit(any("failed" in one for one in found))


if __name__ == "__main__":
    main()
