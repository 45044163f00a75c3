"""4-bit weights are those of the QLoRA paper, computed here anew (Dettmers et al. 2023,
arXiv 2305.14314, appendix E and section 3; 8-bit scales after arXiv 2110.02861).
"""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

BLOCK = 64


# Appendix E.
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], dtype=np.float32,
)  # fmt: skip


def test_levels_are_quantiles_of_a_normal_distribution():
    """Eight above zero and seven below, over the largest; the paper's are rounded."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below]))
    assert np.allclose(levels / levels.max(), LEVELS, rtol=5e-7, atol=0)


def dynamic_levels() -> np.ndarray:
    """A sign, an exponent of ten in unary, and the rest a fraction."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [*means, *-means]
    return np.sort(np.array(levels)).astype(np.float32)


def nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, two to a byte, the first one high; scales of the blocks; weights made whole."""
    blocks = weight.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1)
    codes = nearest(blocks / scale[:, None], LEVELS)
    packed = (codes.reshape(-1, 2)[:, 0] << 4 | codes.reshape(-1, 2)[:, 1]).astype(np.uint8)
    whole = (LEVELS[codes] * scale[:, None]).reshape(weight.shape)
    return packed, scale, whole


def scales_in_8_bit(scale: np.ndarray, mean: np.float32) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes of the scales, around their mean and over the largest; how far each is from a border
    between two levels; and the largest. Fewer than 256 scales have one of their own.
    """
    largest = np.abs(scale - mean).max()
    values = (scale - mean) / largest
    levels = dynamic_levels()
    borders = (levels[1:] + levels[:-1]) / 2
    return nearest(values, levels), np.abs(values[:, None] - borders).min(1), largest


@pytest.fixture
def in_4_bit(tmp_path, tiny_checkpoint):
    def load(folder=tiny_checkpoint, **more):
        asked = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32", **more
        )
        given = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=asked, **given)
        plain = LlamaForCausalLM.from_pretrained(folder, **given)
        return [
            (layer.weight, plain.get_submodule(name).weight.numpy(force=True))
            for name, layer in model.named_modules()
            if hasattr(getattr(layer, "weight", None), "quant_state")
        ]

    return load


def dequantised(weight) -> np.ndarray:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).numpy(force=True)


def compared(pairs) -> int:
    """Every code, every scale, every weight."""
    mismatches = 0
    for found, weight in pairs:
        packed, scale, whole = quantised(weight)
        mismatches += int((found.data.numpy().reshape(-1) != packed).sum())
        mismatches += int((found.quant_state.absmax.numpy() != scale).sum())
        assert np.allclose(dequantised(found), whole, rtol=1e-6, atol=0)
    return mismatches


def test_codes_scales_and_weights_are_the_papers(in_4_bit):
    pairs = in_4_bit()
    assert len(pairs) == 14
    assert compared(pairs) == 0


def test_scales_in_8_bit_are_the_papers(in_4_bit):
    for found, weight in in_4_bit(bnb_4bit_use_double_quant=True):
        state = found.quant_state
        packed, scale, _ = quantised(weight)
        assert (found.data.numpy().reshape(-1) == packed).all()
        mean = state.offset.numpy()
        assert mean == pytest.approx(scale.mean(), rel=1e-6)
        codes, from_border, largest = scales_in_8_bit(scale, mean)
        kept = state.absmax.numpy()
        # Where two levels are as near, its CPU code may take either: it looks them up in a table.
        same = kept == codes
        assert same.mean() > 0.95
        assert (from_border[~same] < 1e-5).all()
        assert (np.abs(kept.astype(int) - codes) <= 1).all()
        made_whole = dynamic_levels()[kept] * largest + mean
        levels = LEVELS[np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, BLOCK)]
        whole = (levels * made_whole[:, None]).reshape(weight.shape)
        assert np.allclose(dequantised(found), whole, rtol=1e-6, atol=1e-6 * np.abs(weight).max())


@pytest.mark.slow
def test_of_all_weights_of_the_starter_none_is_another(in_4_bit, starter):
    pairs = in_4_bit(starter)
    assert sum(weight.size for _, weight in pairs) == 106_168_320
    assert compared(pairs) == 0
