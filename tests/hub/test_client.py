"""The process of the genuine client: what it is given, what it gives back, and its end."""

import pytest

from tests.hub.client import TimedOut
from tests.hub.server import ALICE


@pytest.fixture
def run(client, tmp_path):
    def run(code, **named):
        file = tmp_path / "code.py"
        file.write_text(code)
        return client.run(file, **named)

    return run


def test_a_command_of_the_recipe(client, tmp_path):
    wrong = client.call("recipe.train", ["--config", "nowhere.yaml"], cwd=tmp_path)
    assert (wrong.code, wrong.out) == (2, "")
    assert "nowhere.yaml" in wrong.err
    helped = client.call("recipe.train", ["--help"])
    assert helped.code == 0
    assert helped.out.startswith("usage: train.py")


def test_a_token_is_there_for_its_call_alone(run):
    code = "import os; print(os.environ.get('HF_TOKEN'), os.environ.get('HF_HUB_OFFLINE'))"
    assert run(code, token=ALICE).out == f"{ALICE} None\n"
    assert run(code).out == "None None\n"


def test_arguments_and_folder(run, tmp_path):
    answer = run("import os, sys; print(sys.argv[1:], os.getcwd())", argv=["a", "b c"])
    assert answer.out.startswith("['a', 'b c'] /")
    answer = run("import os; print(os.getcwd())", cwd=tmp_path)
    assert answer.out == f"{tmp_path}\n"


def test_what_is_caught(run):
    """Python's own streams, those of what it starts, and a handler made in an earlier call."""
    answer = run("import os; print('one'); os.system('echo two; echo three >&2')")
    assert sorted(answer.out.split()) == ["one", "two"]
    assert answer.err == "three\n"
    said = "from huggingface_hub.utils import logging\nlogging.get_logger('x').warning('four')"
    assert run(said).err.strip() == "four"
    assert run("print('Grüße, 世界')").out == "Grüße, 世界\n"
    assert run("pass").out == ""


@pytest.mark.parametrize(
    ("code", "ends", "err"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('words')", 1, "words\n"),
        ("input()", 1, "EOFError: EOF when reading a line\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_how_code_ends(run, code, ends, err):
    answer = run(code)
    assert answer.code == ends
    assert answer.err.endswith(err)


@pytest.mark.parametrize(
    ("ending", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_a_process_that_dies_is_an_answer_and_another_one_starts(run, ending, code):
    answer = run(f"import os, signal; print('so far', flush=True); {ending}")
    assert (answer.code, answer.out) == (code, "so far\n")
    assert run("print('again')").out == "again\n"


def test_a_call_that_takes_too_long(run):
    with pytest.raises(TimedOut, match="so far"):
        run("import time; print('so far', flush=True); time.sleep(60)", timeout=1)
    assert run("print('again')").out == "again\n"


def test_it_reaches_loopback_only(run):
    # RFC 5737: an address for documentation, which nobody has.
    answer = run("import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)")
    assert answer.code == 1
    assert "the tests use no network" in answer.err


def test_nothing_is_remembered(hub, client, python):
    hub.create("alice/one", {"a.txt": b"1"})
    python("hf_hub_download('alice/one', 'a.txt'); login('hf_alice_writes')")
    assert list((client.home / "hub").iterdir())
    client.forget()
    assert not list(client.home.iterdir())
    said = python("say(failure(hf_hub_download, 'alice/one', 'a.txt', local_files_only=True)[0])")
    assert said == "LocalEntryNotFoundError"
    assert python("say(failure(api.whoami)[0])", token=None) == "LocalTokenNotFoundError"
