"""The live comparison without its page: what it answers is what generate.py answers."""

import itertools
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from recipe import generate, live
from recipe.answerer import load_answerer
from recipe.exit_codes import run_command
from recipe.settings import generation_settings
from recipe.side_by_side import Asked, Comparer, Said

PROMPT, CONTEXT = "Repeat the word.", "river"


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """By plain peft, so large that no answer of the base survives it."""
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny_checkpoint), lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(adapter, tiny_checkpoint, tmp_path_factory):
    return lambda: load_answerer(
        adapter=str(adapter),
        model=str(tiny_checkpoint),
        template="alpaca",
        runs=tmp_path_factory.mktemp("no-runs"),
    )


@pytest.fixture(scope="module")
def answerer(load):
    return load()


@pytest.fixture(scope="module")
def another(load):
    """The same model once more, which no visitor of the page can reach."""
    return load()


@pytest.fixture
def comparer(answerer):
    return Comparer(answerer)


@pytest.fixture
def generated(another, tmp_path, monkeypatch):
    """generate.py on one prompt: its records by model, or the exit code with which it refuses."""
    monkeypatch.setattr("recipe.answerer.load_answerer", lambda **_: another)

    def ask(*keys, prompt=PROMPT, context=CONTEXT):
        (tmp_path / "p.jsonl").write_text(json.dumps({"instruction": prompt, "input": context}))
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        arguments = ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "a.jsonl")]
        code = run_command(lambda: generate.main([*arguments, "--with", "base,adapter", *keys]))
        if code:
            return code
        lines = (tmp_path / "a.jsonl").read_text().splitlines()
        return {record["model"]: record for record in map(json.loads, lines)}

    return ask


def asked(strategy="greedy_search", prompt=PROMPT, context=CONTEXT, further="", **fields):
    return Asked(prompt, context, strategy, {"max_new_tokens": "12", **fields}, further)


def last(comparer, question, visitor="somebody"):
    """What the page shows in the end; a minute is enough."""
    timer = threading.Timer(60, comparer.stop)
    timer.start()
    *_, state = comparer.compare(question, visitor=visitor)
    timer.cancel()
    return state


@contextmanager
def watched(answerer, look):
    """``look`` is called before each of the model's forward passes, in their thread."""
    plain = answerer.model.get_base_model()
    handle = plain.register_forward_pre_hook(lambda *_: look())
    try:
        yield
    finally:
        handle.remove()


def until(ready, seconds=30):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)


FIELDS = {
    "greedy_search": {},
    "sample": {"temperature": "1.5", "top_p": "0.95", "seed": "7"},
    "beam_search": {"num_beams": "3"},
    "beam_sample": {"num_beams": "2", "temperature": "1.3", "seed": "2"},
    "group_beam_search": {"num_beams": "4", "diversity_penalty": "0.9"},
    "constrained_beam_search": {"force_words": "[fruit]"},
    "contrastive_search": {"penalty_alpha": "0.5", "top_k": "5"},
    "dola_generation": {"dola_layers": "low"},
    "assisted_generation": {"prompt_lookup_num_tokens": "3"},
}


@pytest.mark.parametrize("strategy", FIELDS)
def test_both_answers_are_those_of_generate(comparer, generated, strategy):
    fields = FIELDS[strategy]
    keys = [f"{key}={text}" for key, text in fields.items()]
    expected = generated(f"strategy={strategy}", "max_new_tokens=12", *keys)
    state = last(comparer, asked(strategy, **fields))
    assert state.base.text != state.tuned.text
    for said, record in ((state.base, expected["base"]), (state.tuned, expected["adapter"])):
        assert said.text == record["text"]
        assert said.end.startswith(f"{record['finish_reason']} · {len(record['ids'])} tokens, ")
        assert said.end.endswith(" tokens/s")
    assert state.status == generation_settings(
        {"strategy": strategy, "max_new_tokens": 12}
        | {key: json.loads(text) for key, text in fields.items() if text[0].isdigit()}
        | {"dola_generation": {"dola_layers": "low"}}.get(strategy, {})
        | {"constrained_beam_search": {"force_words": ["fruit"]}}.get(strategy, {})
    ).described  # fmt: skip


def test_the_input_is_asked_with_the_prompt_and_blank_is_none(comparer, generated):
    for context in ("", "a red house"):
        expected = generated("max_new_tokens=12", context=context)
        assert last(comparer, asked(context=context)).tuned.text == expected["adapter"]["text"]
    blank = last(comparer, asked(context=" \n"))
    assert blank.tuned.text == generated("max_new_tokens=12", context="")["adapter"]["text"]


