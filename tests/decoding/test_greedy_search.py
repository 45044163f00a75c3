"""Greedy, sampling and what both share: stops, streams, neighbours, settings of the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from recipe.answerer import load_answerer
from recipe.data.prompts import Prompt
from recipe.decoding.stream import Stream
from recipe.settings import UserError, generation_settings

QUESTIONS = ["Name a fruit.", "Count to three.", "a", "What is two plus two? Say it in words.", "?"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """With a generation config that would sample, penalise and search."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("copy") / "tiny")
    config = {"repetition_penalty": 50.0, "num_beams": 3, "do_sample": True, "temperature": 9.0}
    (copy / "generation_config.json").write_text(json.dumps(config))
    return copy


def answerer_of(checkpoint, template=None):
    return load_answerer(
        adapter="none", model=str(checkpoint), template=template, runs=Path("absent")
    )


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return answerer_of(checkpoint)


def ask(answerer, questions, *, batch_size=16, stream=None, **given):
    settings = generation_settings({"max_new_tokens": 12, **given})
    prompts = [Prompt(i, q) for i, q in enumerate(questions)]
    decoder = answerer.decoder(settings)
    found = decoder.answers(answerer.encode(prompts), batch_size=batch_size, stream=stream)
    return [answer for answers in found for answer in answers]


def stock_greedy(checkpoint, ids, length):
    """The argmax of the whole text, token by token."""
    model, text = LlamaForCausalLM.from_pretrained(checkpoint), list(ids)
    while len(text) < len(ids) + length:
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == 1:
            break
    return text[len(ids) :]


@pytest.mark.parametrize("template", ["alpaca", "chat", "raw"])
def test_tokens_are_the_argmax_of_the_stock_model(checkpoint, template):
    answerer = answerer_of(checkpoint, template)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = ask(answerer, QUESTIONS)
    assert len(answers) == len(QUESTIONS)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        text = answerer.template.prompt(question)
        ids = tokenizer(text, add_special_tokens=template != "chat").input_ids
        assert answer.ids == stock_greedy(checkpoint, ids, 12)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.finish_reason == ("eos" if answer.ids[-1] == 1 else "length")


PLAIN = {"greedy": {}, "no cache": {"use_cache": False}}
STEERED = {
    "sample": {"strategy": "sample", "temperature": 1.5, "seed": 3},
    "sample of a few": {"strategy": "sample", "top_k": 3, "repetition_penalty": 1.2},
    "dola": {"strategy": "dola_generation", "dola_layers": [0, 1]},
    "beam": {"strategy": "beam_search"},
    "beam sample": {"strategy": "beam_sample", "seed": 1},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "two samples": {"strategy": "sample", "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", PLAIN | STEERED)
def test_an_answer_does_not_depend_on_its_neighbours(answerer, name):
    given = (PLAIN | STEERED)[name]
    together = ask(answerer, QUESTIONS, **given)
    alone = ask(answerer, QUESTIONS, batch_size=1, **given)
    pairs = ask(answerer, QUESTIONS, batch_size=2, **given)
    assert [a.ids for a in together] == [a.ids for a in alone] == [a.ids for a in pairs]


def test_the_cache_changes_no_token(answerer):
    for given in ({}, *STEERED.values()):
        cached, uncached = (
            ask(answerer, QUESTIONS, **given, use_cache=use_cache) for use_cache in (True, False)
        )
        assert [a.ids for a in cached] == [a.ids for a in uncached]


def test_each_prompt_has_its_own_random_numbers(answerer):
    given = {"strategy": "sample"}
    twice = ask(answerer, ["Name a fruit."] * 2, **given)
    assert twice[0].ids != twice[1].ids
    assert twice[0].ids == ask(answerer, ["Name a fruit."], **given)[0].ids
    assert twice[0].ids != ask(answerer, ["Name a fruit."], **given, seed=1)[0].ids
    torch.manual_seed(5)
    state = torch.get_rng_state()
    several = ask(answerer, ["Name a fruit."], **given, num_return_sequences=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [a.number for a in several] == [0, 1, 2]
    assert several[0].ids == twice[0].ids
    assert len({tuple(a.ids) for a in several}) == 3


def streamed(answerer, question, **given):
    pieces: list[str] = []
    settings = generation_settings({"max_new_tokens": 12, **given})
    stops = answerer.decoder(settings).stop.stop_strings
    stream = Stream(
        answerer.tokenizer,
        pieces.append,
        stop_strings=stops,
        skip_prompt=settings.strategy == "assisted_generation",
    )
    (answer,) = ask(answerer, [question], stream=stream, **given)
    return answer, pieces


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"strategy": "sample", "seed": 2, "max_new_tokens": 60},
        {"strategy": "contrastive_search", "max_new_tokens": 30},
        {"strategy": "dola_generation", "dola_layers": [0], "max_new_tokens": 30},
        {"strategy": "assisted_generation", "prompt_lookup_num_tokens": 2, "max_new_tokens": 30},
    ],
)
def test_the_pieces_of_a_stream_join_to_the_answer(answerer, given):
    for question in QUESTIONS:
        answer, pieces = streamed(answerer, question, **given)
        assert "".join(pieces) == answer.text
        assert len([piece for piece in pieces if piece]) > 1


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(answerer):
    given = {"strategy": "sample", "seed": 4, "max_new_tokens": 60}
    (whole,) = ask(answerer, ["Name a fruit."], **given)
    for begin in range(3, len(whole.text) - 4, 5):
        stop = whole.text[begin : begin + 3]
        if "\ufffd" in stop:  # half a letter, which a later token may complete
            continue
        answer, pieces = streamed(answerer, "Name a fruit.", **given, stop_strings=[stop])
        assert answer.finish_reason == "stop"
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert "".join(pieces) == answer.text
        assert answer.ids == whole.ids[: len(answer.ids)]
        assert len(answer.ids) < len(whole.ids) or begin > len(whole.text) - 8


def test_a_minimum_keeps_the_end_away(answerer):
    given = {"strategy": "sample", "max_new_tokens": 200, "temperature": 3.0}
    questions = ["Name a fruit."] * 8
    assert min(len(a.ids) for a in ask(answerer, questions, **given)) < 200
    (length,) = {len(a.ids) for a in ask(answerer, questions, **given, min_new_tokens=200)}
    assert length == 200


def test_it_ends_at_each_eos_that_the_checkpoint_names(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    plain = answerer_of(copy)
    (answer,) = ask(plain, ["Name a fruit."])
    second = answer.ids[3]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, second]}))
    (shorter,) = ask(answerer_of(copy), ["Name a fruit."])
    assert shorter.ids == answer.ids[: answer.ids.index(second) + 1]
    assert shorter.finish_reason == "eos"


def test_prompts_beyond_the_context_are_named(answerer):
    with pytest.raises(UserError) as raised:
        ask(answerer, ["word " * 300, "fine", "word " * 400])
    first, second = map(str, raised.value.problems)
    assert first.startswith("prompt 0: ")
    assert second.startswith("prompt 2: ")
    assert "do not fit into the model's context of 256" in first
