"""Bytes of optimizer states are those of the real optimizers, as Trainer makes them."""

import math
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from recipe.memory import forecast as forecast_module
from recipe.memory import optimizer as optimizer_module
from recipe.memory.forecast import OPTIMIZER, Forecast, Plan, forecast
from recipe.memory.optimizer import DEFAULT, is_known, state_bytes, step_bytes
from recipe.memory.probe import allocated_peak
from recipe.model.lora import add_lora
from recipe.settings import load_settings
from recipe.training.arguments import training_arguments
from tests.memory.test_trace import rows, shape

KNOWN = sorted(optimizer_module.KNOWN)
# Below, at and above bitsandbytes' smallest tensor in 8 bit, and no multiple of its block of 256.
SHAPES = ((16, 576), (192, 16), (64,), (300, 13), (4, 16, 80), (4095,), (4096,), (4097,), (2,))
PAGED = "ignore:Paged optimizers are not supported on CPU:UserWarning"


def kept(arguments: TrainingArguments, parameters: Sequence[torch.nn.Parameter]) -> list[int]:
    """Of each parameter, what the real optimizer keeps after one step."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    return [
        sum(
            {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for name, tensor in made.state[parameter].items()
                if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and "qmap" not in name
            }.values()
        )
        for parameter in parameters
    ]


@pytest.mark.filterwarnings(PAGED)
@pytest.mark.parametrize("optim", KNOWN)
def test_a_state_takes_what_the_real_optimizer_keeps(optim, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    real = kept(arguments, [torch.nn.Parameter(torch.randn(one)) for one in SHAPES])
    assert [state_bytes(optim, {one: 1}) for one in SHAPES] == real
    assert state_bytes(optim, dict.fromkeys(SHAPES, 3)) == 3 * sum(real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optim", [one for one in KNOWN if not one.startswith("paged")])
def test_a_step_takes_what_the_profiler_sees(optim, dtype, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    shapes = (512, 768), (32, 32)
    parameters = [torch.nn.Parameter(torch.randn(one).to(dtype)) for one in shapes]
    made = kind(parameters, **options)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        peak = allocated_peak(made.step)
    counted = {dtype.itemsize: dict.fromkeys(shapes, 1)}
    assert step_bytes(optim, counted, device="cpu") == pytest.approx(peak, rel=0.02, abs=8192)


def test_a_head_that_is_trained_takes_most_in_the_optimizers_step(write_config):
    """8-bit Adam without a kernel makes both of its moments whole, and more."""
    asked = ["lora.modules_to_save=[lm_head]", "training.optim=adamw_bnb_8bit"]
    settings = load_settings(str(write_config()), asked)
    of_a_large_head = shape(1, vocab_size=32_000, tie_word_embeddings=False)
    found = forecast(Plan(settings, of_a_large_head, rows(20), (), "cpu", share_openings=False))
    assert found.phase == "optimizer step"
    values = max(math.prod(one) for one in found.trace.shapes[4])
    assert found.items["temporaries"] == 20 * values
    assert found.items["gradients"] == found.items["adapter"]


def test_the_default_is_that_of_transformers(tmp_path):
    assert TrainingArguments(output_dir=str(tmp_path)).optim == DEFAULT


def test_tables_name_only_what_transformers_knows():
    assert set(KNOWN) <= {one.value for one in OptimizerNames}


@pytest.fixture
def foreseen(write_config):
    def made(*overrides: str) -> Forecast:
        settings = load_settings(str(write_config()), list(overrides))
        return forecast(Plan(settings, shape(2), rows(30), (), "cpu", share_openings=False))

    return made


def test_what_is_not_known_is_told(foreseen, monkeypatch):
    """Whether the library for it is installed or not: the settings take them all."""
    found = foreseen()
    monkeypatch.setattr(forecast_module, "traced", lambda *_, **__: found.trace)
    shapes = found.trace.shapes[4]
    parameters = sum(math.prod(one) * count for one, count in shapes.items())
    unknown = 0
    for optim in (one.value for one in OptimizerNames):
        found = foreseen(f"training.optim={optim}")
        if is_known(optim):
            assert list(found.notes) == []
            continue
        unknown += 1
        assert list(found.notes) == [f"{optim}: its state is taken for AdamW's"]
        assert found.items[OPTIMIZER] == 8 * parameters
    assert unknown + len(KNOWN) == len(OptimizerNames)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.modules_to_save=[lm_head]"],
        ["training.optim=sgd", "training.optim_args=momentum=0.9"],
        ["training.optim=rmsprop", "training.optim_args='momentum=0.9,centered=True'"],
        ["model.dtype=bfloat16", "lora.modules_to_save=[lm_head]"],
        ["model.dtype=bfloat16", "lora.modules_to_save=[lm_head]", "training.optim=adamw_bnb_8bit"],
    ],
    ids=" ".join,
)
def test_options_and_dtypes_change_what_is_kept(write_config, foreseen, overrides):
    """torch keeps states in their parameter's dtype, bitsandbytes in its own."""
    settings = load_settings(str(write_config()), overrides)
    base = LlamaForCausalLM(shape(2)).to(getattr(torch, settings.model.dtype))
    model = add_lora(base, settings.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    real = kept(training_arguments(settings), trained)
    assert foreseen(*overrides).items[OPTIMIZER] == sum(real)