def test_stop_strings_and_other_keys_can_be_typed(comparer, generated):
    whole = generated("max_new_tokens=12")["base"]["text"]
    keys = [f"stop_strings={json.dumps(whole[4:6])}", "repetition_penalty=1.01"]
    expected = generated("max_new_tokens=12", *keys)
    state = last(comparer, asked(further="\n".join(["", *keys, "  "])))
    assert state.base.text == expected["base"]["text"] != whole
    assert state.base.end.startswith("stop · ")


def test_the_base_streams_first_and_then_the_tuned(answerer, comparer):
    with watched(answerer, lambda: time.sleep(0.005)):
        states = list(comparer.compare(asked(), visitor="somebody"))
    assert len({state.base.text for state in states}) > 4
    assert len({state.tuned.text for state in states}) > 4
    for before, after in itertools.pairwise(states):
        assert after.base.text.startswith(before.base.text)
        assert after.tuned.text.startswith(before.tuned.text)
        assert not after.tuned.text or after.base.end
        assert bool(after.base.end) >= bool(before.base.end)


WRONG = {
    "no share": ("sample", {"top_p": "2"}, ""),
    "no number": ("sample", {"temperature": "warm"}, ""),
    "two at once": ("sample", {"temperature": "-1", "top_p": "0"}, "seed=x"),
    "no tokens": ("greedy_search", {"max_new_tokens": "0"}, ""),
    "no whole number": ("greedy_search", {"max_new_tokens": "3.5"}, ""),
    "unknown": ("greedy_search", {}, "temprature=1"),
    "ignored": ("greedy_search", {}, "temperature=0.7"),
    "no key": ("greedy_search", {}, "temperature"),
    "twice": ("sample", {"seed": "1"}, "seed=2"),
    "beyond the vocabulary": ("greedy_search", {}, "suppress_tokens=[99999]"),
    "a layer that is not there": ("dola_generation", {"dola_layers": "[2]"}, ""),
    "beyond the context": ("greedy_search", {"max_new_tokens": "255"}, ""),
    "nothing left": ("greedy_search", {}, f"suppress_tokens={list(range(384))}"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_generate_refuses_is_a_message_in_its_words(comparer, generated, capsys, name):
    strategy, fields, further = WRONG[name]
    typed = {"max_new_tokens": "12", **fields}
    keys = [f"{key}={text}" for key, text in typed.items()] + further.splitlines()
    capsys.readouterr()
    code = generated(f"strategy={strategy}", *keys)
    refused = capsys.readouterr().err.removesuffix("\n")
    states = list(comparer.compare(asked(strategy, further=further, **fields), visitor="a"))
    assert states[-1].status
    if code == 2:
        assert states[-1].status == refused
    else:  # it has said who answers before it failed
        assert code == 3
        assert states[-1].status == refused.splitlines()[-1]
    assert states[-1].base.text == states[-1].tuned.text == ""


OURS = {
    "prompt: empty.": asked(prompt=" \n"),
    "prompt: holds what is no text": asked(prompt="a\0"),
    "input: holds what is no text": asked(context="\0"),
    "strategy: has a field of its own.": asked(further="strategy=sample"),
    "strategy: expected ": asked("best_search"),
    "num_return_sequences: each model shows one": asked("sample", further="num_return_sequences=2"),
    "assistant_model: is loaded once": asked("assisted_generation", further="assistant_model=a"),
}


@pytest.mark.parametrize("begins", OURS)
def test_what_the_page_alone_refuses(comparer, begins):
    (state,) = comparer.compare(OURS[begins], visitor="a")
    assert state.status.startswith(begins)
    assert len(state.status.splitlines()) == 1


def test_all_problems_come_in_one_message(comparer):
    (state,) = comparer.compare(asked("sample", prompt="", top_p="2", further="z=1"), visitor="a")
    assert [line.split(":")[0] for line in state.status.splitlines()] == ["top_p", "z", "prompt"]


def test_fields_of_another_strategy_are_not_looked_at(comparer, generated):
    expected = generated("max_new_tokens=12")
    state = last(comparer, asked(temperature="hot", num_beams="7"))
    assert state.base.text == expected["base"]["text"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"strategy": "sample", "temperature": 0.7, "top_p": 0.9, "seed": 3, "max_new_tokens": 5},
        {"strategy": "sample", "temperature": 1e-2, "typical_p": 0.5, "stop_strings": ["\n", "'"]},
        {"strategy": "greedy_search", "stop_strings": "3", "no_repeat_ngram_size": 3},
        {"strategy": "beam_search", "num_beams": 3, "early_stopping": "never"},
        {"strategy": "beam_search", "early_stopping": True, "length_penalty": -1.0},
        {"strategy": "constrained_beam_search", "force_words": ["red: 'x'", ["a, b", "null"]]},
        {"strategy": "dola_generation", "dola_layers": [0, 1], "do_sample": True, "seed": 2},
        {"strategy": "assisted_generation", "assistant_model": "models/draft"},
    ],
    ids=str,
)
def test_the_page_begins_with_what_the_command_line_said(given):
    settings = generation_settings(given)
    assert Asked.as_given(settings).settings() == settings


