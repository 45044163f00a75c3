"""Each strategy through the Decoder: what was asked for is what the search gets."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation import candidate_generator

from recipe.decoding.decode import Decoder
from recipe.decoding.task import Encoded
from recipe.settings import generation_settings
from tests.decoding.test_dola import reference as dola_reference
from tests.decoding.toys import EOS, Letters, log_probabilities, toy

PROMPTS = [Encoded(0, [1, 3, 2]), Encoded(1, [5]), Encoded(2, [4, 4, 2, 7, 1])]


class Tokens(Letters):
    """As much of a tokenizer as a Decoder asks for."""

    all_special_tokens = ()


def decoder(model, assistant=None, **given):
    return Decoder(model, Tokens(), generation_settings({"max_new_tokens": 8, **given}), assistant)


def answers(model, prompts=PROMPTS, batch_size=3, **given):
    found = decoder(model, **given).answers(prompts, batch_size=batch_size)
    return [[answer.ids for answer in each] for each in found]


def library(model, prompt, seed=None, **given):
    config = GenerationConfig(
        **{"max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": EOS, **given}
    )
    ids = torch.tensor([prompt.ids])
    if seed is not None:
        torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = out[:, len(prompt.ids) :].tolist()
    return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in found]


def slow(model, prompt, choose, length=8):
    """Token by token from the whole text; ``choose`` gets the text."""
    text = list(prompt.ids)
    while len(text) < len(prompt.ids) + length:
        text.append(choose(text))
        if text[-1] == EOS:
            break
    return text[len(prompt.ids) :]


@pytest.fixture(params=range(3))
def model(request):
    return toy(vocabulary=12, seed=request.param, spread=0.3)


def test_greedy(model):
    expected = [
        [slow(model, p, lambda t: int(log_probabilities(model, t).argmax()))] for p in PROMPTS
    ]
    assert answers(model) == expected


@pytest.mark.parametrize("layers", [[0], [1, 2], "low", "high"])
def test_dola_is_its_formula(model, layers):
    candidates = (
        {"low": [0], "high": [2]}.get(layers, layers) if isinstance(layers, str) else layers
    )

    def choose(text):
        with torch.no_grad():
            read = model(torch.tensor([text]), output_hidden_states=True)
            earlier = [model.lm_head(read.hidden_states[c][0, -1]).tolist() for c in candidates]
        scores = dola_reference(read.logits[0, -1].tolist(), earlier)
        return max(range(len(scores)), key=scores.__getitem__)

    expected = [[slow(model, prompt, choose)] for prompt in PROMPTS]
    assert answers(model, dola_layers=layers) == expected


def test_contrastive_is_its_formula_and_filters_hold(model):
    def choose(text):
        with torch.no_grad():
            states = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
        probabilities = log_probabilities(model, text).exp()
        probabilities[[3, 5]] = 0
        probabilities /= probabilities.sum()
        scores = {}
        for token in probabilities.topk(4).indices.tolist():
            with torch.no_grad():
                read = model(torch.tensor([[*text, token]]), output_hidden_states=True)
            likeness = F.cosine_similarity(read.hidden_states[-1][0, -1][None], states).max()
            scores[token] = 0.3 * float(probabilities[token]) - 0.7 * float(likeness)
        return max(scores, key=scores.get)

    given = {"penalty_alpha": 0.7, "top_k": 4, "suppress_tokens": [3, 5]}
    expected = [[slow(model, prompt, choose)] for prompt in PROMPTS]
    assert answers(model, **given) == expected


def test_what_is_ruled_out_is_no_candidate_however_few_are_left(model):
    allowed = [7, 9]
    given = {"suppress_tokens": [t for t in range(12) if t not in allowed]}
    found = answers(model, strategy="contrastive_search", penalty_alpha=1.0, top_k=6, **given)
    assert {token for (ids,) in found for token in ids} <= set(allowed)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 2.0},
        {"suppress_tokens": [4], "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"min_new_tokens": 5},
        {"num_return_sequences": 3},
        {"renormalize_logits": True, "repetition_penalty": 2.0},
    ],
    ids=str,
)
def test_beams_of_all_kinds_get_what_was_asked(model, given):
    """Groups that nothing keeps apart are each a beam search of their own."""
    expected = [library(model, p, num_beams=3, **given) for p in PROMPTS]
    beam = answers(model, strategy="beam_search", num_beams=3, **given)
    assert beam == expected
    groups = answers(
        model,
        strategy="group_beam_search",
        num_beams=6,
        num_beam_groups=2,
        diversity_penalty=1e-9,
        **{**given, "num_return_sequences": 1},
    )
    assert [each[0] for each in groups] == [each[0] for each in expected]


def test_the_penalty_between_groups_arrives(model):
    given = {"strategy": "group_beam_search", "num_beams": 4, "num_beam_groups": 4}
    apart = answers(model, diversity_penalty=50.0, num_return_sequences=4, **given)
    assert all(len({ids[0] for ids in each}) == 4 for each in apart)


def test_beam_sampling_is_the_librarys_with_the_prompts_own_seed(model):
    from recipe.decoding.sampling import generator_of

    given = {"num_beams": 3, "do_sample": True, "temperature": 1.5}
    for prompt, found in zip(PROMPTS, answers(model, seed=5, **given), strict=True):
        seed = generator_of(f"5:{prompt.index}").initial_seed()
        assert found == library(model, prompt, seed=seed, top_k=0, **given)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_is_used_or_not(model, use_cache):
    lengths = []

    def look(module, arguments, named):
        assert (named["past_key_values"] is not None) == use_cache
        lengths.append(named["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        answers(model, PROMPTS[:1], use_cache=use_cache, min_new_tokens=4, max_new_tokens=4)
    finally:
        handle.remove()
    assert lengths == ([3, 1, 1, 1] if use_cache else [3, 4, 5, 6])


DRAFTS = {
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
}


def test_the_draft_model_drafts_as_asked_and_changes_no_token(model, monkeypatch):
    seen = []
    build = candidate_generator.AssistedCandidateGenerator.__init__

    def spy(self, *arguments, **named):
        build(self, *arguments, **named)
        config = self.assistant_generation_config
        seen.append(tuple(getattr(config, name) for name in DRAFTS))

    monkeypatch.setattr(candidate_generator.AssistedCandidateGenerator, "__init__", spy)
    draft = toy(vocabulary=12, seed=9, spread=0.3)
    given = {"strategy": "assisted_generation", "assistant_model": "a draft", **DRAFTS}
    found = list(decoder(model, draft, **given).answers(PROMPTS, batch_size=1))
    assert [[a.ids for a in each] for each in found] == answers(model)
    assert seen == [tuple(DRAFTS.values())] * len(PROMPTS)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"strategy": "beam_search", "num_beams": 2},
        {"strategy": "beam_sample", "num_beams": 2},
        {"strategy": "assisted_generation", "prompt_lookup_num_tokens": 2},
        {"strategy": "contrastive_search", "penalty_alpha": 0.2},
        {"strategy": "group_beam_search", "num_beams": 2},
    ],
    ids=str,
)
def test_a_stop_string_is_looked_for_in_the_answer_alone(model, given):
    """Letters.decode writes token 1 as b; the prompt ends with one half of the stop string."""
    stops = {}
    for prompt in PROMPTS:
        (whole,) = decoder(model, **given).answers([prompt], batch_size=1)
        text = whole[0].text
        if len(text) < 4:
            continue
        straddling = Letters().decode(prompt.ids)[-1] + text[0]
        stops[prompt.index] = text[2]
        for stop in {straddling, text[2]}:
            ((answer,),) = decoder(model, **given, stop_strings=stop).answers(
                [prompt], batch_size=1
            )
            # Another answer may win when some are cut short, but never one that goes on behind.
            assert stop not in answer.text
            assert answer.finish_reason in ("stop", "eos", "length")
            if "num_beams" not in decoder(model, **given).values:
                assert answer.text == text.split(stop)[0]
    assert stops


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "beam_search", "num_beams": 2},
        {"strategy": "beam_sample", "num_beams": 2},
        {"strategy": "assisted_generation", "prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_the_librarys_loops_end_at_a_stop_string_too(model, given):
    """Every letter is one, so nothing is read behind the first token."""
    reads = []
    handle = model.register_forward_pre_hook(lambda *_: reads.append(1))
    try:
        letters = [Letters().decode([token]) for token in range(1, 12)]
        ((answer,),) = decoder(model, **given, stop_strings=letters, suppress_tokens=[EOS]).answers(
            PROMPTS[:1], batch_size=1
        )
    finally:
        handle.remove()
    assert answer.finish_reason == "stop"
    assert len(answer.ids) == 1
    assert len(reads) <= 2


def test_neighbours_change_nothing_where_a_processor_reads_the_padding(model):
    for given in (
        {"no_repeat_ngram_size": 1, "exponential_decay_length_penalty": [2, 1.6]},
        {"repetition_penalty": 3.0, "exponential_decay_length_penalty": [2, 1.6]},
    ):
        assert answers(model, **given) == answers(model, batch_size=1, **given)


def test_the_models_own_generation_config_decides_nothing(model):
    expected = answers(model)
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, do_sample=True, num_beams=3, repetition_penalty=9.0, max_length=4
    )
    assert answers(model) == expected
    assert isinstance(model, LlamaForCausalLM)
