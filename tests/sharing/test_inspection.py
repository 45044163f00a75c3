"""What ``inspect_adapter`` says, against full matrices, peft's own merge and closed forms."""

import copy
import json
import math

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.settings import UserError
from recipe.sharing import inspection
from recipe.sharing.inspection import inspect_adapter
from recipe.sharing.inspection_report import as_json, in_words, table
from tests.sharing.spectra import PLAIN, adapted, chosen, load, lora_layers

VARIANTS = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 16}},
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "r above the shorter side": {"r": 40, "target_modules": ["k_proj", "embed_tokens"]},
    "MiCA": {"init_lora_weights": "mica"},
    "parameter": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "trained head": {"modules_to_save": ["lm_head", "model.norm"]},
    "new tokens": {"trainable_token_indices": {"embed_tokens": [3, 7, 11]}},
}


def merged_weights(model):
    """What peft makes of base and adapter, everything in float64."""
    merged = copy.deepcopy(model).double().merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def assert_values(found, expected):
    """Singular values, to a share of the largest: a spectrum has no better relative accuracy."""
    found = torch.tensor(found, dtype=torch.float64)
    full = torch.zeros_like(expected)
    full[: len(found)] = found
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-9 * float(expected[0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_spectrum_and_ratio_are_those_of_the_full_matrices(tiny_checkpoint, variant):
    model = adapted(tiny_checkpoint, **VARIANTS[variant])
    before = copy.deepcopy(model.state_dict())
    changes = inspect_adapter(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"inspecting changed {name}"
    base = load(tiny_checkpoint).double().state_dict()
    merged = merged_weights(model)
    layers = lora_layers(copy.deepcopy(model).double())
    moved = {n for n in base if not torch.allclose(merged[n], base[n], rtol=0, atol=1e-6)}
    assert [f"{change.name}.weight" for change in changes] == [n for n in base if n in moved]
    for change in changes:
        weight = base[f"{change.name}.weight"]
        difference = merged[f"{change.name}.weight"] - weight
        assert change.ratio == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-6)
        assert change.shape == tuple(weight.shape)
        assert change.method == ("DoRA" if variant == "DoRA" else change.method)
        if change.name in layers:
            layer = layers[change.name]
            product = layer.get_delta_weight("default").detach()
            assert change.r == layer.r["default"]
            assert change.rank == torch.linalg.matrix_rank(product)
        else:
            assert change.r is None
            product = difference if difference.ndim == 2 else difference[None]
        assert_values(change.singular_values, torch.linalg.svdvals(product))


def test_methods_and_places(tiny_checkpoint):
    lora = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    found = [
        (change.name, change.layer, change.kind, change.method)
        for change in inspect_adapter(adapted(tiny_checkpoint, **lora))
    ]
    assert found == [
        ("model.embed_tokens", None, "embed_tokens", "LoRA"),
        ("model.layers.0.self_attn.q_proj", 0, "q_proj", "LoRA"),
        ("model.layers.1.self_attn.q_proj", 1, "q_proj", "LoRA"),
        ("lm_head", None, "lm_head", "whole"),
    ]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("base", ["bf16", "fp16", "nf4", "int8"])
def test_bases_of_fewer_bits(tiny_checkpoint, base, dora):
    model = adapted(tiny_checkpoint, base, use_dora=dora)
    changes = inspect_adapter(model)
    again = load(tiny_checkpoint, base)  # weights that no adapter has touched
    layers = lora_layers(model)
    assert len(changes) == 4
    for change in changes:
        weight = dequantized(again.get_submodule(change.name)).double()
        layer = layers[change.name]
        product = layer.get_delta_weight("default").detach()
        assert_values(change.singular_values, torch.linalg.svdvals(product))
        if dora:
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()[:, None]
            sum_ = weight + product
            product = magnitude * sum_ / (sum_**2).sum(1, keepdim=True).sqrt() - weight
        expected = float(product.norm() / weight.norm())
        # bitsandbytes multiplies by 1/127 in float32.
        assert change.ratio == pytest.approx(expected, rel=1e-7 if base == "int8" else 1e-9)


def dequantized(module):
    weight = module.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        return weight.data.double() * weight.SCB[:, None] / 127
    return weight.detach()


def test_an_adapter_that_plain_peft_saved_and_a_second_one(tiny_checkpoint, tmp_path):
    model = adapted(tiny_checkpoint, lora_alpha=3)
    expected = inspect_adapter(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(tiny_checkpoint), tmp_path)
    assert inspect_adapter(again) == expected
    again.add_adapter("other", LoraConfig(**{**PLAIN, "target_modules": ["k_proj"]}))
    assert inspect_adapter(again) == expected
    assert [change.kind for change in inspect_adapter(again, "other")] == ["k_proj"] * 2


ROOTS = [math.sqrt(energy) for energy in (90, 5, 4, 1)]


@pytest.mark.parametrize(
    ("sigma", "ranks", "effective", "rank"),
    [
        # Energies 16, 4, 1, 1 of 22; shares 1/2, 1/4, 1/8, 1/8 have 7/4 bits.
        ([4.0, 2, 1, 1], {90: 2, 95: 3, 99: 4}, 2**1.75, 4),
        (ROOTS, {90: 1, 95: 2, 99: 3}, None, 4),  # exactly 90, 95 and 99 of 100
        ([1.0] * 8, {90: 8, 95: 8, 99: 8}, 8, 8),
        ([3.0, 0, 0, 0], {90: 1, 95: 1, 99: 1}, 1, 1),
        ([1.0, 1e-5, 0, 0], {90: 1, 95: 1, 99: 1}, None, 2),
    ],
)
def test_closed_forms(tiny_checkpoint, sigma, ranks, effective, rank):
    first, _ = inspect_adapter(chosen(tiny_checkpoint, [sigma, [1.0]]))
    assert first.singular_values[: len(sigma)] == pytest.approx(sigma, rel=1e-9, abs=1e-15)
    assert first.rank_for == ranks
    assert first.rank == rank
    if effective is not None:
        assert first.effective_rank == pytest.approx(effective, rel=1e-9)
    energies = torch.tensor(sigma, dtype=torch.float64).square()
    shares = (energies.cumsum(0) / energies.sum()).tolist()
    assert first.energy == pytest.approx(shares, rel=1e-9)


def test_a_product_that_cancels_is_zero_when_only_rounding_is_left():
    """As in a converted PiSSA: half of the rank takes away what the other half adds."""
    a, b = torch.ones(1, 9, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    for rest, expected in ((1e-4, 1e-4 * math.sqrt(45)), (1e-8, 0.0)):
        both = torch.cat([a, a]), torch.cat([b, -(1 - rest) * b], dim=1)
        found = inspection.product_spectrum(*both, scaling=1.0)
        assert found == pytest.approx([expected, 0.0], rel=1e-9, abs=1e-14)
        assert (found[0] == 0) == (expected == 0)


def test_numerical_rank_of_what_is_not_full(tiny_checkpoint):
    model = adapted(tiny_checkpoint, modules_to_save=["lm_head"])
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    a = layer.lora_A["default"].weight.data
    a[3] = a[0] / 3 + a[1]  # rounds, so that no singular value is exactly 0
    head = model.get_base_model().lm_head
    rows, columns = torch.arange(len(head.original_module.weight)), torch.arange(64)
    head.original_module.weight.data.zero_()
    head.modules_to_save["default"].weight.data.copy_(rows.outer(columns) - 300)
    first, *_, last = inspect_adapter(model)
    assert first.rank == torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 3
    assert (last.rank, last.method, last.singular_values[2:]) == (2, "whole", (0.0,) * 62)


def test_alpha_and_rslora_scale_the_change(tiny_checkpoint):
    spectra = [[4.0, 2, 1, 1], [1.0]]
    plain = inspect_adapter(chosen(tiny_checkpoint, spectra))[0]
    double = inspect_adapter(chosen(tiny_checkpoint, spectra, alpha=8))[0]
    rooted = inspect_adapter(chosen(tiny_checkpoint, spectra, use_rslora=True))[0]
    negative = inspect_adapter(chosen(tiny_checkpoint, spectra, alpha=-4))[0]
    assert double.ratio == pytest.approx(2 * plain.ratio, rel=1e-12)
    assert rooted.ratio == pytest.approx(2 * plain.ratio, rel=1e-12)  # 4/sqrt(4)
    assert (double.rank_for, double.effective_rank) == (
        plain.rank_for,
        pytest.approx(plain.effective_rank),
    )
    assert negative == plain


def test_truncation_to_the_rank_keeps_the_energy_and_one_less_does_not(tiny_checkpoint):
    model = adapted(tiny_checkpoint, r=12, target_modules="all-linear", modules_to_save=["lm_head"])
    changes = inspect_adapter(model)
    merged = merged_weights(model)
    base = load(tiny_checkpoint).double().state_dict()
    for change in changes:
        full = merged[f"{change.name}.weight"] - base[f"{change.name}.weight"]
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        for percent, rank in change.rank_for.items():
            lost, more = (
                float(full.sub((u[:, :k] * s[:k]) @ v[:k]).norm() / full.norm()) ** 2
                for k in (rank, rank - 1)
            )
            assert 1 - lost >= percent / 100 - 1e-9 > 1 - more, (change.name, percent)


def test_a_fresh_adapter_changes_nothing(tiny_checkpoint):
    for lora in ({}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}):
        asked = {**PLAIN, "target_modules": ["q_proj", "lm_head"], **lora}
        model = get_peft_model(load(tiny_checkpoint), LoraConfig(**asked))
        for change in inspect_adapter(model):
            assert change.unchanged
            assert change.ratio <= (0 if "use_dora" not in lora else 1e-7)
            assert (change.rank, change.effective_rank, change.energy) == (0, 0.0, ())
            assert set(change.rank_for.values()) == {0}
        words = in_words(inspect_adapter(model))
        assert "changes nothing" in words[0]
        assert "model.layers.1.self_attn.q_proj and lm_head" in words[0]
        assert "nan" not in json.dumps(as_json(inspect_adapter(model)), allow_nan=False)


def test_one_module_that_does_not_change_is_named(tiny_checkpoint):
    model = adapted(tiny_checkpoint)
    name = "model.layers.1.self_attn.v_proj"
    torch.nn.init.zeros_(model.get_base_model().get_submodule(name).lora_B["default"].weight)
    changes = inspect_adapter(model)
    still = [change for change in changes if change.unchanged]
    assert [(change.name, change.ratio) for change in still] == [(name, 0.0)]
    words = in_words(changes)
    assert "3 of 4 matrices" in words[0]
    assert f"zero in {name}." in words[-1]


def test_weights_that_were_zero(tiny_checkpoint):
    model = adapted(tiny_checkpoint)
    change = inspect_adapter(model)[0]
    model.get_base_model().get_submodule(change.name).base_layer.weight.data.zero_()
    changes = inspect_adapter(model)
    assert changes[0].ratio == math.inf
    assert as_json(changes)["modules"][0]["ratio"] is None
    assert "from zero" in "\n".join(table(changes))
    assert "is from zero" in in_words(changes)[0]
    torch.nn.init.zeros_(model.get_base_model().get_submodule(change.name).lora_B["default"].weight)
    assert inspect_adapter(model)[0].ratio == 0


def poisoned(model):
    next(iter(lora_layers(model).values())).lora_A["default"].weight.data[0, 0] = math.nan
    return model


def merged_in(model):
    model.merge_adapter()
    return model


def off_memory(model):
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.to("meta")
    return model


def bad_head(model):
    model.get_base_model().lm_head.modules_to_save["default"].weight.data[0, 0] = math.inf
    return model


@pytest.mark.parametrize(
    ("lora", "prepare", "adapter", "message"),
    [
        ({}, poisoned, "default", r"layers.0.self_attn.q_proj holds NaN"),
        ({"modules_to_save": ["lm_head"]}, bad_head, "default", r"lm_head holds NaN"),
        ({}, merged_in, "default", r"merged"),
        ({}, off_memory, "default", r"no base weight in memory"),
        ({"init_lora_weights": "pissa"}, None, "default", r"init_lora_weights=pissa"),
        ({"kasa_config": KasaConfig()}, None, "default", r"KasaLinearVariant"),
        ({}, None, "mine", r"mine is not on this model, expected one of default"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_measured_wrongly_is_refused(
    tiny_checkpoint, lora, prepare, adapter, message
):
    model = adapted(tiny_checkpoint, **lora)
    with pytest.raises(UserError, match=message):
        inspect_adapter(prepare(model) if prepare else model, adapter)


class Sizes(TorchDispatchMode):
    """The largest tensor that anything makes; views of what was there are not made."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        made = [t.numel() for t in tensors if t.untyped_storage().data_ptr() not in self.known]
        self.largest = max([self.largest, *made])
        return out


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}],
    ids=["LoRA", "DoRA", "head"],
)
def test_nothing_of_the_weights_size_is_made(tiny_checkpoint, monkeypatch, lora):
    model = adapted(tiny_checkpoint, **{"target_modules": ["gate_proj", "embed_tokens"], **lora})
    expected = inspect_adapter(model)
    monkeypatch.setattr(inspection, "_BLOCK", 512)
    with Sizes(model) as sizes:
        in_blocks = inspect_adapter(model)
    factors = max(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    gram = 64 * 64 if "modules_to_save" in lora else 0
    assert sizes.largest <= max(512, factors, gram) < 128 * 64
    for found, whole in zip(in_blocks, expected, strict=True):
        assert found.singular_values == pytest.approx(whole.singular_values, rel=1e-12)
        assert found.ratio == pytest.approx(whole.ratio, rel=1e-12)
