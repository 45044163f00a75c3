"""The head in chunks: stock gradients, one chunk of memory, fp16 behind a scaler."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from recipe.data.batch import IGNORED
from recipe.training import head as head_module
from recipe.training.head import OutputHead
from recipe.training.loss import token_nll

LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


PIECE = 50  # tokens of the vocabulary, which it is no multiple of


@pytest.fixture
def chunks_of_8(monkeypatch):
    monkeypatch.setitem(head_module._LOGITS_AT_ONCE, "cpu", 1)
    monkeypatch.setitem(head_module._VOCABULARY_AT_ONCE, "cpu", PIECE)


def peft_model(checkpoint, dtype=torch.float32, **lora):
    base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return get_peft_model(base, LoraConfig(**{**LORA, **lora}))


def states(model, positions=20):
    """Hidden states (positions, hidden) and labels, two of them ignored."""
    generator = torch.Generator().manual_seed(0)
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    hidden = torch.randn(positions, width, generator=generator)
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    labels[[3, positions - 1]] = IGNORED
    return hidden, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_whole(tiny_checkpoint, chunks_of_8, dtype):
    model = peft_model(tiny_checkpoint, dtype)
    hidden, labels = states(model)
    weights = torch.linspace(0.5, 2, len(labels), dtype=dtype)  # any, not only a mean
    ours, stock = (hidden.to(dtype).requires_grad_() for _ in range(2))
    found = OutputHead(model).nll(ours, labels)
    (found * weights).sum().backward()
    linear = model.get_base_model().lm_head
    expected = torch.nn.functional.cross_entropy(linear(stock), labels, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(ours.grad, stock.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("piece", [1, PIECE, 10**6], ids=["token", "piece", "all"])
def test_nothing_depends_on_the_pieces_of_the_vocabulary(tiny_checkpoint, monkeypatch, piece):
    """The largest logit is in the first piece, in the last one, and between them."""
    monkeypatch.setitem(head_module._VOCABULARY_AT_ONCE, "cpu", piece)
    model = peft_model(tiny_checkpoint)
    linear, vocabulary = model.get_base_model().lm_head, model.config.vocab_size
    hidden, _ = states(model, positions=24)
    places = torch.linspace(0, vocabulary - 1, 24).long()
    rows = linear.weight.detach()[places]
    hidden += 20 * rows / rows.square().sum(-1, keepdim=True)
    for labels in (places, places.flip(0)):
        ours, stock = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        found = OutputHead(model).nll(ours, labels)
        found.sum().backward()
        logits = stock @ linear.weight.double().T
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        expected.sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(ours.grad.double(), stock.grad, rtol=1e-5, atol=1e-6)


def test_no_tensor_is_larger_than_one_chunk_of_logits(tiny_checkpoint, chunks_of_8):
    model = peft_model(tiny_checkpoint)
    hidden, labels = states(model, positions=40)
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    last = vocabulary % PIECE
    assert vocabulary > PIECE
    assert last not in (0, 1, 8)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                tuple(t.shape)
                for t in (out if isinstance(out, tuple) else [out])
                if isinstance(t, torch.Tensor)
                if t.shape[-1:] in ((vocabulary,), (PIECE,), (last,)) and t.shape[0] != width
            )
            return out

    with Sizes():
        OutputHead(model).nll(hidden.requires_grad_(), labels).sum().backward()
    assert set(sizes) == {(8, PIECE), (8, last)}


def test_half_precision_gradient_is_no_worse_than_a_scalers(tiny_checkpoint, chunks_of_8):
    """Unlikely tokens: without its own scale their gradient rounds to nothing in float16."""
    model = peft_model(tiny_checkpoint, torch.float16)
    linear = model.get_base_model().lm_head
    labels = torch.arange(10, 30)
    rows = linear.weight.detach().float()[labels]
    hidden = 20 * rows / rows.square().sum(-1, keepdim=True)  # logit 20 for the label
    exact = hidden.double().requires_grad_()
    weight = linear.weight.double()
    torch.nn.functional.cross_entropy(exact @ weight.T, labels, reduction="sum").backward()
    ours = hidden.half().requires_grad_()
    factor = 2.0**16  # the scaler's first
    (OutputHead(model).nll(ours, labels).sum() * factor / 256).backward()
    stock = hidden.half().requires_grad_()
    losses = torch.nn.functional.cross_entropy(linear(stock).float(), labels, reduction="sum")
    (losses * factor / 256).backward()
    errors = [
        float((g.grad.double() * 256 / factor - exact.grad).norm() / exact.grad.norm())
        for g in (ours, stock)
    ]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_a_broken_head_gives_a_broken_loss_and_no_traceback(tiny_checkpoint, value):
    model = peft_model(tiny_checkpoint)
    hidden, labels = states(model)
    model.get_base_model().lm_head.weight.data[5, 5] = value
    found = OutputHead(model, torch.float16).nll(hidden.requires_grad_(), labels)
    assert not found.sum().isfinite()


def test_the_head_projects_whenever_nothing_runs(tiny_checkpoint):
    model = peft_model(tiny_checkpoint)
    linear, head = model.get_base_model().lm_head, OutputHead(model)
    hidden = torch.ones(1, linear.in_features)
    called = []
    linear.register_forward_hook(lambda *_: called.append(1))  # as an engine's that shards it
    with head.apart():
        assert linear(hidden) is hidden
    with pytest.raises(KeyError), head.apart():
        raise KeyError
    torch.testing.assert_close(linear(hidden), hidden @ linear.weight.T)
    assert len(called) == 2
    assert "forward" not in vars(linear)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3]}, "ensure_weight_tying": True},
    ],
    ids=["saved", "adapted", "tied tokens"],
)
def test_a_head_that_learns_is_applied_by_the_model(tiny_checkpoint, lora):
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    if "trainable_token_indices" in lora:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    model = get_peft_model(base, LoraConfig(**{**LORA, **lora}))
    inner = model.get_base_model().lm_head
    head = OutputHead(model)
    assert not head.chunked
    with head.apart():
        assert model.get_base_model().lm_head is inner


def test_a_hooked_or_thawed_head_is_applied_by_the_model(tiny_checkpoint):
    model = peft_model(tiny_checkpoint)
    linear = model.get_base_model().lm_head
    hook = linear.register_forward_hook(lambda *_: None)
    assert not OutputHead(model).chunked
    hook.remove()
    assert OutputHead(model).chunked
    linear.weight.requires_grad_()
    assert not OutputHead(model).chunked


VOCABULARY, WIDTH = 32000, 64


class Ways:
    """Gradients of hidden states by torch, in chunks, and by the plain loss."""

    def __init__(self, weight, labels, bias=None):
        self.weight, self.labels, self.bias = weight, labels, bias

    def logits(self, states):
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return torch.nn.functional.linear(states, self.weight.to(states.dtype), bias)

    def torchs(self, states):
        return torch.nn.functional.cross_entropy(self.logits(states), self.labels, reduction="none")

    def plain(self, states):
        return token_nll(self.logits(states), self.labels)

    def chunked(self, states, piece=9000):
        chunk = 24, piece
        return head_module._ChunkedNLL.apply(
            states, self.weight, self.bias, self.labels, 1.0, chunk
        )

    def errors(self, hidden, *ways):
        """Of each way, relative to torch's in float64."""

        def gradient(nll, dtype=torch.float32):
            states = hidden.to(dtype, copy=True).requires_grad_()
            nll(states).sum().backward()
            return states.grad.double()

        exact = gradient(self.torchs, torch.float64)
        return [float((gradient(one) - exact).norm() / exact.norm()) for one in ways]


