"""Base plus adapter as one model: against plain arithmetic, and what the certificate lets pass."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.finetune import finetune
from recipe.merge import merge
from recipe.model.fingerprint import weights_sha256
from recipe.settings import RunFailed, UserError, load_settings
from recipe.sharing import merging
from recipe.sharing.certificate import LIMITS, Certificate, certify, rebatching_difference
from recipe.sharing.merging import merge_for_good, merged

IDS = torch.arange(5, 45)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tiny(*, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tuned(base, seed=1, **lora):
    """An adapter that does something, whatever its kind."""
    if lora.get("ensure_weight_tying") and not base.config.tie_word_embeddings:
        pytest.skip("there is nothing to tie")
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    )
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


VARIANTS = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "head trained with the embedding": {
        "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_merged_model_answers_as_base_and_adapter(tmp_path, name, tied):
    model = tuned(tiny(tied=tied), **VARIANTS[name])
    before = logits(model)
    merge_for_good(model, torch.float32).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)  # stock code, from the files
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


def test_a_merged_weight_is_the_sum_rounded_once():
    base = tiny(dtype=torch.bfloat16)
    before = base.model.layers[1].self_attn.v_proj.weight.detach().clone()
    model = tuned(base)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    wanted = before.double() + layer.scaling["default"] * (b.double() @ a.double())
    plain = merge_for_good(model, torch.float16)
    found = plain.model.layers[1].self_attn.v_proj.weight
    assert found.dtype == torch.float16
    assert {p.dtype for p in plain.parameters()} == {torch.float16}
    # One unit in the last place of float16, where bfloat16's own would be eight times that.
    assert ((found.double() - wanted).abs() <= wanted.abs() * 2**-11 + 1e-7).all()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_to_the_bit(name, dtype):
    model = tuned(tiny(dtype=dtype), **VARIANTS[name])
    before, answers = weights_sha256(model), logits(model)
    with merged(model):
        inside = logits(model)
    assert weights_sha256(model) == before
    assert torch.equal(logits(model), answers)
    if dtype == torch.float32:
        torch.testing.assert_close(inside, answers, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(inside, logits(model), atol=1e-2)


def test_a_b_a_on_one_base_gives_a_again(tmp_path):
    """As the reports swap tasks: W0 + BA, W0 + B'A', W0 + BA."""
    for name, seed in (("a", 1), ("b", 2)):
        tuned(tiny(), seed=seed, target_modules="all-linear").save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny(), tmp_path / "a", adapter_name="a").eval()
    model.load_adapter(tmp_path / "b", adapter_name="b")
    seen = []
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        with merged(model):
            seen.append(logits(model))
    alone = PeftModel.from_pretrained(tiny(), tmp_path / "b").eval()
    assert torch.equal(seen[0], seen[2])
    torch.testing.assert_close(seen[1], logits(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)


def test_peft_s_own_unmerge_leaves_rounding_which_is_why_weights_are_kept():
    model = tuned(tiny(), target_modules="all-linear")
    before = weights_sha256(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert weights_sha256(model) != before


def test_nan_is_not_merged():
    model = tuned(tiny())
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="peft cannot merge it: NaNs"):
        merge_for_good(model, torch.float32)


def test_the_certificate_by_hand():
    before = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]]])
    after = torch.tensor([[[0.0, 1.5], [2.0, 0.0], [1.0, 0.0]]])
    found = certify([[0, 1, 1]], before=before, after=after)
    assert (found.tokens, found.largest_logit_difference) == (3, 1.0)
    assert found.mean_logit_difference == pytest.approx((0.5 + 1 + 1) / 6)
    assert found.top_1 == pytest.approx(2 / 3)
    p = torch.softmax(torch.tensor([[0.0, 1.5], [2.0, 0.0]]), -1)
    assert found.perplexity == pytest.approx((1 / (p[0, 1] * p[1, 1]).sqrt()).item(), rel=1e-6)


def test_nan_is_beyond_every_limit():
    before = torch.zeros(2, 3, 4)
    after = before.clone()
    after[1, 1, 2] = float("nan")
    found = certify([[0, 1, 2], [1, 2, 3]], before=before, after=after)
    assert any("logit differs by nan" in line for line in LIMITS["float32"].exceeded(found))


def test_rebatching_moves_logits_by_rounding_only():
    windows = [list(range(number, number + 40)) for number in range(4)]
    assert 0 < rebatching_difference(tiny(), windows) < 1e-4


@pytest.fixture
def adapter(write_config):
    settings = load_settings(str(write_config(lora={"target_modules": "all-linear"})))
    return finetune(settings) / "adapter"


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_the_command_s_folder(adapter, tmp_path, dtype):
    output = tmp_path / "merged"
    lines = merge(str(adapter), output, dtype=dtype, model=None, runs=tmp_path)
    stored = json.loads((output / "certificate.json").read_text())
    kept = Certificate(**stored["against_adapter"])
    assert kept.in_words() in lines[1]
    assert stored["template"] == "alpaca"
    tensors = load_file(output / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype or 'float32'}"}
    if dtype in (None, "float32"):
        assert kept.largest_logit_difference < 1e-4
        assert kept.top_1 == 1
    with pytest.raises(UserError, match="exists already"):
        merge(str(adapter), output, dtype=dtype, model=None, runs=tmp_path)


def test_a_merge_that_loses_too_much_is_refused_and_leaves_nothing(adapter, tmp_path, monkeypatch):
    def worse(layer):
        layer.merge()
        layer.get_base_layer().weight.data *= 1.05

    monkeypatch.setattr(merging, "_merge", worse)
    with pytest.raises(RunFailed, match=r"(?s)against.*not merged: a logit differs by"):
        merge(str(adapter), tmp_path / "merged", dtype="float32", model=None, runs=tmp_path)
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("quantization", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_from_a_quantised_training_the_full_precision_base_is_taken(
    write_config, tmp_path, tiny_checkpoint, quantization
):
    config = write_config(model={"quantization": quantization}, training={"num_train_epochs": 4})
    adapter = finetune(load_settings(str(config))) / "adapter"
    lines = merge(str(adapter), tmp_path / "merged", dtype="float32", model=None, runs=tmp_path)
    assert any("the quantised base it was trained on" in line for line in lines)
    stored = json.loads((tmp_path / "merged/certificate.json").read_text())
    kept, lost = stored["against_adapter"], stored["against_quantized_training"]
    assert kept["largest_logit_difference"] < 1e-4 < lost["largest_logit_difference"]
    # Stock peft on the base that was never quantised.
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_checkpoint), adapter)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-4, atol=1e-4)
