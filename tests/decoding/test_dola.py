"""DoLa against the formulas of its paper, on the raw hidden states."""

import math

import pytest
import torch
from transformers import LlamaConfig

from recipe.decoding.dola import candidate_layers, contrast, dola_scores
from recipe.settings import UserError
from tests.decoding.toys import toy


def reference(last, earlier):
    """Equations 2 to 5 for one position, in Python's own floats.

    Args:
        last: logits of the last layer; earlier: a list of logits for each candidate layer.
    """

    def probabilities(logits):
        weights = [math.exp(x - max(logits)) for x in logits]
        return [w / sum(weights) for w in weights]

    def divergence(p, q):
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        kl = [sum(x * math.log(x / y) for x, y in zip(d, m, strict=True)) for d in (p, q)]
        return sum(kl) / 2

    q_last = probabilities(last)
    layers = [probabilities(logits) for logits in earlier]
    chosen = max(range(len(layers)), key=lambda j: divergence(q_last, layers[j]))
    return [
        math.log(p / layers[chosen][x]) if p >= 0.1 * max(q_last) else -math.inf
        for x, p in enumerate(q_last)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layers", [[0], [2], [0, 1, 2, 3], [1, 3]])
def test_scores_are_the_papers(seed, layers):
    model = toy(vocabulary=11, seed=seed, spread=0.3)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [4, 4, 4, 4]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        found = dola_scores(output, model, layers)
        for row in range(3):
            earlier = [
                model.lm_head(output.hidden_states[layer][row, -1]).tolist() for layer in layers
            ]
            expected = reference(output.logits[row, -1].tolist(), earlier)
            assert found[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_rows_choose_their_layers_by_themselves():
    """transformers 4 took one layer for the whole batch."""
    last = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    like, unlike = torch.tensor([0.0, 1.0, 1.9]), torch.tensor([4.0, 0.0, 0.0])
    earlier = torch.stack([torch.stack([like, unlike]), torch.stack([unlike, like])])
    together = contrast(last, earlier)
    for row in range(2):
        assert torch.equal(
            together[row], contrast(last[row : row + 1], earlier[:, row : row + 1])[0]
        )
    assert torch.equal(together[0], together[1])


def config(layers, tied=False):
    return LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied)


@pytest.mark.parametrize(
    ("asked", "layers", "tied", "expected"),
    [
        ("low", 32, False, [*range(0, 16, 2)]),  # the paper's two buckets of LLaMA-7B
        ("high", 32, False, [*range(16, 32, 2)]),
        ("low", 80, False, [*range(0, 20, 2)]),
        ("high", 80, False, [*range(60, 80, 2)]),
        ("low", 30, True, [*range(2, 15, 2)]),
        ("high", 30, True, [*range(15, 30, 2)]),
        ("low", 2, True, [1]),
        ([7, 3, 3], 8, False, [3, 7]),
    ],
)
def test_candidate_layers(asked, layers, tied, expected):
    assert candidate_layers(asked, config(layers, tied)) == expected


def test_the_last_layer_is_no_candidate():
    with pytest.raises(UserError, match="dola_layers: 8 is not below the last layer, 8"):
        candidate_layers([3, 8], config(8))