def test_gradients_are_nearer_to_float64_than_torchs():
    """Of a vocabulary and logits as large as real ones, in several chunks, the last one shorter."""
    generator = torch.Generator().manual_seed(0)
    # Real heads have a mean that all hidden states lie along.
    weight = 0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator) + 0.3
    hidden = 1.5 + torch.randn(100, WIDTH, generator=generator)
    labels = torch.randint(VOCABULARY, (100,), generator=generator)
    ways = Ways(weight, labels)
    ours, torchs = ways.errors(hidden, ways.chunked, ways.torchs)
    assert ours < torchs / 2, (ours, torchs)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("piece", [9000, VOCABULARY])
def test_a_token_that_is_almost_certain_has_its_small_gradient(piece, biased):
    """1 - p by subtraction is rounding: most of what is left to learn from a memorised row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(VOCABULARY, (40,), generator=generator)
    hidden = weight[labels] * 0.7
    bias = torch.randn(VOCABULARY, generator=generator) if biased else None
    ways = Ways(weight, labels, bias)
    assert float(ways.torchs(hidden.double()).max()) < 2e-4  # lack to 1, all of them
    chunked, plain, torchs = ways.errors(
        hidden, partial(ways.chunked, piece=piece), ways.plain, ways.torchs
    )
    assert max(chunked, plain) < 1e-4 < torchs, (chunked, plain, torchs)
