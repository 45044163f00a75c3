"""Contrastive search against greedy search and a reference that computes everything anew."""

import pytest
import torch
import torch.nn.functional as F

from recipe.decoding.contrastive import contrastive_search
from tests.decoding.toys import EOS, parts, steps, stop, toy

PROMPT = [3, 1, 7]


def reference(model, length, *, top_k, penalty_alpha):
    """Equation 5 of Su et al., the whole text read once for each candidate."""
    text = list(PROMPT)
    while len(text) < len(PROMPT) + length:
        with torch.no_grad():
            read = model(torch.tensor([text]), output_hidden_states=True)
        states = read.hidden_states[-1][0]
        probabilities = read.logits[0, -1].softmax(-1)
        best = None
        for token in probabilities.topk(top_k).indices.tolist():
            with torch.no_grad():
                state = model(torch.tensor([[*text, token]]), output_hidden_states=True)
            state = state.hidden_states[-1][0, -1]
            likeness = max(float(F.cosine_similarity(state, old, dim=0)) for old in states)
            score = (1 - penalty_alpha) * float(probabilities[token]) - penalty_alpha * likeness
            if best is None or score > best[0]:
                best = (score, token)
        text.append(best[1])
        if best[1] == EOS:
            break
    return text[len(PROMPT) :]


@torch.no_grad()
def search(model, length, use_cache=True, **named):
    return contrastive_search(
        *parts(model, PROMPT, length, hidden_states=True, use_cache=use_cache), **named
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("top_k", "penalty_alpha"), [(2, 0.6), (4, 0.3), (8, 0.9), (12, 1.0)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_it_is_the_papers(seed, top_k, penalty_alpha, use_cache):
    model = toy(vocabulary=12, seed=seed, spread=0.3)
    named = {"top_k": top_k, "penalty_alpha": penalty_alpha}
    ids, reason = search(model, 10, use_cache, **named)
    assert ids == reference(model, 10, **named)
    assert reason == ("eos" if ids[-1] == EOS else "length")


@pytest.mark.parametrize("seed", range(4))
def test_without_a_penalty_it_is_greedy(seed):
    model = toy(vocabulary=12, seed=seed, spread=0.3)
    ids, _ = search(model, 10, top_k=5, penalty_alpha=0.0)
    text = steps(model, PROMPT)
    greedy = []
    while not greedy or stop(10).reason(greedy) is None:
        with torch.no_grad():
            greedy.append(int(text.read()[0].argmax()))
        text.append(torch.tensor(greedy[-1:]))
    assert ids == greedy


def test_the_penalty_changes_the_answer():
    model = toy(vocabulary=12, seed=1, spread=0.3)
    answers = {tuple(search(model, 10, top_k=6, penalty_alpha=a)[0]) for a in (0.0, 0.5, 1.0)}
    assert len(answers) > 1
