"""Each wrong config and override, given to the command: one line, exit 2, nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusal import refused
from tests.settings import conftest
from tests.settings.wrong_configs import CASES, IDS

REPOSITORY = Path(__file__).parents[2]
# A fixture is known by the name that it has here.
write_settings = conftest.write_config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the command runs, and where its cache would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_there_are_enough_cases():
    assert len(CASES) >= 60
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize(("section", "lines", "key", "fragments"), CASES, ids=IDS)
def test_a_wrong_config(write_settings, capsys, folder, section, lines, key, fragments):
    config = write_settings(**{section: lines})
    (line,) = refused(["--config", str(config)], capsys, folder)
    assert line.startswith("c.yaml")
    assert f": {key}: " in line
    assert "secret" not in line
    for fragment in fragments:
        assert fragment in line


FILES = {
    "empty": (b"", "c.yaml:1: expected sections such as 'model:', found none."),
    "only a comment": (b"# later\n", "c.yaml:1: expected sections such as 'model:', found none."),
    "a list": (b"- model\n", "c.yaml:1: expected sections such as 'model:', found none."),
    "JSON lines": (b'{"model": {}}\n{"data": {}}\n', "c.yaml:2: not valid YAML"),
    "tab": (b"model:\n\tdtype: auto\n", "c.yaml:2: not valid YAML"),
    "Latin-1": (b"model:\n  name_or_path: caf\xe9\n", "c.yaml:2: not UTF-8."),
    "UTF-16": ("model: {}\n".encode("utf-16"), "c.yaml:1: not UTF-8."),
    "NUL": (b"model:\n  dtype: a\0b\n", "c.yaml:2: control character U+0000."),
    "10,000 brackets": (b"model: " + b"[" * 10_000, "c.yaml:1: model: nested deeper than 20"),
    "two documents": (
        b"model: {name_or_path: x}\ndata: {path: x}\nlora: {r: 8}\n---\ntraining: {seed: 1}\n",
        "c.yaml:4: a second document starts.",
    ),
    "code": (b"!!python/object/apply:os.system [ls]\n", "c.yaml:1: tag "),
    "a checkpoint": (b"PK\x03\x04\x14\x00", "c.yaml:1: control character U+0003."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(capsys, folder, name):
    content, begins = FILES[name]
    config = folder / "c.yaml"
    config.write_bytes(content)
    (line,) = refused(["--config", str(config)], capsys, folder)
    assert line.startswith(begins)


ARGUMENTS = {
    "no such config": (["--config", "absent"], "--config 'absent': no such file."),
    "a folder": (["--config", "cache"], "--config 'cache': no such file."),
    "a long name": (["--config", "x" * 5000], "--config 'xxx"),
    "line end in a name": (["--config", "a\nb"], r"--config 'a\nb': no such file."),
    "no row to show": (["--config", "c.yaml", "--show-data", "0"], "--show-data: 0 is below 1."),
    "no value": (["--config", "c.yaml", "lora.r"], "override lora.r: no value."),
    "no key": (["--config", "c.yaml", "=8"], "override : no key."),
    "empty value": (["--config", "c.yaml", "lora.r="], "override lora.r: nothing after '='."),
    "rank 0": (["--config", "c.yaml", "lora.r=0"], "override lora.r: expected a whole number"),
    "alpha 0": (["--config", "c.yaml", "lora.lora_alpha=0"], "override lora.lora_alpha: expected"),
    "a section": (["--config", "c.yaml", "lora=8"], "override lora: a section."),
    "inside a value": (["--config", "c.yaml", "data.path.x=8"], "override data.path.x: data.path"),
    "line end in a key": (["--config", "c.yaml", "lora.\nr="], r"override 'lora.\nr': no key."),
    "a token": (
        ["--config", "c.yaml", "training.hub_token=hf_secret"],
        "override training.hub_token: a token must never stand in a file or on a command line.",
    ),
    "undone": (
        ["--config", "c.yaml", "lora.r=8", "lora={r: 4}"],
        "override lora: given after an override that it undoes.",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument(write_settings, capsys, folder, name):
    write_settings()
    (folder / "cache").mkdir()
    arguments, begins = ARGUMENTS[name]
    (line,) = refused(arguments, capsys, folder)
    assert line.startswith(begins)
    assert "secret" not in line


LATER = {
    "module that is not there": ("lora.target_modules=[q_prok]", "lora.target_modules: "),
    "layer that is not there": ("lora.layers_to_transform=[7]", "lora: peft refuses it: "),
    "no such model": ("model.name_or_path=models/absent", "model.name_or_path: no folder models/"),
    "a revision of a folder": ("model.revision=main", "model.revision: main is of a hub id"),
    "quantised in 0 bit": ("model.quantization={load_in_4bit: false}", "override model.quantiz"),
    "fp16 on the CPU": ("training.fp16=true", "training.fp16: fp16 training needs a GPU"),
    "a full folder": ("training.output_dir=full", "training.output_dir: full is not empty"),
    "a file as folder": ("training.output_dir=tiny.yaml", "training.output_dir: tiny.yaml is"),
    "a folder under a file": (
        "training.output_dir=tiny.yaml/run",
        "training.output_dir: tiny.yaml/run would lie in a file.",
    ),
    "a folder of a long name": (f"training.output_dir={'x' * 5000}", "training.output_dir: xxx"),
    "a model of a long name": (f"model.name_or_path=./{'x' * 5000}", "model.name_or_path: "),
    "a checkpoint of a long name": (
        f"training.resume_from_checkpoint={'x' * 5000}",
        "training.resume_from_checkpoint: ",
    ),
    "arguments that a schedule does not take": (
        "training.lr_scheduler_kwargs={a: 1}",
        "training: transformers refuses it: ",
    ),
    "no checkpoint": ("training.resume_from_checkpoint=full", "training.resume_from_checkpoint: "),
    "nothing to resume": (
        "training.resume_from_checkpoint=no",
        "training.resume_from_checkpoint: ",
    ),
    "no such tracker": (
        "training.report_to=[nothing_at_all]",
        "training: transformers refuses it: ",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_what_only_the_run_can_know(
    write_config, capsys, folder, tmp_path_factory, monkeypatch, name
):
    # The rows are right, so their tokens are kept.
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
    config = write_config()
    (folder / "full").mkdir()
    (folder / "full/a").touch()
    override, begins = LATER[name]
    (line,) = refused(["--config", str(config), override], capsys, folder)
    assert line.startswith(begins)


def test_each_problem_has_its_line(write_settings, capsys, folder):
    config = write_settings(lora="r: 0\nlora_alpha: 0", training="learning_rate: abc")
    lines = refused(["--config", str(config), "training.seed=x", "data.rows=7"], capsys, folder)
    assert len(lines) == 5
    assert len(set(lines)) == 5


@pytest.mark.parametrize("wrong", ["lora.r=0", "training.learning_rat=1", "data.rows=0:0"])
def test_a_mistake_is_told_before_anything_heavy_is_imported(wrong):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['recipe/train.py', '--config', 'starter.yaml', sys.argv[1]]\n"
        "try:\n    runpy.run_path('recipe/train.py', run_name='__main__')\n"
        "except SystemExit as stopped:\n    print(stopped.code)\n"
        "print({'torch', 'transformers', 'peft', 'accelerate', 'datasets', 'pyarrow', 'numpy', "
        "'huggingface_hub'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, wrong], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == ["2", "set()"], result.stderr
    assert len(result.stderr.splitlines()) == 1
