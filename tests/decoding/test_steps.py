"""A row of a padded batch is computed as if it were alone, with a cache and without."""

import pytest
import torch
from transformers import LlamaForCausalLM

from recipe.decoding.steps import Steps
from recipe.decoding.task import Encoded, left_padded
from recipe.settings import RunFailed

PROMPTS = [[5, 9, 200, 31], [7], [300, 301, 302, 303, 304, 305, 306, 12], [11, 12]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return LlamaForCausalLM.from_pretrained(tiny_checkpoint).eval()


@torch.no_grad()
def grown(steps, tokens):
    """Logits of each step while ``tokens`` are appended, one list a step."""
    logits = [steps.read()[0]]
    for column in tokens:
        steps.append(torch.tensor(column))
        logits.append(steps.read()[0])
    return logits


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_is_computed_as_if_it_were_alone(model, use_cache):
    ids, mask = left_padded(
        [Encoded(i, p) for i, p in enumerate(PROMPTS)], pad=1, device=torch.device("cpu")
    )
    columns = [[3, 4, 5, 6], [8, 8, 9, 10]]
    together = grown(Steps(model, ids, mask, use_cache=use_cache), columns)
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for step, logits in enumerate(together):
            with torch.no_grad():
                alone = model(torch.tensor([text])).logits[0, -1]
            assert torch.allclose(logits[row], alone, atol=1e-4), (row, step)
            if step < len(columns):
                text.append(columns[step][row])


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_can_be_left_out_doubled_and_reordered(model, use_cache):
    ids, mask = left_padded(
        [Encoded(i, p) for i, p in enumerate(PROMPTS)], pad=1, device=torch.device("cpu")
    )
    steps = Steps(model, ids, mask, use_cache=use_cache)
    with torch.no_grad():
        steps.read()
        steps.append(torch.tensor([3, 4, 5, 6]))
        steps.read()
        steps.select(torch.tensor([2, 0, 2]))
        steps.append(torch.tensor([20, 21, 22]))
        logits, _ = steps.read()
        for row, text in enumerate(
            ([*PROMPTS[2], 5, 20], [*PROMPTS[0], 3, 21], [*PROMPTS[2], 5, 22])
        ):
            assert torch.allclose(logits[row], model(torch.tensor([text])).logits[0, -1], atol=1e-4)


@torch.no_grad()
def test_positions_count_from_a_rows_own_first_token(model):
    """RoPE looks at distances alone, so the logits would not show it."""
    ids, mask = left_padded(
        [Encoded(i, p) for i, p in enumerate(PROMPTS)], pad=1, device=torch.device("cpu")
    )
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    try:
        steps = Steps(model, ids, mask)
        steps.read()
        steps.append(torch.tensor([3, 4, 5, 6]))
        steps.read()
    finally:
        handle.remove()
    for row, prompt in enumerate(PROMPTS):
        assert seen[0][row, -len(prompt) :].tolist() == list(range(len(prompt)))
        assert seen[1][row].tolist() == [len(prompt)]


def test_nan_ends_it(model):
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RunFailed, match="logits are NaN"):
        Steps(broken, torch.tensor([[1, 2]]), None).read()
