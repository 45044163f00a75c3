"""Sampling: what may be drawn, in which order filters apply, and how a draw is made."""

import math
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as library

from recipe.answerer import load_answerer
from recipe.data.prompts import Prompt
from recipe.decoding.sampling import Draw, generator_of
from recipe.settings import generation_settings

# In the order in which transformers applies them.
FILTERS = {
    "repetition_penalty": (1.2, library.RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": (3, library.NoRepeatNGramLogitsProcessor),
    "min_new_tokens": (2, library.MinNewTokensLengthLogitsProcessor),
    "suppress_tokens": ([5], library.SuppressTokensLogitsProcessor),
    "temperature": (0.7, library.TemperatureLogitsWarper),
    "top_h": (0.9, library.TopHLogitsWarper),
    "top_k": (20, library.TopKLogitsWarper),
    "top_p": (0.9, library.TopPLogitsWarper),
    "min_p": (0.02, library.MinPLogitsWarper),
    "typical_p": (0.95, library.TypicalLogitsWarper),
    "epsilon_cutoff": (0.001, library.EpsilonLogitsWarper),
    "eta_cutoff": (0.001, library.EtaLogitsWarper),
}


@pytest.fixture(scope="module")
def answerer(tiny_checkpoint):
    return load_answerer(
        adapter="none", model=str(tiny_checkpoint), template="raw", runs=Path("absent")
    )


def processors(answerer, **given):
    decoder = answerer.decoder(generation_settings({"strategy": "sample", **given}))
    return decoder.steps(answerer.encode([Prompt(0, "Name a fruit.")]))


@pytest.mark.parametrize("names", [[name] for name in FILTERS] + [list(FILTERS)])
def test_each_filter_is_there_in_its_place_and_no_other(answerer, names):
    _, found = processors(answerer, **{name: FILTERS[name][0] for name in names})
    # The library states a minimum twice, as a length with the prompt and as one without.
    types = [type(one) for one in found if type(one) is not library.MinLengthLogitsProcessor]
    assert types == [FILTERS[name][1] for name in names]


def test_without_filters_everything_may_be_drawn(answerer):
    """The library's old default, top_k 50, is gone, and nothing of the checkpoint's is taken."""
    _, found = processors(answerer)
    assert list(found) == []


CUTS = {
    "top_k": [1, 2, 7],
    "top_p": [0.01, 0.3, 0.9],
    "min_p": [0.99, 0.5],
    "typical_p": [0.2, 0.8],
    "epsilon_cutoff": [0.004],
    "eta_cutoff": [0.004],
}
MIXED = [
    {"temperature": 0.5, "top_k": 9, "top_p": 0.5},
    {"temperature": 2.0, "min_p": 0.4, "typical_p": 0.9},
    {"top_p": 0.8, "epsilon_cutoff": 0.003, "eta_cutoff": 0.002, "top_k": 30},
]


def allowed(answerer, ids, given):
    """The tokens that the formulas leave, in plain Python, one filter after the other."""
    with torch.no_grad():
        logits = answerer.model(torch.tensor([ids])).logits[0, -1].double()
    logits = logits / given.get("temperature", 1.0)
    kept = set(range(len(logits)))

    def probabilities():
        weights = {t: math.exp(float(logits[t])) for t in kept}
        total = sum(weights.values())
        return {t: w / total for t, w in weights.items()}

    def until(ordered, share):
        taken, total, p = set(), 0.0, probabilities()
        for token in ordered:
            if total >= share and taken:
                break
            taken.add(token)
            total += p[token]
        return taken

    if "top_k" in given:
        kept = set(sorted(kept, key=lambda t: -logits[t])[: given["top_k"]])
    if "top_p" in given:
        kept = until(sorted(kept, key=lambda t: -logits[t]), given["top_p"])
    if "min_p" in given:
        p = probabilities()
        kept = {t for t in kept if p[t] >= given["min_p"] * max(p.values())}
    if "typical_p" in given:
        p = probabilities()
        entropy = -sum(x * math.log(x) for x in p.values())
        kept = until(sorted(kept, key=lambda t: abs(-math.log(p[t]) - entropy)), given["typical_p"])
    if "epsilon_cutoff" in given:
        p = probabilities()
        kept = {t for t in kept if p[t] >= given["epsilon_cutoff"]} or {max(p, key=p.get)}
    if "eta_cutoff" in given:
        p = probabilities()
        entropy = -sum(x * math.log(x) for x in p.values())
        least = min(given["eta_cutoff"], math.sqrt(given["eta_cutoff"]) * math.exp(-entropy))
        kept = {t for t in kept if p[t] >= least} or {max(p, key=p.get)}
    return kept


@pytest.mark.parametrize(
    "given", [{name: value} for name, values in CUTS.items() for value in values] + MIXED, ids=str
)
def test_only_what_the_filters_leave_is_drawn_and_all_of_it(answerer, given):
    settings = generation_settings({"strategy": "sample", "max_new_tokens": 1, **given})
    settings = settings.model_copy(update={"values": {**settings.values}})
    prompts = [Prompt(i, "Name a fruit.") for i in range(3000)]
    encoded = answerer.encode(prompts[:1])
    encoded = [type(encoded[0])(i, encoded[0].ids) for i in range(3000)]
    answers = answerer.decoder(settings).answers(encoded, batch_size=3000)
    drawn = {answer.ids[0] for (answer,) in answers}
    left = allowed(answerer, encoded[0].ids, given)
    assert drawn <= left
    # 3000 draws of at most 30 tokens find each that is not very rare.
    assert len(left) > 30 or drawn == left or len(drawn) >= 0.8 * len(left)


def test_draws_follow_the_distribution():
    scores = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -1.0]])
    draw = Draw(["0:0"])
    drawn = torch.cat([draw(scores, [0]) for _ in range(20_000)])
    counts = torch.bincount(drawn, minlength=5).double()
    expected = scores[0].double().softmax(-1) * 20_000
    assert counts[1] == 0
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < 16.3  # 0.1 % of 3 degrees of freedom


@pytest.mark.parametrize("number", [0.0, 0.25, 0.6, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_never_outside_it(monkeypatch, number):
    """What cannot be drawn is not, though it stands first, last and in the middle."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([number], dtype=torch.float64))
    scores = torch.full((1, 6), -torch.inf)
    scores[0, [1, 2, 4]] = torch.tensor([0.5, 0.25, 0.25]).log()
    token = int(Draw(["k"])(scores, [0]))
    assert token == {0.0: 1, 0.25: 1, 0.6: 2, 1 - 2**-53: 4}[number]


def test_keys_have_numbers_of_their_own():
    first = [torch.rand(1, generator=generator_of(f"0:{i}")).item() for i in range(200)]
    assert len(set(first)) == 200
    assert torch.rand(1, generator=generator_of("0:7")).item() == first[7]


@pytest.mark.parametrize("strategy", ["dola_generation", "assisted_generation"])
def test_they_sample_where_asked(answerer, strategy):
    def answer(**given):
        settings = generation_settings({"strategy": strategy, "max_new_tokens": 12, **given})
        encoded = answerer.encode([Prompt(0, "Name a fruit.")])
        return next(iter(answerer.decoder(settings).answers(encoded, batch_size=1)))[0].ids

    layers = {"dola_layers": [0]} if strategy == "dola_generation" else {}
    greedy = answer(**layers)
    drawn = [answer(**layers, do_sample=True, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert greedy not in drawn
    assert drawn[0] != drawn[2]


def test_the_library_reads_no_default_into_what_is_not_set():
    assert GenerationConfig().top_k is None
