"""generate.py as a user types it."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe import generate, train
from recipe.exit_codes import run_command
from tests.refusal import listing, whole_lines

REPOSITORY = Path(__file__).parents[2]
QUESTIONS = "Name a fruit.\nCount to three.\nWhat is two plus two?\n"


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """A finished run of the tiny model: the folder that holds runs/tiny."""
    folder = tmp_path_factory.mktemp("runs-of-tiny")
    rows = [{"instruction": q, "output": "Apple, and more"} for q in QUESTIONS.splitlines()]
    (folder / "rows.json").write_text(json.dumps(rows * 4))
    (folder / "tiny.yaml").write_text(
        f"model: {{name_or_path: {tiny_checkpoint}, dtype: float32}}\n"
        "lora: {r: 4, lora_alpha: 8, target_modules: all-linear}\n"
        f"data: {{path: {folder}/rows.json}}\n"
        f"training: {{output_dir: {folder}/runs/tiny, use_cpu: true, max_steps: 6, "
        "learning_rate: 0.03, save_strategy: 'no'}\n"
    )
    assert run_command(lambda: train.main(["--config", str(folder / "tiny.yaml")])) == 0
    return folder


@pytest.fixture
def here(run, tmp_path, monkeypatch):
    """An empty folder in which that run is the newest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(run / "runs")
    (tmp_path / "questions.txt").write_text(QUESTIONS)
    return tmp_path


def in_process(*arguments):
    return run_command(lambda: generate.main(list(arguments)))


SHORT = "max_new_tokens=6"


def test_one_prompt_is_streamed_and_told_why_it_ended(here, capsys):
    assert in_process("--prompt", "Name a fruit.", SHORT) == 0
    said = capsys.readouterr()
    assert said.out.endswith("\n")
    who, _, end, *_ = said.err.splitlines()
    assert who.startswith("runs/tiny/adapter on ")
    assert who.endswith(", alpaca template, greedy_search max_new_tokens=6")
    assert end.startswith(("(length · 6 tokens in ", "(eos · "))
    assert end.endswith(" tokens/s)")


