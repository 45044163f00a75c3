"""What plan.py refuses, in a line; and what it leaves as it is."""

import re

import pytest

from recipe import plan
from recipe.exit_codes import run_command

MISTAKES = {
    "unknown model": (
        ["model.name_or_path=somebody/llama"],
        "model.name_or_path: somebody/llama is no folder, .* Download its config.json into a "
        "folder and name that, or name one of meta-llama/Llama-2-7b-hf, ",
    ),
    "no such folder": (["model.name_or_path=/no/such/model"], "model.name_or_path: .*no folder"),
    "no such folder here": (["model.name_or_path=./model"], "model.name_or_path: .*no folder"),
    "card": (["--card", "RTX 9090"], "--card: 'RTX 9090' is not known. Give GiB, or one of RTX"),
    "card of nothing": (["--card", "0"], "--card: '0' is not known"),
    "card without end": (["--card", "9" * 400], "--card: "),
    "card and CPU": (["--card", "24", "--device", "cpu"], "--card: is no CPU"),
    "card and use_cpu": (["--card", "24", "training.use_cpu=true"], "--card: "),
    "processes": (["--processes", "0"], "--processes: 0 is below 1"),
    "no place for JSON": (["--json", "/no/such/file.json"], "--json: there is no folder"),
    "no name for JSON": (["--json", ""], "--json: "),
    "override": (["lora.rank=8"], "override lora.rank: "),
    "LoRA": (["lora.target_modules=[q_porj]"], "lora.target_modules: q_porj matches no module"),
    "peft": (["lora.layers_to_transform=[9]"], "lora: peft refuses it"),
    "rows": (["data.rows=0:99"], "data.rows: asks for 0:99, but"),
    "max_length": (["data.max_length=20", "data.too_long=drop"], "data.max_length: no training"),
    "context": (["data.max_length=999"], "data.max_length: 999 is beyond"),
    "context, rows assumed": (
        ["data.max_length=999", "data.path=gone.json"],
        "data.max_length: 999 is beyond",
    ),
    "drop_last": (
        ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=13"],
        "training.dataloader_drop_last: 12 rows fill no batch. Leave it out.",
    ),
    "not to be followed": (
        ["lora.use_dora=true", "model.quantization={load_in_4bit: true}"],
        "forecast: these settings cannot be followed without weights .* recipe/train.py --check",
    ),
    "a study's": (["study.logits=whole"], "study.logits: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_line(no_plan, anywhere, name):
    arguments, said = MISTAKES[name]
    assert re.search(f"^{said}", no_plan("--config", anywhere, *arguments))


def test_json_overwrites_nothing(no_plan, on_cpu, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    line = no_plan("--config", on_cpu, "--json", str(tmp_path / "there.json"))
    assert "exists already, and nothing is overwritten" in line


def test_nothing_is_written(machine, on_cpu, tmp_path, monkeypatch, capsys):
    """But tokens, into the cache that training reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    before = set(tmp_path.rglob("*"))
    overrides = ["training.report_to=tensorboard", "training.output_dir=run"]
    assert run_command(lambda: plan.main(["--config", on_cpu, *overrides])) == 0
    new = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before}
    assert all(name.startswith("cache") for name in new), new
    assert "memory " in capsys.readouterr().out


def test_a_machine_has_its_memory_once_however_many_processes(planned, on_cpu, memory_of_machine):
    _, one = planned("--config", on_cpu)
    memory_of_machine(round(1.5 * one["peak"]))
    assert planned("--config", on_cpu)[1]["fits"]
    assert not planned("--config", on_cpu, "--processes", "2")[1]["fits"]
