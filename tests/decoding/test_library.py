"""Token for token what transformers does, where it still has the strategy; starter model."""

import functools

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from recipe.answerer import load_answerer
from recipe.data.prompts import Prompt
from recipe.settings import generation_settings

TASKS = ["Name", "Describe", "Why do people like", "Write a short poem about", "List facts about"]
THINGS = [
    "the sea", "a red house", "music", "the number 7", "rain in spring", "old trains", "bread",
    "a friend who moved to another town last year", "cats", "the moon",
]  # fmt: skip
QUESTIONS = [f"{task} {thing}." for task in TASKS for thing in THINGS]


@pytest.fixture(scope="module")
def answerer(starter, tmp_path_factory):
    return load_answerer(
        adapter="none", model=str(starter), template=None, runs=tmp_path_factory.mktemp("runs")
    )


@pytest.fixture(scope="module")
def expected(answerer):
    """The library's answers by its settings: several strategies are to give the same ones."""
    model = LlamaForCausalLM.from_pretrained(answerer.model.name_or_path)
    encoded = answerer.encode([Prompt(i, question) for i, question in enumerate(QUESTIONS)])

    @functools.cache
    def answers(*given):
        return [library(model, prompt.ids, **dict(given)) for prompt in encoded]

    return answers


def library(model, ids, **given):
    """One prompt at a time, as a stranger would call it."""
    prompt = torch.tensor([ids])
    config = GenerationConfig(eos_token_id=2, pad_token_id=2, **given)
    with torch.inference_mode():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config
        )[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"strategy": "sample", "top_k": 1}, {}),
        ({"strategy": "assisted_generation"}, {}),
        ({"strategy": "beam_search", "num_beams": 3}, {"num_beams": 3}),
    ],
    ids=str,
)
def test_fifty_prompts_in_batches_are_fifty_calls_of_the_library(answerer, expected, ours, theirs):
    length = 12
    prompts = [Prompt(i, question) for i, question in enumerate(QUESTIONS)]
    encoded = answerer.encode(prompts)
    settings = generation_settings({"max_new_tokens": length, **ours})
    found = [a for (a, *_) in answerer.decoder(settings).answers(encoded, batch_size=25)]
    by_library = expected(("max_new_tokens", length), *theirs.items())
    for question, answer, alone in zip(QUESTIONS, found, by_library, strict=True):
        assert answer.ids == alone, question


def test_a_few_prompts_are_the_librarys(answerer):
    prompts = [Prompt(i, question) for i, question in enumerate(QUESTIONS[::17])]
    encoded = answerer.encode(prompts)
    settings = generation_settings({"max_new_tokens": 8})
    for prompt, (answer,) in zip(
        encoded, answerer.decoder(settings).answers(encoded, batch_size=3), strict=True
    ):
        assert answer.ids == library(answerer.model, prompt.ids, max_new_tokens=8)


def test_logits_of_a_padded_batch_are_those_of_each_row_alone(answerer):
    encoded = answerer.encode([Prompt(i, question) for i, question in enumerate(QUESTIONS[4::9])])
    decoder = answerer.decoder(generation_settings({}))
    with torch.inference_mode():
        together, _ = decoder.steps(encoded)[0].read()
        for row, prompt in enumerate(encoded):
            alone = answerer.model(torch.tensor([prompt.ids])).logits[0, -1]
            assert (together[row] - alone).abs().max() < 1e-3
