"""Each engine trains the adapter of one process, saves it whole, and goes on when killed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from recipe.sealed import seal
from recipe.settings import UserError
from recipe.training.checkpoints import find_checkpoint
from tests.equalities.engines import BIN, ENGINES, apart, lacking, launch, lora_b

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(engine, processes, config, *arguments):
    command, environment = launch(engine, processes)
    return subprocess.Popen(
        [*command, "--config", str(config), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(engine, processes, config, *arguments):
    process = start(engine, processes, config, *arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_checkpoint):
    """Nine rows, so that micro-batches are left over in every epoch."""
    folder = tmp_path_factory.mktemp("engines")
    rows = [
        {"instruction": f"Name number {n}." * (n % 4 + 1), "input": "", "output": "one " * (n + 1)}
        for n in range(12)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = {
        "model": {"name_or_path": str(tiny_checkpoint), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "data": {
            "path": str(folder / "rows.json"),
            "rows": "0:9",
            "held_out": "9:12",
            "template": "alpaca",
            "max_length": 200,
        },
        "training": {
            "max_steps": 60,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "seed": 3,
            "use_cpu": True,
            "save_steps": 20,
            "logging_steps": 20,
            "eval_strategy": "epoch",
        },
    }
    file = folder / "engines.yaml"
    file.write_text(json.dumps(settings))  # which is YAML
    return file


@pytest.fixture(scope="module")
def one(config):
    folder = config.parent / "one"
    run("single", 1, config, f"training.output_dir={folder}")
    return folder


@pytest.fixture(scope="module", params=ENGINES, ids=lambda pair: f"{pair[0]} {pair[1]}")
def finished(request, config):
    engine, processes = request.param
    if reason := lacking(engine):
        pytest.skip(reason)
    folder = config.parent / f"{engine}-{processes}"
    said = run(engine, processes, config, f"training.output_dir={folder}")
    return engine, processes, folder, said


def records(folder, key):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [one[key] for one in map(json.loads, lines) if key in one]


def test_lora_b_after_20_steps_is_that_of_one_process(finished, one):
    ours, theirs = (folder / "checkpoint-20" for folder in (finished[2], one))
    assert lora_b(theirs).norm() > 0.01
    assert apart(ours, theirs) < 1e-5


def test_losses_and_perplexities_are_those_of_one_process(finished, one):
    for key in ("epoch_loss", "eval_loss", "epoch_trained_tokens"):
        assert records(finished[2], key) == pytest.approx(records(one, key), rel=1e-5), key


def test_what_was_asked_is_what_ran_and_one_process_says_so(finished):
    engine, processes, folder, said = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["engine"], manifest["processes"]) == (engine, processes)
    assert said.count("\nresult ") == 1
    assert f"× {processes} processes, {engine}\n" in said
    assert {file.name for file in (folder / "logs").iterdir()} == {
        f"rank-{rank}.log" for rank in range(1, processes)
    }
    if engine != "ddp":
        halves = {"zero2": {"optimizer state"}}.get(engine, {"optimizer state", "adapter"})
        items = manifest["memory"]["items"]
        for name in halves:
            assert items[name]["measured"] == items[name]["forecast"], name


def test_stock_peft_loads_the_saved_adapter_and_answers_as_with_that_of_one(
    finished, one, tiny_checkpoint
):
    """The empty adapter of sharded saving would answer as the base does."""
    ids = torch.arange(40)[None]
    logits = []
    for folder in (finished[2], one):
        base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
        tuned = PeftModel.from_pretrained(base, folder / "adapter")
        with torch.no_grad():
            logits.append(tuned(ids).logits)
            with tuned.disable_adapter():
                plain = tuned(ids).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - plain).abs().max() > 0.01


def test_a_killed_run_goes_on_to_the_same_bytes(finished, config):
    engine, processes, whole, _ = finished
    folder = whole.with_name(f"{whole.name}-killed")
    process = start(engine, processes, config, f"training.output_dir={folder}")
    until = time.monotonic() + 120
    while not (folder / "checkpoint-20").is_dir() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    orphans(folder)
    assert not (folder / "adapter").exists(), "it ended before it was killed"
    said = run(
        engine,
        processes,
        folder / "settings.yaml",
        f"training.resume_from_checkpoint={folder}",
    )
    assert "resumed   from" in said
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_checkpoint_that_was_sealed_without_a_process_is_not_taken(finished, tmp_path):
    """As where its host wrote into a folder of its own."""
    whole = finished[2]
    folder = tmp_path / "run/checkpoint-60"
    shutil.copytree(whole / "checkpoint-60", folder)
    shutil.copy(whole / "manifest.json", tmp_path / "run")
    assert find_checkpoint(str(folder)).folder == folder
    for name in ("rng_state_1.pth", "sha256.json"):
        (folder / name).unlink()
    seal(folder)
    with pytest.raises(UserError, match=r"checkpoint-60/rng_state_1.pth: missing"):
        find_checkpoint(str(folder))


def orphans(folder):
    """torchrun starts its processes in sessions of their own; wait until they have died with it."""
    for _ in range(200):
        found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, check=False)
        if found.returncode:
            return
        subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=False)
        time.sleep(0.05)
    raise AssertionError(f"processes of {folder} go on")


def test_another_engine_does_not_go_on(finished, tmp_path):
    engine, processes, whole, _ = finished
    if processes != 2:
        pytest.skip("the number of processes is told first")
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "adapter")
    other = "fsdp2" if engine == "ddp" else "ddp"
    resume = f"training.resume_from_checkpoint={folder}"
    process = start(other, processes, folder / "settings.yaml", resume)
    said, _ = process.communicate(timeout=300)
    assert process.returncode
    line = f"accelerate launch: asks for {other}, but {folder} began with {engine}, and its "
    assert said.count(line) == 1, said


def test_processes_without_rows_train_with_those_that_have_some(config, one, tmp_path):
    """Nine rows in one micro-batch: the second process has none."""
    few = ["training.per_device_train_batch_size=9", "training.gradient_accumulation_steps=2"]
    folders = [tmp_path / "alone", tmp_path / "both"]
    run("single", 1, config, *few, f"training.output_dir={folders[0]}")
    run("ddp", 2, config, *few, f"training.output_dir={folders[1]}")
    assert apart(folders[1] / "adapter", folders[0] / "adapter") < 1e-5


def test_fsdp2_on_a_cpu_is_refused_in_one_line(config, tmp_path):
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", "launch/fsdp2.yaml"]
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            *command,
            "--num_processes=2",
            "--main_process_port=0",
            "recipe/train.py",
            "--config",
            str(config),
            f"training.output_dir={folder}",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if "FSDP2" in line]
    assert len(said) == 1
    assert said[0].startswith("accelerate launch: asks for FSDP2, which accelerate does on GPUs")
    assert not folder.exists()
