"""train.py as a user types it."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe import generate as generate_command
from recipe import train
from recipe.exit_codes import run_command

REPOSITORY = Path(__file__).parents[2]
TRAIN = [sys.executable, "recipe/train.py"]


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, **options
    )


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n    runpy.run_path('recipe/train.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    result = command(sys.executable, "-c", code)
    assert "--config" in result.stdout
    assert result.stdout.rstrip().endswith("set()")


def test_nothing_is_collected_while_modules_are_imported_nor_are_they_later():
    runs = []
    gc.callbacks.append(lambda *told: runs.append(told))
    try:
        gc.unfreeze()
        with train.everything_stays():
            runs.clear()
            made = [[] for _ in range(100_000)]
            assert not runs
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(made)
    finally:
        gc.callbacks.pop()
        gc.unfreeze()


def test_the_command_imports_so():
    code = (
        "import gc, sys\n"
        "class Seen:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name in ('torch', 'recipe.finetune'):\n"
        "            print(name, gc.isenabled())\n"
        "sys.meta_path.insert(0, Seen())\n"
        "from recipe import train\n"
        "try:\n"
        "    train.main(['--config', 'starter.yaml', '--check', 'model.name_or_path=/nowhere'])\n"
        "finally:\n"
        "    print('then', gc.isenabled())\n"
    )
    said = command(sys.executable, "-c", code).stdout.splitlines()
    expected = {"torch False", "recipe.finetune False", "then True"}
    assert set(said) == expected, said


def test_collections_go_on_after_a_failed_import():
    with pytest.raises(ImportError), train.everything_stays():
        raise ImportError
    assert gc.isenabled()


WRONG = {
    "unknown key": (
        ["--config", "starter.yaml", "training.learning_rat=1"],
        "training.learning_rat: unknown key. Did you mean training.learning_rate?",
    ),
    "no such config": (["--config", "absent.yaml"], "starter.yaml"),
    "wrong value": (["--config", "starter.yaml", "training.learning_rate=abc"], "learning_rate"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_message_and_exit_2(name):
    arguments, message = WRONG[name]
    result = command(*TRAIN, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def in_process(*arguments: str) -> int:
    """The command without a second interpreter; the imports cost most of the time."""
    return run_command(lambda: train.main(list(arguments)))


def test_show_data_prints_rows_and_table_and_writes_nothing(write_config, tmp_path, capsys):
    rows = [{"messages": turns("Name a fruit.", "Apple", "Another.", "Pear")}] * 2
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config()
    before = sorted(tmp_path.rglob("*"))
    assert (
        in_process("--config", str(config), f"data.path={tmp_path}/chat.jsonl", "--show-data", "1")
        == 0
    )
    screen = capsys.readouterr().out
    assert screen.count("  trained  ") == 2
    assert screen.count("  EOS      </s>") == 2
    assert "messages rows, chat template" in screen
    assert "1 row trained on more than once" in screen
    assert "max_length           rows longer" in screen
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_rehearsed_is_known_to_the_next_start(write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("recipe.memory.tried.free_memory", lambda device: 2**50)
    config, said = str(write_config(training={"num_train_epochs": 1})), []
    for name in ("first", "second"):
        assert in_process("--config", config, f"training.output_dir={tmp_path / name}") == 0
        said.append(capsys.readouterr().out)
    assert len(list((tmp_path / "home/recipe/rehearsed").iterdir())) == 1
    assert ["; it went through on " in one for one in said] == [False, True]
    assert all("\nrehearsed longest micro-batch (4 rows, " in one for one in said)


def test_only_the_first_of_several_processes_shows_rows(write_config, capsys, monkeypatch):
    config = str(write_config())
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert in_process("--config", config, "--show-data", "2") == 0
        assert ("max_length" in capsys.readouterr().out) == shown


def test_a_reader_that_leaves_early_is_no_error(write_config):
    config = write_config()
    show = f"{sys.executable} recipe/train.py --config {config} --show-data 12"
    result = command("bash", "-c", f"{show} | true; echo ${{PIPESTATUS[0]}}")
    assert result.stdout == "0\n"
    assert result.stderr == ""


def test_check_stops_before_the_first_step_and_writes_nothing(
    write_config, tmp_path, capsys, monkeypatch
):
    config = write_config(data={"rows": "0:8", "held_out": "8:12"})
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert in_process("--config", str(config), "--check") == 0
    screen = capsys.readouterr().out
    assert "no folder (--check)" in screen
    assert "held out  perplexity" in screen
    assert "ready for the first step" in screen
    assert "epoch" not in screen
    assert sorted(tmp_path.rglob("*")) == before
    assert in_process("--config", str(config), "--check", "lora.target_modules=[q_porj]") == 2
    assert "Choose among" in capsys.readouterr().err


def test_the_four_columns_of_the_hub_data_set_and_an_empty_output_train(
    write_config, write_rows, tmp_path, capsys
):
    """tatsu-lab/alpaca: instruction, input, output and text, which nobody needs."""
    rows = [
        {"instruction": "Name a fruit.", "input": "", "output": "Apple", "text": "Below is …"},
        {"instruction": "Give the plural.", "input": "cat", "output": "cats", "text": "Below is …"},
        {"instruction": "Say nothing.", "input": "", "output": "", "text": "Below is …"},
        {"instruction": "Strike <s>this</s> out.", "input": "", "output": "this", "text": "…"},
    ]
    config = write_config(data={"path": str(write_rows(rows, "four.json"))})
    assert in_process("--config", str(config), "training.max_steps=2") == 0
    screen = capsys.readouterr().out
    assert "columns not used: text" in screen
    assert "1 row dropped, answer empty: 2" in screen
    assert "1 row with special tokens of the tokenizer written in their text: 3" in screen
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(texts)
    ]


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts)
    ]


SOURCES = {
    "prompt_completion.csv": 'prompt,completion\n"Q: a, b\nA:"," c"\nQ: d A:, e\n',
    "messages.jsonl": json.dumps({"messages": turns("a", "b", "c", "d")}) + "\n",
    "conversations.json": json.dumps([{"conversations": turns("a", "b")}]),
    "sharegpt.json": json.dumps([{"system": "s", "conversations": sharegpt("a", "b", "c", "d")}]),
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prompt_completion.csv", "prompt_completion rows, raw template"),
        ("messages.jsonl", "messages rows, chat template"),
        ("conversations.json", "messages rows, chat template"),
        ("sharegpt.json", "sharegpt rows, chat template"),
        ("messages.parquet", "messages rows, chat template"),
    ],
)
def test_every_format_trains_and_answers_with_its_template(
    write_config, tmp_path, capsys, name, said
):
    file = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns("a", "b")}]), file)
    else:
        file.write_text(SOURCES[name])
    config = write_config(data={"path": str(file)})
    assert in_process("--config", str(config), "training.max_steps=2") == 0
    assert said in capsys.readouterr().out
    generate = ["--adapter", str(tmp_path / "run"), "--prompt", "a", "max_new_tokens=2"]
    assert run_command(lambda: generate_command.main(generate)) == 0
    assert said.rsplit(", ")[1] in capsys.readouterr().err


def test_accelerate_launch_trains_and_generate_answers(write_config, tmp_path):
    """The documented command, then the documented answer, each in its own process."""
    config = write_config(training={"use_cpu": False})
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--quiet"]
    one = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    result = command(*map(str, launch), *one, "recipe/train.py", "--config", str(config))
    assert result.returncode == 0, result.stderr
    assert "reopened: whole, finite, as trained" in result.stdout
    assert result.stderr == ""

    adapter = str(tmp_path / "run/adapter")
    generate = [sys.executable, "recipe/generate.py", "max_new_tokens=5"]
    result = command(*generate, "--adapter", adapter, "--prompt", "Name a fruit.")
    assert result.returncode == 0, result.stderr
    assert "alpaca template, greedy" in result.stderr
