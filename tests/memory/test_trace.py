"""What is followed on tensors without memory is what real ones take, byte for byte."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.data.batch import flatten
from recipe.data.tokens import TokenizedRow
from recipe.memory import trace as trace_module
from recipe.memory.live_bytes import GRADIENTS, RECOMPUTED, SAVED
from recipe.memory.trace import Trace, traced
from recipe.model import attention, lora
from recipe.model.lora import add_lora
from recipe.model.swiglu import SwiGLU
from recipe.settings import Settings, load_settings
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss

CHECKPOINTED = "training.gradient_checkpointing=true"


def shape(layers: int = 4, **other: int) -> LlamaConfig:
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(**{**sizes, **other}, num_hidden_layers=layers)


def rows(*lengths: int, trained: float = 0.5) -> list[TokenizedRow]:
    """With an opening in common."""
    draw = np.random.default_rng(0)
    return [
        TokenizedRow(
            n,
            np.concatenate([np.arange(10), draw.integers(0, 2000, length - 10)]).astype(np.int32),
            np.arange(length) >= length * (1 - trained),
        )
        for n, length in enumerate(lengths)
    ]


@pytest.fixture
def settings(write_config):
    def made(*overrides: str) -> Settings:
        return load_settings(str(write_config()), list(overrides))

    return made


class Real:
    """The same micro-batch on real tensors, by stock code as far as it goes."""

    def __init__(
        self, config: LlamaConfig, settings: Settings, micro_batch: Sequence[TokenizedRow]
    ):
        attention.register()
        config._attn_implementation = "per_row_sdpa"
        config.use_cache = False
        mixed = bool(settings.training.get("bf16"))
        dtype = getattr(torch, settings.model.dtype)
        base = LlamaForCausalLM(config).to(dtype)
        self.model = add_lora(base, settings.lora, mixed_precision=mixed)
        if settings.training.get("gradient_checkpointing"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.get_base_model().disable_input_require_grads()
        self.model.train()
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
        self.head = OutputHead(self.model, autocast=torch.bfloat16 if mixed else None)
        self.loss = TokenLoss(self.head.nll)
        self.rows = micro_batch
        self.accumulates = settings.training.get("gradient_accumulation_steps", 1) > 1

    def forward(self):
        batch = flatten(self.rows, share_openings=True)
        labels = batch.pop("labels")
        del batch["row_indices"]
        with self.head.apart():
            return self.model(**batch), labels

    def step(self) -> None:
        with self.autocast:
            out, labels = self.forward()
            loss = self.loss(out, labels, torch.tensor(1))
        del out
        loss.backward()

    def peak(self) -> int:
        """Of torch's own profiler, which is told of every allocation."""
        self.step()  # what is made once and stays
        if self.accumulates:
            held = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        else:
            self.model.zero_grad(set_to_none=True)
            held = 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step()
        events = found.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = peak = 0
        for _, count in memory:
            now += count
            peak = max(peak, now)
        return peak + held

    def saved(self) -> int:
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, tuple[int, StorageWeakRef]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            where = tensor.untyped_storage().data_ptr()
            if where not in weights:
                storage = tensor.untyped_storage()
                kept[where] = storage.nbytes(), StorageWeakRef(storage)
            return tensor

        with self.autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out, _ = self.forward()
        assert out is not None
        return sum(count for count, reference in kept.values() if not reference.expired())


CASES = [
    [],
    [CHECKPOINTED],
    ["training.gradient_accumulation_steps=2"],
    [CHECKPOINTED, "training.gradient_accumulation_steps=2", "lora.target_modules=all-linear"],
    ["lora.target_modules=all-linear", "lora.r=32", "lora.lora_dropout=0.1"],
    ["model.dtype=bfloat16"],
    [CHECKPOINTED, "training.bf16=true", "lora.lora_dropout=0.05"],
    ["lora.modules_to_save=[lm_head]"],
    ["lora.use_dora=true"],
    ["lora.layers_to_transform=[2, 3]"],
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_peak_and_activations_are_those_of_real_tensors(settings, overrides):
    asked, micro_batch = settings(*overrides), rows(120, 90, 60)
    found = traced(shape(), asked, micro_batch, device="cpu", share_openings=True)
    real = Real(shape(), asked, micro_batch)
    # Position ids and the like, which the model is given and this counts or does not.
    assert found.saved == pytest.approx(real.saved(), abs=8192)
    peak = max(sum(kinds.values()) for kinds in found.peaks.values())
    # oneDNN's products of 16 bit take working memory that no operation returns.
    with torch.backends.mkldnn.flags(enabled=False):
        assert peak == pytest.approx(real.peak(), rel=0.01)


def test_the_peak_may_be_that_of_an_evaluation(settings):
    small, large = rows(40), rows(400, 400, 400, 400)
    found = traced(
        shape(), settings(CHECKPOINTED), small, evaluated=large, device="cpu", share_openings=False
    )
    assert found.peak is found.peaks["evaluation"]
    alone = traced(shape(), settings(CHECKPOINTED), small, device="cpu", share_openings=False)
    assert {k: v for k, v in found.peaks.items() if k != "evaluation"} == alone.peaks
    assert (found.flops, found.written) == (alone.flops, alone.written)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "overrides",
    [[], [CHECKPOINTED], ["model.dtype=float16", "training.fp16=true"], ["lora.use_dora=true"]],
    ids=" ".join,
)
@pytest.mark.parametrize("trained", [0.1, 0.5, 1.0])  # the last layer computes no more than that
def test_two_depths_tell_any_other(settings, monkeypatch, device, overrides, trained):
    def at(layers: int) -> Trace:
        micro_batch = rows(50, 40, trained=trained)
        config, asked = shape(layers), settings(*overrides)
        return traced(config, asked, micro_batch, device=device, share_openings=True)

    extrapolated = at(9)
    monkeypatch.setattr(trace_module, "_DEPTHS", (9, 10))
    whole = at(9)
    assert extrapolated == whole


