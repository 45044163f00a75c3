"""Every strategy writes on a GPU what it writes on the CPU."""

import copy

import pytest
import torch

from tests.decoding.test_decoder import PROMPTS, decoder
from tests.decoding.toys import toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STRATEGIES = [
    {},
    {"use_cache": False},
    {"strategy": "sample", "temperature": 1.5, "top_p": 0.9, "seed": 3},
    {"strategy": "beam_search", "num_beams": 3},
    {"strategy": "group_beam_search"},
    {"strategy": "constrained_beam_search", "force_words_ids": [[3, 4], [[7], [8, 9]]]},
    {"strategy": "contrastive_search"},
    {"strategy": "dola_generation"},
    {"strategy": "assisted_generation", "prompt_lookup_num_tokens": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [4]},
]


@pytest.mark.parametrize("given", STRATEGIES, ids=str)
def test_the_device_changes_no_token(given):
    model = toy(vocabulary=12, seed=1, spread=0.3)
    written = [
        [
            [answer.ids for answer in each]
            for each in decoder(one, **given).answers(PROMPTS, batch_size=3)
        ]
        for one in (model, copy.deepcopy(model).to("cuda"))
    ]
    assert written[0] == written[1]


def test_beam_sampling_draws_the_same_twice_and_leaves_the_generator_alone():
    model = copy.deepcopy(toy(vocabulary=12, seed=1, spread=0.3)).to("cuda")
    state = torch.cuda.get_rng_state()
    once, twice = (
        [
            a.ids
            for each in decoder(model, strategy="beam_sample").answers(PROMPTS, batch_size=1)
            for a in each
        ]
        for _ in range(2)
    )
    assert once == twice
    assert torch.equal(torch.cuda.get_rng_state(), state)
