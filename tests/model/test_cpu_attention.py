"""Attention as one node against stock code, row by row as if each were alone, in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from recipe.model import cpu_attention
from recipe.model.attention import register
from recipe.model.cpu_attention import attend_at_once
from recipe.model.lora import add_lora

HIDDEN, DIM = 36, 8  # not the 48 of six heads
HEADS = {"one of keys": (6, 1), "shared": (6, 2), "each its own": (6, 6)}
ROWS = {
    "rows": ([5, 1, 9], [0, 0, 0]),
    "one row": ([12], [0]),
    "openings": ([9, 4, 1, 6, 3], [0, 5, 6, 0, 6]),
    "several blocks": ([140, 300, 20], [0, 100, 120]),
    "long and short": ([5, 140, 9, 40], [0, 0, 5, 0]),
}


@pytest.fixture
def stock_calls(monkeypatch):
    """How often stock code went forward."""
    calls = []

    def forward(self, *args, **named):
        calls.append(self)
        return own(self, *args, **named)

    own = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    return calls


def layer(
    heads=(6, 2), dtype=torch.float64, implementation="per_row_sdpa", **fields
) -> LlamaAttention:
    register()
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        head_dim=DIM,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        attn_implementation=implementation,
        **fields,
    )
    return LlamaAttention(config, 0).to(dtype)


def exchanged(stock: LlamaAttention) -> LlamaAttention:
    ours = nn.Sequential(copy.deepcopy(stock))
    attend_at_once(ours)
    assert type(ours[0]) is not LlamaAttention
    return ours[0]


def inputs(lengths, openings, dtype=torch.float64):
    """Hidden states, and cos and sin of positions that begin anew in each row."""
    torch.manual_seed(2)
    x = torch.randn(1, sum(lengths), HIDDEN, dtype=torch.float64).to(dtype)
    places = [o + torch.arange(n) for n, o in zip(lengths, openings, strict=True)]
    config = LlamaConfig(hidden_size=HIDDEN, head_dim=DIM, num_attention_heads=6)
    return x, LlamaRotaryEmbedding(config)(x, torch.cat(places)[None])


def there_and_back(module, x, turns, lengths, openings, *, forward=None) -> list[torch.Tensor]:
    """Output and gradients, of ``x`` and the weights."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    forward = forward or module
    y, weights = forward(x, turns, None, row_lengths=lengths, openings=openings)
    assert weights is None
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def by_hand(module, x, turns, lengths, openings) -> list[torch.Tensor]:
    """Each row whole and alone by transformers' and torch's own attention, the mask written out."""
    module = copy.deepcopy(module)
    module.config._attn_implementation = "sdpa"
    x = x.detach().requires_grad_()
    rows, before, start = [], None, 0
    for length, opening in zip(lengths, openings, strict=True):
        own = torch.arange(start, start + length)
        row = own if not opening else torch.cat([before[:opening], own])
        future = torch.full((len(row), len(row)), float("-inf"), dtype=x.dtype).triu(1)
        alone, _ = module(x[:, row], tuple(t[:, row] for t in turns), future[None, None])
        rows.append(alone[:, opening:])
        before, start = row, start + length
    y = torch.cat(rows, 1)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("attention_bias", [False, True])