LONG = {"max_new_tokens": "100", "further": "min_new_tokens=100"}


@pytest.mark.parametrize("strategy", ["greedy_search", "beam_search", "group_beam_search"])
def test_stop_ends_the_answer_and_what_would_follow(answerer, comparer, generated, strategy):
    calls = []

    def look():
        calls.append(1)
        if len(calls) == 5:
            comparer.stop("me")

    with watched(answerer, look):
        state = last(comparer, asked(strategy, **LONG), visitor="me")
    assert len(calls) == 5
    assert state.base.end.startswith("interrupted · 5 tokens")
    assert state.tuned == Said()
    assert state.status.startswith("Stopped: ")
    if strategy == "greedy_search":
        whole = generated("max_new_tokens=100", "min_new_tokens=100")["base"]["text"]
        assert state.base.text
        assert whole.startswith(state.base.text.rstrip("\ufffd"))
    assert last(comparer, asked()).tuned.text == generated("max_new_tokens=12")["adapter"]["text"]


def test_stop_in_the_tuned_answer_keeps_the_base_one(answerer, comparer, generated):
    calls = []
    expected = generated("max_new_tokens=12", "min_new_tokens=12")["base"]["text"]

    def look():
        calls.append(1)
        if len(calls) == 12 + 3:
            comparer.stop()

    with watched(answerer, look):
        state = last(comparer, asked(further="min_new_tokens=12"))
    assert state.base.text == expected
    assert state.base.end.startswith("length · 12 tokens")
    assert state.tuned.end.startswith("interrupted · 3 tokens")


@pytest.mark.parametrize("leaving", ["closed", "dropped"])
def test_whoever_goes_away_leaves_the_model_free(answerer, comparer, generated, leaving):
    calls = []

    def look():
        calls.append(1)
        time.sleep(0.002)

    with watched(answerer, look):
        states = comparer.compare(asked(**LONG), visitor="gone")
        while not next(states).base.text:
            pass
        if leaving == "closed":
            states.close()
        del states
        gone = len(calls)
        expected = generated("max_new_tokens=12")  # another model: its calls are not counted
        assert last(comparer, asked(further="min_new_tokens=12")).tuned.text
        assert len(calls) - gone <= 2 + 2 * 12
    assert last(comparer, asked()).base.text == expected["base"]["text"]


def test_visitors_at_once_get_what_they_would_get_alone(answerer, comparer, generated):
    """Each forward pass lets the other threads run: without turns the adapters would mix."""
    prompts = ["Name a fruit.", "Count to three.", "Is water wet?", "Greet."]
    alone = {prompt: generated("max_new_tokens=12", prompt=prompt) for prompt in prompts}
    found = {}
    together = threading.Barrier(len(prompts))

    def visit(prompt):
        together.wait()
        for turn in range(2):
            state = last(comparer, asked(prompt=prompt), visitor=prompt)
            found[prompt, turn] = {"base": state.base.text, "adapter": state.tuned.text}

    visitors = [threading.Thread(target=visit, args=[prompt]) for prompt in prompts]
    with watched(answerer, lambda: time.sleep(0.001)):
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join(timeout=60)
    assert found == {
        (prompt, turn): {name: alone[prompt][name]["text"] for name in ("base", "adapter")}
        for prompt in prompts
        for turn in range(2)
    }


