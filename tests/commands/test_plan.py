"""plan.py as a user types it, without weights and without a network."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.finetune import finetune
from recipe.memory.cards import CARDS
from recipe.settings import load_settings
from recipe.training.trainer import TokenWeightedTrainer

REPOSITORY = Path(__file__).parents[2]
GIB = 2**30
NF4 = "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
ON_CARD = ["--device", "cuda"]
# Of all that is thought of, halved batches and shorter rows are left.
LITTLE = [
    "training.gradient_checkpointing=true",
    "training.optim=adamw_bnb_8bit",
    "lora.target_modules=all-linear",
]


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['plan.py', '--help']\n"
        "try:\n    runpy.run_path('recipe/plan.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert "--card" in done.stdout
    assert done.stdout.rstrip().endswith("set()")


def test_llama_2_without_its_weights_or_a_network(tmp_path):
    """A process of its own, on a machine that has nothing but the recipe."""
    file = tmp_path / "plan.json"
    command = [sys.executable, str(REPOSITORY / "recipe/plan.py"), "--config", "lora_alpaca.yaml"]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads(file.read_text())
    # From a row's last token nothing is predicted.
    lora, tokens, hidden = 32 * 16 * 2 * (4096 + 4096), 8 * 1023, 4096
    items = found["items"]
    assert items["base weights, float16"] == pytest.approx(2 * 6_738_415_616, abs=1024)
    assert items["adapter"] == items["gradients"] == 4 * lora
    assert items["optimizer state"] == 8 * lora
    # Checkpointing keeps each layer's input; the last norm its own in float32, and the scales.
    inputs, norm = 32 * tokens * hidden * 2, tokens * hidden * 4 + tokens * 4
    assert found["saved_activations"] == inputs + norm
    # Forward, forward again up to what is needed, and backward: 2 operations a weight each.
    layer, down, head = 4 * hidden**2 + 3 * hidden * 11008, hidden * 11008, hidden * 32000
    a_token = 32 * (2 * layer + 2 * (layer - down) + 2 * layer) + 4 * head
    assert found["flops_micro_batch"] == pytest.approx(tokens * a_token, rel=0.005)
    assert "rows      assumed: 8 rows of 1,024 tokens, all trained, because " in done.stdout
    assert f"memory    {found['peak'] / GIB:,.2f} GiB on a CUDA card, at the peak of the" in (
        done.stdout
    )


def test_screen_and_json_say_the_same(planned, anywhere):
    said, found = planned("--config", anywhere, "lora.r=4000000", *ON_CARD)
    lines = said.splitlines()
    assert (lines[0], found["settings"], found["device"]) == ("plan      tiny", "tiny", "cuda")
    assert found["peak"] == sum(found["items"].values())
    assert f"memory    {found['peak'] / GIB:,.2f} GiB on a CUDA card, at the peak of the " in said
    assert found["phase"] in ("forward", "loss", "backward", "evaluation")
    assert len(found["items"]) > 6
    for item, count in found["items"].items():
        line = next((one for one in lines if one.endswith(f"GiB  {item}")), None)
        if line is None:
            assert count < GIB / 100, item
        else:
            assert line.split() == [f"{count / GIB:.2f}", "GiB", *item.split()]
    fitting = next(one for one in lines if one.startswith("fits "))
    lacking = next(one for one in lines if one.startswith("too small "))
    assert {one.name: found["peak"] <= one.memory for one in CARDS} == found["cards"]
    assert set(found["cards"].values()) == {True, False}
    for name, fits in found["cards"].items():
        assert (name in fitting, name in lacking) == (fits, not fits)


def test_what_makes_it_fit_is_named_and_does(planned, anywhere):
    asked = ["--config", anywhere, *LITTLE[:1], "lora.r=16384", "data.rows=0:8", *ON_CARD]
    _, whole = planned(*asked)
    card = ["--card", f"{(whole['peak'] - (32 << 20)) / GIB:.6f}"]
    said, found = planned(*asked, *card)
    assert not found["fits"]
    lack = (found["peak"] - found["room"]) / GIB
    assert f" GiB, {found['room'] / GIB:.2f} GiB, by {lack:.2f} GiB. What makes it fit" in said
    told = said[said.index("What makes it fit") :].splitlines()[1:]
    assert len(told) == len(found["remedies"]) > 0
    for line, way in zip(told, found["remedies"], strict=True):
        assert way["peak"] <= found["room"]
        start = f"{way['peak'] / GIB:,.2f} GiB · {way['time']:.2f} of the time · "
        assert line.strip().startswith(start)
        assert line.endswith(" · trains otherwise") == (not way["same"])
        assert shlex.split(line.split(" of the time · ")[1].split(" · ")[0]) == way["overrides"]
    _, again = planned(*asked, *card, *found["remedies"][0]["overrides"])
    assert again["fits"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        # Two halves of a batch that are longer together than the longest batch's are.
        ([90, 60, 60, 60, 85, 85, 1, 1], "training.per_device_train_batch_size"),
        # Without the longest row, another batch has the most tokens.
        ([190, 50, 1, 1, 60, 60, 55, 55], "data.max_length"),
    ],
)
def test_a_remedy_is_true_of_all_rows(
    planned, write_config, write_rows, memory_of_machine, words, key
):
    places = [f"Say {place}." for place in range(len(words))]
    rows = [
        {"instruction": place, "input": "", "output": "a" * count}
        for place, count in zip(places, words, strict=True)
    ]
    data = {"path": str(write_rows(rows, name="uneven.json")), "template": "chat"}
    config = write_config(data=data, training={"train_sampling_strategy": "sequential"})
    asked = ["--config", str(config), *LITTLE, "model.attn_implementation=sdpa"]
    _, whole = planned(*asked)
    memory_of_machine(whole["peak"] - 1)
    _, found = planned(*asked)
    ways = [way for way in found["remedies"] if way["overrides"][0].startswith(key)]
    assert ways
    for way in ways:
        _, again = planned(*asked, *way["overrides"])
        assert again["peak"] == way["peak"]


def test_nothing_is_named_where_nothing_helps(planned, on_cpu, memory_of_machine):
    memory_of_machine(64 << 20)
    single = ["training.per_device_train_batch_size=1", "data.template=chat"]
    said, found = planned("--config", on_cpu, *LITTLE, *single, "data.rows=0:2")
    assert (found["fits"], found["remedies"]) == (False, [])
    assert "too large for this machine, 0.06 GiB, by " in said
    assert "nothing known here makes it fit" in said


@pytest.mark.parametrize(
    ("card", "gib"), [("a100-40gb", 40), ("rtx 4090 24GB", 23.988), ("15.9", 15.9)]
)
def test_a_card_by_its_name_or_by_its_size(planned, anywhere, card, gib):
    said, found = planned("--config", anywhere, "--card", card)
    assert found["room"] / GIB == pytest.approx(gib, abs=0.001)
    assert found["device"] == "cuda"
    assert found["fits"]
    spare = (found["room"] - found["peak"]) / GIB
    assert re.search(rf"^fits      into .*, {gib:.2f} GiB: {spare:.2f} GiB to spare$", said, re.M)


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ([], "cpu"),
        (["--device", "cuda", "training.use_cpu=true"], "cuda"),
        (["--device", "cpu", "training.bf16=true"], "cpu"),
        (["--processes", "2"], "cuda"),
        (["training.fp16=true"], "cuda"),
        (["training.bf16=true", "training.tf32=true"], "cuda"),
        ([NF4], "cuda"),
    ],
    ids=" ".join,
)
def test_a_config_for_a_card_is_planned_for_one_wherever_it_is_planned(
    planned, anywhere, arguments, device
):
    said, found = planned("--config", anywhere, *arguments)
    assert found["device"] == device
    assert {"cpu": "on this CPU, resident", "cuda": "on a CUDA card"}[device] in said
    assert ("cards" in found) == (device == "cuda")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_of_several(planned, anywhere, strategy):
    asked = ["--config", anywhere, "lora.r=64", *ON_CARD]
    one = planned(*asked)[1]["items"]
    said, found = planned(*asked, "--processes", "4", "--strategy", strategy)
    assert f", for each of 4 processes by {strategy}, at the peak of" in said
    assert (found["processes"], found["strategy"]) == (4, strategy)
    share = 1 if strategy == "ddp" else 4
    for item in ("base weights, float32", "adapter", "optimizer state"):
        assert found["items"][item] == one[item] // share
    assert found["items"]["saved activations"] == one["saved activations"]
    assert found["items"]["communication buckets"] == one["adapter"] // share
    assert ("gathered layers" in found["items"]) == (strategy == "fsdp2")


def test_rows_that_are_here_are_counted_as_a_run_takes_them(planned, on_cpu, monkeypatch):
    seen: list[tuple[int, int, int, int, int]] = []

    def step(self, model, inputs, *rest):
        computed, shared = sum(inputs["row_lengths"]), sum(inputs["openings"])
        whole = computed + shared + sum(inputs["endings"])
        seen.append((computed + shared, computed, shared, whole, len(inputs["row_indices"])))
        return training_step(self, model, inputs, *rest)

    training_step = TokenWeightedTrainer.training_step
    monkeypatch.setattr(TokenWeightedTrainer, "training_step", step)
    rows = ["data.rows=1:12", "training.gradient_accumulation_steps=2"]
    said, found = planned("--config", on_cpu, *rows)
    settings = load_settings(on_cpu, rows)
    finetune(settings)
    needed, computed, shared, tokens, many = (sum(each) for each in zip(*seen, strict=True))
    assert tokens == needed + many  # each row has one end
    longest = max(seen)
    assert (
        f"rows      11 of {settings.data.path} · 4 steps, {tokens:,} tokens, {shared / tokens:.0%} "
        f"of them shared openings · the longest micro-batch has {longest[1]:,} left in "
        f"{longest[4]} rows"
    ) in said
    # At one GFLOP/s of matrix products, and what is written beside.
    flops = found["flops_micro_batch"] * computed / longest[1]
    assert round(flops / 1e9) <= found["seconds"] <= 3 * flops / 1e9 + 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.template=chat"], "longest micro-batch has"),
        ([NF4, "lora.lora_dropout=0.1"], "on a CUDA card"),
        (["training.report_to=wandb"], "memory"),
        (["data.rows=0:1"], "has 42 left in 1 row"),
        (["data.rows=0:8", "data.held_out=8:12"], "rows      8 of"),
        (["training.max_steps=1"], "1 step"),
        (["training.optim=lomo"], "lomo: its state is taken for AdamW's"),
        (["lora.init_lora_weights=pissa", "training.gradient_checkpointing=true"], "memory"),
        (["data.path=tatsu-lab/alpaca", "data.max_length=100"], "assumed: 4 rows of 100 tokens"),
    ],
    ids=str,
)
def test_what_a_run_would_take_is_planned(planned, anywhere, overrides, said):
    text, found = planned("--config", anywhere, *overrides)
    assert said in text
    assert found["peak"] > 2**27


def test_attention_that_sees_all_rows_keeps_more(planned, on_cpu):
    said, items = {}, {}
    for name in ("per_row_sdpa", "sdpa", "eager"):
        said[name], found = planned("--config", on_cpu, f"model.attn_implementation={name}")
        items[name] = found["items"]["saved activations"]
    assert items["per_row_sdpa"] < items["sdpa"] < items["eager"]
    assert " 0% of them shared openings" in said["sdpa"]
    assert " 0% of them shared openings" not in said["per_row_sdpa"]


def test_a_shape_without_tokenizer_and_weights_is_enough(
    planned, on_cpu, tiny_checkpoint, tmp_path
):
    """As is advised where a model is not known: its config.json in a folder."""
    (tmp_path / "shape").mkdir()
    text = (tiny_checkpoint / "config.json").read_text()
    (tmp_path / "shape/config.json").write_text(text)
    said, found = planned("--config", on_cpu, f"model.name_or_path={tmp_path / 'shape'}")
    assert "rows      assumed: 4 rows of 256 tokens" in said
    whole = planned("--config", on_cpu, "data.path=gone.json")[1]
    assert found["saved_activations"] == whole["saved_activations"]
    assert found["flops_micro_batch"] == whole["flops_micro_batch"]