def test_each_row_is_as_if_alone(stock_calls, rows, heads, attention_bias):
    stock = layer(HEADS[heads], attention_bias=attention_bias)
    given = *inputs(*ROWS[rows]), *ROWS[rows]
    found = there_and_back(exchanged(stock), *given)
    assert stock_calls == []
    expected = by_hand(stock, *given)
    assert len(found) == len(expected) == (10 if attention_bias else 6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("openings", [None, [0, 0, 0]])
def test_no_openings(stock_calls, openings):
    stock, (x, turns) = layer(), inputs([5, 1, 9], [0, 0, 0])
    found = there_and_back(exchanged(stock), x, turns, [5, 1, 9], openings)
    assert stock_calls == []
    for ours, theirs in zip(found, by_hand(stock, x, turns, [5, 1, 9], [0, 0, 0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS)
def test_single_precision_is_about_as_near_to_exact_as_stock_code(rows):
    lengths, openings = ROWS[rows]
    stock = layer()
    exact = by_hand(stock, *inputs(lengths, openings), lengths, openings)
    stock = stock.float()
    given = *inputs(lengths, openings, torch.float32), lengths, openings
    found, expected = there_and_back(exchanged(stock), *given), there_and_back(stock, *given)
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        error, of_stock = (float((t.double() - true).norm() / true.norm()) for t in (ours, theirs))
        assert error < 1e-6
        assert error < 1.5 * of_stock


def test_halves_that_turn_by_different_angles():
    """LlamaRotaryEmbedding gives both halves the same ones; the node does not rest on that."""
    stock, (x, _) = layer(), inputs([7, 4], [0, 0])
    torch.manual_seed(4)
    turns = tuple(torch.randn(1, 11, DIM, dtype=torch.float64) for _ in range(2))
    found = there_and_back(exchanged(stock), x, turns, [7, 4], [0, 0])
    for ours, theirs in zip(found, by_hand(stock, x, turns, [7, 4], [0, 0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", [(), ("q",), ("k",), ("v",), ("q", "v")])
def test_only_what_learns_has_a_gradient(wanted):
    stock = layer().requires_grad_(False)
    for name in wanted:
        getattr(stock, f"{name}_proj").weight.requires_grad_()
    ours, (x, turns) = exchanged(stock), inputs([9, 4], [0, 5])
    y, _ = ours(x, turns, None, row_lengths=[9, 4], openings=[0, 5])
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
        expected, _ = stock(x, turns, None, row_lengths=[9, 4], openings=[0, 5])
        expected.sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is not None) == any(name.startswith(one) for one in wanted)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


class Cache:
    def update(self, keys, values, *_):
        return keys, values


# What is done with the layer, with the arguments and with `_LONGEST`.
OTHERWISE = {
    "a cache": (None, {"past_key_values": Cache()}, None),
    "dropout": (lambda module: setattr(module, "attention_dropout", 0.1), {}, None),
    "a long row": (None, {}, 8),
    "a long row by its opening": (None, {"row_lengths": [5, 4], "openings": [0, 5]}, 8),
    "sdpa": (lambda module: setattr(module.config, "_attn_implementation", "sdpa"), {}, None),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_is_not_the_plain_case_is_stock_codes_bit_by_bit(monkeypatch, stock_calls, what):
    change, named, longest = OTHERWISE[what]
    monkeypatch.setattr(cpu_attention, "_LONGEST", longest or cpu_attention._LONGEST)
    stock, (x, turns) = layer(), inputs([9], [0])
    results = []
    for module in (exchanged(stock), stock):
        if change:
            change(module)
        torch.manual_seed(5)
        results.append(module(x, turns, None, **{"row_lengths": [9], **named})[0])
    assert len(stock_calls) == 2
    assert torch.equal(*results)


def test_the_longest_row_that_is_not_long(monkeypatch, stock_calls):
    monkeypatch.setattr(cpu_attention, "_LONGEST", 9)
    x, turns = inputs([5, 4], [0, 5])
    exchanged(layer())(x, turns, None, row_lengths=[5, 4], openings=[0, 5])
    assert stock_calls == []


@pytest.mark.parametrize(("lengths", "rows"), [([9], 2), ([4, 4], 1), (None, 1)])
def test_borders_that_do_not_fit_are_an_error_as_ever(lengths, rows):
    x, turns = inputs([9], [0])
    ours = exchanged(layer())
    with pytest.raises((ValueError, RuntimeError), match=r"row_lengths|split"):
        ours(x.expand(rows, -1, -1), turns, None, row_lengths=lengths)


def test_turns_of_another_width_or_dtype_are_not_taken():
    x, (cos, sin) = inputs([9], [0])
    ours = exchanged(layer())
    with pytest.raises(RuntimeError, match="size of tensor"):
        ours(x, (cos[..., : DIM // 2], sin[..., : DIM // 2]), None, row_lengths=[9])
    ours = exchanged(layer(dtype=torch.float32))
    half = cos.bfloat16(), sin.bfloat16()
    stock = layer(dtype=torch.float32)
    found, expected = (one(x.float(), half, None, row_lengths=[9])[0] for one in (ours, stock))
    assert torch.equal(found, expected)


def test_dropout_of_attention_is_none_when_nothing_is_trained(stock_calls):
    ours, (x, turns) = exchanged(layer(attention_dropout=0.1)).eval(), inputs([9], [0])
    ours(x, turns, None, row_lengths=[9])
    assert stock_calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_and_autocast_are_left_to_stock_code(stock_calls, dtype):
    ours, (x, turns) = exchanged(layer(dtype=dtype)), inputs([9], [0], dtype)
    ours(x, turns, None, row_lengths=[9])
    assert len(stock_calls) == 1
    ours, (x, turns) = exchanged(layer(dtype=torch.float32)), inputs([9], [0], torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours(x, turns, None, row_lengths=[9])
    assert len(stock_calls) == 2


def test_elsewhere_than_on_a_cpu_it_is_stock_code(stock_calls):
    ours = exchanged(layer(dtype=torch.float32)).to("meta")
    x, turns = inputs([9], [0], torch.float32)
    ours(x.to("meta"), tuple(t.to("meta") for t in turns), None, row_lengths=[9])
    assert len(stock_calls) == 1


def kept_bytes(module, lengths) -> int:
    """Of what autograd keeps beside weights and what is kept for all layers."""
    x, turns = inputs(lengths, [0] * len(lengths), torch.float32)
    elsewhere = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *turns)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = module(x.requires_grad_(), turns, None, row_lengths=lengths)
    assert y.requires_grad  # what is kept lives as long as y does
    return sum(kept.values())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [4, DIM, DIM + 1, 2 * DIM, 2 * DIM + 1, 40, 500])
def test_little_more_is_kept_for_short_rows_and_never_more_for_others(heads, tokens):
    """The result less and, up to 2 · head_dim tokens, the probabilities more."""
    stock = layer(HEADS[heads], torch.float32)
    found, expected = (kept_bytes(one, [tokens] * 3) for one in (exchanged(stock), stock))
    result = 3 * tokens * 6 * DIM * 4
    assert found < expected + (result if DIM < tokens <= 2 * DIM else 0)


def flops(module, lengths, openings) -> int:
    x, turns = inputs(lengths, openings)
    module.requires_grad_(False)
    with FlopCounterMode(display=False) as counted:
        module(x, turns, None, row_lengths=lengths, openings=openings)
    projections = 2 * sum(lengths) * HIDDEN * 2 * (6 * DIM + 2 * DIM)
    return counted.get_total_flops() - projections


@pytest.mark.parametrize(("tokens", "products"), [(2 * DIM, 4), (2 * DIM + 1, 5)])
def test_probabilities_of_a_longer_row_are_computed_again(tokens, products):
    ours, (x, turns) = exchanged(layer()).requires_grad_(False), inputs([tokens], [0])
    query, key, value = (p(x)[0].requires_grad_() for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    layout = cpu_attention._Layout((tokens,), (0,), 3, 1.0)
    turns = (turn[0] for turn in turns)
    y = cpu_attention._Attended.apply(query, key, value, *turns, layout)
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == products * 2 * 6 * DIM * tokens * tokens


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(use_reentrant):
    lengths, openings = ROWS["long and short"]
    stock, (x, turns) = layer(), inputs(lengths, openings)
    ours = exchanged(stock)

    def computed_again(x, turns, mask, **named):
        def whole(x):
            return ours(x, turns, mask, **named)[0]

        return checkpoint(whole, x, use_reentrant=use_reentrant), None

    found = there_and_back(ours, x, turns, lengths, openings)
    again = there_and_back(ours, x, turns, lengths, openings, forward=computed_again)
    for once, twice in zip(found, again, strict=True):
        assert torch.equal(once, twice)


def test_without_gradients_it_is_the_same(stock_calls):
    lengths, openings = ROWS["long and short"]
    ours, (x, turns) = exchanged(layer()), inputs(lengths, openings)
    expected = there_and_back(ours, x, turns, lengths, openings)[0]
    with torch.no_grad():
        y, _ = ours(x, turns, None, row_lengths=lengths, openings=openings)
    assert stock_calls == []
    assert torch.equal(y, expected)


def test_queries_are_own_tokens_and_keys_end_with_their_block(monkeypatch):
    monkeypatch.setattr(cpu_attention, "_BLOCK", 4)
    ours = exchanged(layer())
    pairs = 4 * 4 + 4 * 8 + 1 * 9 + 3 * (5 + 3)  # of queries and keys
    assert flops(ours, [9, 3], [0, 5]) == 2 * 2 * 6 * DIM * pairs


def test_an_adapter_of_the_recipe_has_every_layer_exchanged_and_nothing_renamed(tiny_checkpoint):
    fields = {"target_modules": ["q_proj"]}
    stock, ours = (LlamaForCausalLM.from_pretrained(tiny_checkpoint) for _ in range(2))
    names = list(get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", **fields)).state_dict())
    model = add_lora(ours, fields)
    layers = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    assert len(layers) == ours.config.num_hidden_layers
    assert all(type(one) is not LlamaAttention for one in layers)
    assert list(model.state_dict()) == names