def test_who_waits_is_told_so_and_can_stop_waiting(answerer, comparer, generated):
    expected = generated("max_new_tokens=12")["adapter"]["text"]
    begun, go_on = threading.Event(), threading.Event()

    def look():
        begun.set()
        assert go_on.wait(timeout=30)

    found = []
    first = threading.Thread(target=lambda: found.append(last(comparer, asked(), visitor="a")))
    with watched(answerer, look):
        first.start()
        assert begun.wait(timeout=30)
        second = comparer.compare(asked(), visitor="b")
        assert next(second).status.startswith("Somebody else's answers are being written")
        comparer.stop("b")
        assert list(second)[-1].status == "stopped"
        assert first.is_alive()
        go_on.set()
        first.join(timeout=30)
    assert found[0].tuned.text == expected


def test_asking_again_stops_what_the_same_visitor_asked_before(answerer, comparer, generated):
    expected = generated("max_new_tokens=12")["adapter"]["text"]
    found = []
    with watched(answerer, lambda: time.sleep(0.002)):
        before = comparer.compare(asked(**LONG), visitor="a")
        while not next(before).base.text:
            pass
        first = threading.Thread(target=lambda: found.extend(before))
        first.start()
        assert last(comparer, asked(), visitor="a").tuned.text == expected
        first.join(timeout=30)
    assert found[-1].base.end.startswith("interrupted")


def test_a_bug_of_ours_is_no_message_and_leaves_the_model_free(answerer, comparer, generated):
    def look():
        raise ZeroDivisionError("planted")

    with watched(answerer, look), pytest.raises(ZeroDivisionError, match="planted"):
        list(comparer.compare(asked(), visitor="a"))
    expected = generated("max_new_tokens=12")["adapter"]["text"]
    assert last(comparer, asked()).tuned.text == expected


def serve(answerer, **named):
    arguments = {"host": "127.0.0.1", "port": 0, "open_browser": False, **named}
    live.serve(answerer, generation_settings({}), **arguments)


def test_without_gradio_it_says_what_to_do(answerer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run_command(lambda: serve(answerer)) == 2
    said = capsys.readouterr()
    assert said.err == (
        "--live: gradio is not installed. Run make demo, or pip install -e '.[demo]'.\n"
    )
    assert said.out == ""


@pytest.fixture
def without_gradio(monkeypatch):
    """What is refused before gradio has anything to do, is refused."""
    monkeypatch.setattr(live, "require_gradio", lambda: None)
    monkeypatch.setitem(sys.modules, "gradio", None)


@pytest.mark.usefixtures("without_gradio")
def test_an_address_that_cannot_be_had_is_a_message(answerer, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {
            f"--port: {port} on 127.0.0.1 is taken. Name another, or 0 for any free one.": {
                "port": port
            },
            "--port: 65536 is none, expected 0 to 65535, where 0 is any free one. Correct it.": {
                "port": 65536
            },
            "--port: -1 is none, expected 0 to 65535, where 0 is any free one. Correct it.": {
                "port": -1
            },
            "--host: 192.0.2.1 cannot be listened on: Cannot assign requested address. "
            "Name another.": {"host": "192.0.2.1"},
        }
        for said, named in wrong.items():
            assert run_command(lambda named=named: serve(answerer, **named)) == 2
            assert capsys.readouterr() == ("", f"{said}\n")


@pytest.mark.usefixtures("without_gradio")
def test_settings_that_no_page_can_show_are_refused(answerer, capsys):
    for given, begins in (
        ({"strategy": "sample", "num_return_sequences": 2}, "num_return_sequences: each model"),
        ({"suppress_tokens": [99999]}, "suppress_tokens: 99999 is no token"),
        ({"assistant_model": "models/absent"}, "assistant_model: no folder models/absent"),
    ):
        settings = generation_settings(given)
        code = run_command(
            lambda settings=settings: live.serve(
                answerer, settings, host=None, port=None, open_browser=False
            )
        )
        assert code == 2
        assert capsys.readouterr().err.startswith(begins)


def test_a_draft_model_that_is_loaded_can_be_used_and_no_other(answerer, generated):
    draft = answerer.model.get_base_model()
    comparer = Comparer(answerer, assistant=draft, assistant_model="models/draft")
    question = asked("assisted_generation", further="assistant_model=models/draft")
    assert last(comparer, question).base.text == generated("max_new_tokens=12")["base"]["text"]
    other = asked("assisted_generation", further="assistant_model=models/other")
    assert last(comparer, other).status.startswith("assistant_model: is loaded once")