STRATEGIES = {
    "sample": ["temperature=0.8", "top_p=0.9", "seed=3"],
    "beam_search": ["num_beams=3"],
    "beam_sample": ["num_beams=3", "temperature=1.3"],
    "group_beam_search": ["num_return_sequences=2"],
    "constrained_beam_search": ["force_words=[fruit, [red, blue]]", "max_new_tokens=14"],
    "contrastive_search": ["penalty_alpha=0.4"],
    "dola_generation": ["dola_layers=[0]"],
    "assisted_generation": ["prompt_lookup_num_tokens=3"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_writes_json_lines(here, strategy):
    keys = STRATEGIES[strategy]
    keys = keys if any("max_new" in key for key in keys) else [*keys, SHORT]
    arguments = ["--prompts", "questions.txt", "--output", "a.jsonl", f"strategy={strategy}", *keys]
    assert in_process(*arguments) == 0
    records = [json.loads(line) for line in (here / "a.jsonl").read_text().splitlines()]
    answers = 2 if "num_return_sequences=2" in keys else 1
    assert [r["index"] for r in records] == [i for i in range(3) for _ in range(answers)]
    for record in records:
        assert record["prompt"] == QUESTIONS.splitlines()[record["index"]]
        assert record["model"] == "adapter"
        assert record["adapter"] == "runs/tiny/adapter"
        assert record["base"].endswith("tiny-llama")
        assert record["template"] == "alpaca"
        assert record["settings"]["strategy"] == strategy
        assert record["finish_reason"] in ("eos", "length")
        assert 0 < len(record["ids"]) <= record["settings"]["max_new_tokens"]
        assert ("seed" in record) == ("sample" in strategy)
        if strategy == "constrained_beam_search":
            assert "fruit" in record["text"]
            assert "red" in record["text"] or "blue" in record["text"]


def test_many_prompts_on_the_screen(here, capsys):
    assert in_process("--prompts", "questions.txt", SHORT, "--batch-size", "2") == 0
    said = capsys.readouterr()
    for number, question in enumerate(QUESTIONS.splitlines()):
        assert f"[{number}] {question}\n" in said.out
    assert said.err.count("(length · ") + said.err.count("(eos · ") == 3
    assert "3 prompts · " in said.err


def test_base_and_adapter_from_one_load(here, capsys):
    assert in_process("--prompt", "Name a fruit.", "--with", "base,adapter", SHORT) == 0
    both = capsys.readouterr()
    assert "the base alone, alpaca template" in both.err
    base, adapter = both.out.splitlines()
    assert base != adapter
    assert in_process("--prompt", "Name a fruit.", SHORT) == 0
    assert capsys.readouterr().out.rstrip("\n") == adapter
    name = json.loads(Path("runs/tiny/adapter/recipe.json").read_text())["base"]["name_or_path"]
    alone = ["--adapter", "none", "--model", name, "--template", "alpaca"]
    assert in_process("--prompt", "Name a fruit.", *alone, SHORT) == 0
    assert capsys.readouterr().out.rstrip("\n") == base


def test_raw_text_with_shots_and_an_adapter(here, capsys):
    shots = ["--shots", "quick => fast", "--shots", "happy => glad"]
    stops = 'stop_strings="a"'
    assert in_process("--prompt", "clever", *shots, "--template", "raw", stops, SHORT) == 0
    said = capsys.readouterr()
    assert "raw template (trained with alpaca)" in said.err
    assert "a" not in said.out.strip()


def test_the_lab_prints_a_table_and_writes_json(here, capsys):
    (here / "lab.yaml").write_text(
        "generation: {max_new_tokens: 12}\n"
        "strategies:\n"
        "  greedy: {strategy: greedy_search}\n"
        "  nucleus: {strategy: sample, top_p: 0.9}\n"
        "  beams: {strategy: beam_search, num_beams: 2}\n"
    )
    arguments = ["--prompts", "questions.txt", "--lab", "lab.yaml", "--output", "lab.json"]
    assert in_process(*arguments) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "strategy", "tokens/s", "tokens", "stopped", "distinct-1", "distinct-2", "rep-4", "log",
        "p/token",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == ["greedy", "nucleus", "beams"]
    written = json.loads((here / "lab.json").read_text())
    assert list(written["strategies"]) == ["greedy", "nucleus", "beams"]
    greedy = written["strategies"]["greedy"]
    assert len(greedy["answers"]) == 3
    assert greedy["mean_tokens"] == sum(len(a["ids"]) for a in greedy["answers"]) / 3
    assert written["strategies"]["nucleus"]["settings"]["top_p"] == 0.9
    beams = written["strategies"]["beams"]["log_probability_per_token"]
    assert written["strategies"]["nucleus"]["log_probability_per_token"] < beams


BAD_LAB = """\
generation: {max_new_tokens: 12, top_p: 0.9}
strategies:
  greedy: {strategy: greedy_search}
  nucleus:
    strategy: sample
    top_k: 0
  nothing: 3
"""

WRONG = {
    "no prompt": ([], "--prompt, --prompts, --chat: expected one of these, found none of them"),
    "two prompts": (
        ["--prompt", "a", "--prompts", "questions.txt"],
        "--prompt, --prompts, --chat: expected one of these, found --prompt and --prompts",
    ),
    "empty prompt": (["--prompt", " "], "--prompt: empty."),
    "NUL": (["--prompt", "a\0b"], "--prompt: holds what is no text"),
    "no such file": (["--prompts", "absent.txt"], "--prompts: 'absent.txt' cannot be read"),
    "empty file": (["--prompts", "empty.txt"], "empty.txt: holds no prompts."),
    "a folder": (["--prompts", "runs"], "--prompts: 'runs' cannot be read: Is a directory."),
    "unknown ending": (["--prompts", "x.doc"], "--prompts: x.doc is none of"),
    "chat without a terminal": (["--chat"], "--chat: needs a terminal."),
    "no shot": (["--prompt", "a", "--shots", "b =>"], "--shots: expected 'prompt => answer'"),
    "unknown strategy": (["--prompt", "a", "strategy=greedy"], "strategy: expected"),
    "a flag for a key": (["--prompt", "a", "--with", "tuned"], "--with: expected base, adapter"),
    "twice the same": (["--prompt", "a", "--with", "base,base"], "--with: expected base, adapter"),
    "base without adapter": (
        ["--prompt", "a", "--adapter", "none", "--with", "base"],
        "--with: needs an adapter.",
    ),
    "ignored": (["--prompt", "a", "temperature=0.7"], "temperature: greedy_search would ignore it"),
    "impossible pair": (
        ["--prompt", "a", "strategy=beam_search", "num_return_sequences=9"],
        "num_return_sequences: above num_beams=4.",
    ),
    "unknown key": (["--prompt", "a", "topp=1"], "topp: unknown key. Did you mean top_p?"),
    "no value": (["--prompt", "a", "top_p"], "'top_p': expected key=value"),
    "key twice": (["--prompt", "a", "seed=1", "seed=2"], "seed: stands twice."),
    "refused": (["--prompt", "a", "max_length=9"], "max_length: counts the prompt too."),
    "no tokens": (["--prompt", "a", "max_new_tokens=0"], "max_new_tokens: expected a whole number"),
    "no batch": (["--prompt", "a", "--batch-size", "0"], "--batch-size: 0 is below 1."),
    "a template beside the adapter": (
        ["--prompt", "a", "--template", "chat"],
        "--template: an adapter brings its own template.",
    ),
    "output there": (["--prompt", "a", "--output", "empty.txt"], "--output: empty.txt exists"),
    "output nowhere": (["--prompt", "a", "--output", "no/a.jsonl"], "--output: there is no folder"),
    "no such lab": (["--prompt", "a", "--lab", "absent.yaml"], "--lab 'absent.yaml': no such file"),
    "no strategies": (
        ["--prompt", "a", "--lab", "empty.yaml"],
        "empty.yaml: strategies: expected names",
    ),
    # These need the model.
    "no adapter there": (["--prompt", "a", "--adapter", "absent"], "adapter: absent is no folder."),
    "no model there": (
        ["--prompt", "a", "--adapter", "none", "--model", "models/absent"],
        "model.name_or_path: no folder models/absent",
    ),
    "beyond the context": (["--prompt", "a " * 400, SHORT], "prompt 0: "),
    "nothing for a flag": (["--prompt", "a", "--adapter", ""], "--adapter: empty."),
    "no prompts named": (["--prompts", ""], "--prompts: empty."),
    "a long name": (["--prompt", "a", "--output", "x" * 300], "--output: File name too long."),
    "a link to nowhere": (["--prompt", "a", "--output", "link"], "--output: link exists already"),
    "a batch of none": (
        ["--prompt", "a", "--batch-size", "4", "strategy=contrastive_search"],
        "--batch-size: contrastive_search takes one prompt after the other.",
    ),
    "a strategy beside a lab": (
        ["--prompt", "a", "--lab", "empty.yaml", "strategy=sample"],
        "strategy: does not go with --lab",
    ),
    "no token": (["--prompt", "a", "suppress_tokens=[99999]", SHORT], "suppress_tokens: 99999 is"),
    "no word of tokens": (
        ["--prompt", "a", "force_words_ids=[[3, 99999]]", SHORT],
        "force_words_ids: 99999 is no token of a vocabulary of",
    ),
    "no bias of tokens": (
        ["--prompt", "a", "sequence_bias=[[[99999], 1.0]]", SHORT],
        "sequence_bias: 99999 is no token",
    ),
    "more candidates than tokens": (
        ["--prompt", "a", "strategy=contrastive_search", "top_k=9999", SHORT],
        "top_k: 9999 is above the vocabulary of",
    ),
    "an EOS as a word": (
        ["--prompt", "a", "force_words_ids=[[1]]", SHORT],
        "force_words_ids: holds an EOS",
    ),
    "a word that ends it": (
        ["--prompt", "a", "force_words=[fruit]", "stop_strings=r", SHORT],
        "force_words: ' fruit' holds 'r', which ends the answer.",
    ),
    "a stop that is no text": (
        ["--prompt", "a", "stop_strings=</s>", SHORT],
        "stop_strings: </s> is a token of control",
    ),
    "no draft model": (
        ["--prompt", "a", "assistant_model=models/absent", SHORT],
        "assistant_model: no folder models/absent",
    ),
    "beyond the context with the answer": (["--prompt", "a", "max_new_tokens=255"], "prompt 0: "),
    "a layer that is not there": (
        ["--prompt", "a", "dola_layers=[2]", SHORT],
        "dola_layers: 2 is not below the last layer, 2.",
    ),
    "no room for the words": (
        ["--prompt", "a", "force_words=[Name a fruit]", "max_new_tokens=2"],
        "force_words: they are ",
    ),
    "a draft of other tokens": (
        ["--prompt", "a", "assistant_model=OTHER", SHORT],
        "assistant_model: ",
    ),
}


@pytest.fixture(scope="module")
def other_tokens(tiny_checkpoint, tmp_path_factory):
    """The same model with another token in its tokenizer."""
    import shutil

    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("other") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return folder


def test_there_are_enough_wrong_calls():
    assert len(WRONG) >= 30


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_line_and_writes_nothing(here, capsys, other_tokens, name):
    arguments, begins = WRONG[name]
    arguments = [argument.replace("OTHER", str(other_tokens)) for argument in arguments]
    (here / "empty.txt").write_text("\n")
    (here / "empty.yaml").write_text("generation: {}\n")
    (here / "bad.yaml").write_text(BAD_LAB)
    (here / "link").symlink_to("nowhere")
    before = listing(here)
    capsys.readouterr()
    assert in_process(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = whole_lines(said.err.rstrip("\n"))
    assert line.startswith(begins), line
    assert listing(here) == before


def test_every_problem_of_a_lab_has_its_line(here, capsys):
    (here / "bad.yaml").write_text(BAD_LAB)
    assert in_process("--prompt", "a", "--lab", "bad.yaml", "seed=x") == 2
    assert whole_lines(capsys.readouterr().err.rstrip("\n")) == [
        "bad.yaml:7: strategies.nothing: expected keys, such as {strategy: greedy_search}."
    ]
    (here / "bad.yaml").write_text(BAD_LAB.replace("  nothing: 3\n", ""))
    assert in_process("--prompt", "a", "--lab", "bad.yaml") == 2
    first, second = whole_lines(capsys.readouterr().err.rstrip("\n"))
    assert first.startswith("bad.yaml:1: generation.top_p: greedy_search would ignore it.")
    assert second.startswith("bad.yaml:6: strategies.nucleus.top_k: expected a whole number")


def test_keys_of_the_command_line_hold_for_the_whole_lab(here, capsys):
    (here / "lab.yaml").write_text(
        "generation: {max_new_tokens: 9}\nstrategies:\n  a: {strategy: greedy_search}\n"
        "  b: {strategy: sample, max_new_tokens: 7}\n"
    )
    arguments = ["--prompt", "a", "--lab", "lab.yaml", "--output", "-", "max_new_tokens=2"]
    assert in_process(*arguments) == 0
    strategies = json.loads(capsys.readouterr().out)["strategies"]
    assert {s["settings"]["max_new_tokens"] for s in strategies.values()} == {2}
    assert in_process("--prompt", "a", "--lab", "lab.yaml", "top_p=0.5") == 2
    (line,) = whole_lines(capsys.readouterr().err.rstrip("\n"))
    assert line.startswith("top_p: greedy_search would ignore it.")


def test_all_problems_come_in_one_report(here, capsys):
    arguments = ["--prompts", "absent.txt", "--shots", "x =>", "--with", "x", "top_p=2", "zz=1"]
    assert in_process(*arguments) == 2
    lines = whole_lines(capsys.readouterr().err.rstrip("\n"))
    assert [line.split(":")[0] for line in lines] == [
        "--with", "top_p", "zz", "--shots", "--prompts",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        ["force_words=[fruit]", "suppress_tokens=ALL"],
        ["suppress_tokens=ALL"],
        ["strategy=sample", "suppress_tokens=ALL"],
        ["strategy=contrastive_search", "suppress_tokens=ALL"],
        ["strategy=beam_search", "suppress_tokens=ALL"],
    ],
)
def test_what_cannot_be_answered_fails_and_leaves_no_file(here, capsys, keys):
    every = f"suppress_tokens=[{', '.join(map(str, range(384)))}]"
    keys = [every if key.endswith("ALL") else key for key in keys]
    assert in_process("--prompt", "a", "--output", "a.jsonl", SHORT, *keys) == 3
    said = capsys.readouterr().err
    assert "every token is ruled out" in said or "no answer contains all of force_words" in said
    assert "Traceback" not in said
    assert not (here / "a.jsonl").exists()


def test_what_does_not_go_with_a_conversation(here, capsys):
    arguments = ["--chat", "--output", "a", "--with", "base", "--lab", "x", "--batch-size", "2"]
    assert in_process(*arguments) == 2
    lines = whole_lines(capsys.readouterr().err.rstrip("\n"))
    for flag in ("--output", "--with", "--lab", "--batch-size"):
        assert f"{flag}: has no effect with --chat. Leave one out." in lines
    assert in_process("--chat", "strategy=sample", "num_return_sequences=2") == 2
    assert "num_return_sequences: a conversation goes on from one" in capsys.readouterr().err


def test_columns_that_nobody_reads_are_named(here, capsys):
    (here / "p.jsonl").write_text('{"prompt": "a", "output": "b", "id": 3}\n')
    assert in_process("--prompts", "p.jsonl", SHORT) == 0
    assert "columns not used: id, output" in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_alone_gets_escapes(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    child = started(
        here, "--prompt", "é", SHORT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert r"\xb7" in errors


def test_without_any_adapter_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert in_process("--prompt", "a") == 2
    assert "Run `make train`" in capsys.readouterr().err


def test_a_mistake_is_told_before_anything_heavy_is_imported(here):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['recipe/generate.py', '--prompt', 'a', 'temperature=0.7']\n"
        "try:\n    runpy.run_path('recipe/generate.py', run_name='__main__')\n"
        "except SystemExit as stopped:\n    print(stopped.code)\n"
        "print({'torch', 'transformers', 'peft', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == ["2", "set()"], result.stderr


def started(here, *arguments, **named):
    command = [sys.executable, str(REPOSITORY / "recipe/generate.py"), *arguments]
    return subprocess.Popen(command, cwd=here, text=True, **named)


def test_ctrl_c_keeps_what_there_is(here):
    """Sent as soon as the first answer is on the disk; each takes 200 tokens without an EOS."""
    child = started(
        here,
        *["--prompts", "-", "--output", "a.jsonl", "--batch-size", "1"],
        *["max_new_tokens=200", "min_new_tokens=200"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdin.write("Name a fruit.\n" * 500)
    child.stdin.close()
    file = here / "a.jsonl"
    until(lambda: file.is_file() and file.read_text().count("\n") >= 2)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    assert child.stderr.read().rstrip().endswith("stopped")
    *whole, last = [json.loads(line) for line in file.read_text().splitlines()]
    assert 2 <= len(whole) < 499
    assert {r["finish_reason"] for r in whole} == {"length"}
    assert last["finish_reason"] in ("interrupted", "length")
    assert [r["index"] for r in [*whole, last]] == list(range(len(whole) + 1))


def until(ready, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Terminal:
    """generate.py --chat in a terminal of its own."""

    def __init__(self, here, *arguments):
        self.end, inner = pty.openpty()
        self.child = started(
            here, "--chat", *arguments, stdin=inner, stdout=inner, stderr=inner,
            env={**os.environ, "TERM": "dumb"}, start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self.text = ""

    def read(self, wanted, seconds=120):
        """Everything up to and with ``wanted``."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.end], [], [], 0.1)[0]:
                self.text += os.read(self.end, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(wanted)
        return before

    def say(self, line):
        os.write(self.end, f"{line}\n".encode())


def test_a_conversation_in_a_terminal(here):
    name = json.loads(Path("runs/tiny/adapter/recipe.json").read_text())["base"]["name_or_path"]
    terminal = Terminal(here, "--adapter", "none", "--model", name, "max_new_tokens=20")
    head = terminal.read("> ")
    assert "chat template, greedy_search max_new_tokens=20" in head
    terminal.say("Name a fruit.")
    first = terminal.read("tokens/s)")
    terminal.say("Name a fruit.")
    second = terminal.read("tokens/s)")
    assert answer(first) != answer(second)  # it sees the first turn
    terminal.say("/reset")
    terminal.read("> ")
    terminal.say("Name a fruit.")
    assert answer(terminal.read("tokens/s)")) == answer(first)
    terminal.say("a " * 300)
    assert "do not fit into the model's context" in terminal.read("/reset forgets")
    terminal.say("/exit")
    assert terminal.child.wait(timeout=60) == 0


def answer(screen):
    """The lines between the echo of the question and the reason."""
    return screen.split("Name a fruit.")[-1].rpartition("(")[0].strip()