def test_an_adapter_that_is_not_the_same_in_each_layer_is_followed_in_all(settings, monkeypatch):
    monkeypatch.setattr(trace_module, "_extrapolated", None)
    for override in (
        "lora.layers_to_transform=[0]",
        "lora.target_modules=['layers.1.self_attn.q_proj']",
        "lora.rank_pattern={layers.0.self_attn.q_proj: 8}",
    ):
        found = traced(shape(6), settings(override), rows(30), device="cpu", share_openings=False)
        assert found.trainable


@pytest.mark.parametrize("overrides", [[], [CHECKPOINTED]], ids=" ".join)
def test_products_are_those_that_torch_counts(settings, overrides):
    asked, micro_batch = settings(*overrides), rows(120, 90)
    found = traced(shape(), asked, micro_batch, device="cpu", share_openings=True)
    real = Real(shape(), asked, micro_batch)
    with FlopCounterMode(display=False) as counter:
        real.step()
    counted = counter.get_flop_counts()["Global"]
    products = {"mm", "addmm", "bmm"}
    assert found.flops == sum(n for op, n in counted.items() if str(op).split(".")[-1] in products)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_computed_on_a_cpu_alone_is_not_foreseen_of_a_gpu(settings, monkeypatch, dtype):
    def foreseen() -> Trace:
        asked, some = settings(f"model.dtype={dtype}", "lora.r=8"), rows(120, 90)
        return traced(shape(), asked, some, device="cuda", share_openings=True)

    found = foreseen()
    monkeypatch.setattr(lora, "attend_at_once", lambda model: None)
    monkeypatch.setattr(lora, "join_adapters", lambda model: None)
    monkeypatch.setattr(SwiGLU, "_plain", lambda *_: False)
    assert found == foreseen()


def test_checkpointing_keeps_a_layers_input_and_computes_the_rest_again(settings):
    """Llama-2-7B on a GPU, 1,022 tokens in bfloat16: 32 inputs of 1,022 x 4,096 x 2 bytes."""
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    )  # fmt: skip
    lora = ["lora.r=16", "model.dtype=bfloat16"]
    kept = traced(
        llama, settings(*lora, CHECKPOINTED), rows(512, 512), device="cuda", share_openings=False
    )
    # The last layer, which computes half, holds its input as well, and is not where the peak is.
    assert kept.peaks["forward"][SAVED] == 31 * 1022 * 4096 * 2
    trained = rows(512, 512, trained=1.0)
    every = traced(
        llama, settings(*lora, CHECKPOINTED), trained, device="cuda", share_openings=False
    )
    assert every.peaks["forward"][SAVED] == 32 * 1022 * 4096 * 2
    assert kept.trainable == {"float32": 4 * 8_388_608}
    assert kept.weights["bfloat16"] == pytest.approx(2 * 6_738_415_616, abs=1024)
    assert RECOMPUTED in kept.peaks["backward"]
    accumulated = settings(*lora, CHECKPOINTED, "training.gradient_accumulation_steps=2")
    second = traced(llama, accumulated, rows(512, 512), device="cuda", share_openings=False)
    assert second.peaks["backward"][GRADIENTS] == 4 * 8_388_608
    whole = traced(llama, settings(*lora), rows(512, 512), device="cuda", share_openings=False)
    assert whole.saved > 15 * kept.saved
    # What is computed again is the forward pass: a third of 2 + 4 operations, without the head's.
    head = 3 * 2 * 4096 * 32000 * 512
    assert (kept.flops - head) / (whole.flops - head) == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize(
    ("quantization", "bytes_a_weight"),
    [
        ("{load_in_8bit: true}", 1),
        ("{load_in_4bit: true, bnb_4bit_quant_type: nf4}", 0.5 + 4 / 64),
        (
            "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}",
            0.5 + 1 / 64 + 4 / 64 / 256,
        ),
    ],
)
def test_quantised_weights_take_what_bitsandbytes_says(settings, quantization, bytes_a_weight):
    config = shape(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    asked = settings(f"model.quantization={quantization}", "model.dtype=bfloat16")
    found = traced(config, asked, rows(40), device="cuda", share_openings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linear = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    rest = 2 * (sum(p.numel() for p in model.parameters()) - linear)
    scales = 4 * sum(
        m.out_features
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    expected = linear * bytes_a_weight + rest + (scales if bytes_a_weight == 1 else 0)
    assert sum(found.weights.values()) == pytest.approx(expected, abs=256)
