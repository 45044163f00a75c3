"""Each lesson against closed forms, numpy, torch's own profiler and stock libraries."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from recipe.memory.live_bytes import LiveBytes
from recipe.proving.lessons import (
    LESSONS,
    Asked,
    accumulation,
    checkpointing,
    kv_cache,
    lora_rank,
    low_precision,
    truncated_svd,
)
from recipe.proving.lessons.models import tiny_llama
from recipe.proving.lessons.wording import growth_exponent, percent, power, size, three_digits
from recipe.settings import UserError
from tests.sharing.spectra import adapted, chosen

SPECTRUM = [4.0, 2.0, 1.0, 0.5]


def load(checkpoint):
    return LlamaForCausalLM.from_pretrained(checkpoint).requires_grad_(False)


@pytest.fixture(scope="module")
def asked(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint, and an adapter whose change of q_proj has the singular values known."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    chosen(tiny_checkpoint, [SPECTRUM, SPECTRUM]).save_pretrained(folder)
    return Asked(str(tiny_checkpoint), str(folder), seed=1)


@pytest.fixture(scope="module")
def taught(asked):
    """Every lesson twice, the long ones with fewer sizes; and that none moves a global state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulation, "MICRO_BATCHES", (2, 16))
        patch.setattr(checkpointing, "DEPTHS", (4, 16, 25))
        patch.setattr(checkpointing, "_REPEATS", 1)
        patch.setattr(kv_cache, "LENGTHS", (16, 64, 512))
        patch.setattr(lora_rank, "RANKS", (1, 16, 128))
        before = torch.get_rng_state()
        both = {name: [one.teach(asked) for _ in range(2)] for name, one in LESSONS.items()}
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.is_grad_enabled()
    return both


def without_seconds(numbers):
    if not isinstance(numbers, dict):
        return numbers
    return {key: without_seconds(value) for key, value in numbers.items() if "seconds" not in key}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_a_figure_a_paragraph_and_numbers(taught, name):
    once, again = taught[name]
    assert isinstance(once.figure, Figure)
    once.figure.savefig(picture := io.BytesIO())
    assert picture.getvalue().startswith(b"\x89PNG")
    assert int.from_bytes(picture.getvalue()[16:20], "big") == 900
    legends = len(once.figure.legends)
    for axes in once.figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert legends or axes.get_legend()
        looks = [(a.get_marker(), str(a.get_linestyle())) for a in axes.lines]
        drawn = [one for one in looks if one[0] not in ("None", "")]
        assert len(set(drawn)) == len(drawn), "told apart by colour alone"
    assert 3 <= len(re.findall(r"[.](?= [A-Z]|$| bf16)", once.paragraph)) <= 8
    assert "\n" not in once.paragraph
    json.dumps(once.numbers, allow_nan=False)
    assert without_seconds(once.numbers) == without_seconds(again.numbers)


def test_no_lesson_touches_pyplot():
    """Nor does looking up their names import a library."""
    script = (
        "import sys; from recipe.proving.lessons import LESSONS; "
        "assert not {'torch', 'matplotlib', 'numpy', 'transformers'} & sys.modules.keys(); "
        "import recipe.proving.lessons.drawing; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("name", "lesson"), LESSONS.items())
def test_what_is_needed_and_not_given_is_asked_for(name, lesson, asked, tmp_path):
    assert name == lesson.name
    needs = {"--model": lesson.needs_model, "--adapter": lesson.needs_adapter}
    for option, field in (("--model", "model"), ("--adapter", "adapter")):
        nowhere = str(tmp_path / "nowhere")
        for value in [nowhere] + [None] * needs[option]:
            with pytest.raises(UserError) as caught:
                lesson.teach(dataclasses.replace(asked, **{field: value}))
            (problem,) = caught.value.problems
            assert problem.where == option
            assert "Name a folder" in problem.message


@pytest.mark.parametrize("option", ["--model", "--adapter"])
def test_a_folder_of_something_else_is_told_by_its_option(asked, tmp_path, option):
    field = option.removeprefix("--")
    with pytest.raises(UserError) as caught:
        LESSONS["truncated-svd"].teach(dataclasses.replace(asked, **{field: str(tmp_path)}))
    assert {problem.where for problem in caught.value.problems} == {option}


def test_an_adapter_without_plain_lora_is_refused(tiny_checkpoint, tmp_path):
    adapted(tiny_checkpoint, use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--adapter: it changes no linear layer by plain LoRA"):
        LESSONS["truncated-svd"].teach(Asked(str(tiny_checkpoint), str(tmp_path)))


# accumulation


def stock_gradient(model, ids, labels):
    """Of the model's own loss, which shifts the labels itself."""
    model.zero_grad()
    shifted = torch.cat([torch.full_like(ids[:, :1], -100), labels], dim=1)
    model(input_ids=ids, labels=shifted).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulated_gradients_are_those_of_stock_losses():
    model = tiny_llama(0)
    ids = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = accumulation.labels_of(ids, torch.tensor([1, 8, 3, 5]))
    assert labels.ne(-100).sum(1).tolist() == [1, 8, 3, 5]
    whole = stock_gradient(model, ids, labels)
    means = [stock_gradient(model, ids[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    expected = {"all tokens": whole, "own tokens": (means[0] + means[1]) / 2}
    assert not torch.allclose(*expected.values(), atol=1e-4)
    for divisor, gradient in expected.items():
        ours = accumulation.gradient(model, ids, labels, micro_batches=2, divisor=divisor)
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


def test_accumulation_holds_where_it_should_and_only_there(taught):
    lesson = taught["accumulation"][0]
    found = lesson.numbers["relative_gradient_difference"]
    for exact in ("divided_by_all_tokens", "mean_of_means_equal_rows", "batch_norm_frozen"):
        assert max(found[exact]) < 2e-6, exact
    for wrong in ("mean_of_means", "batch_norm"):
        # Two halves can have nearly as many tokens; single rows cannot.
        assert min(found[wrong]) > 1e-4, wrong
        assert max(found[wrong]) > 0.1, wrong
        assert (
            f"by {percent(min(found[wrong]))} to {percent(max(found[wrong]))}" in lesson.paragraph
        )
    assert f"at most {max(found['divided_by_all_tokens']):.1e} of its length" in lesson.paragraph


def test_batch_norm_is_over_all_positions():
    hidden = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    normed = accumulation.OverTokens(8)(hidden)
    assert normed.shape == hidden.shape
    torch.testing.assert_close(normed.mean((0, 1)), torch.zeros(8), rtol=0, atol=1e-6)
    expected = (hidden - hidden.mean((0, 1))) / hidden.var((0, 1), correction=0).sqrt()
    torch.testing.assert_close(normed, expected, rtol=1e-3, atol=1e-4)


# checkpointing

ROWS, WIDTH, DEPTH = 32, 16, 16
ACTIVATION = ROWS * WIDTH * 4


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return [checkpointing.Layer(WIDTH) for _ in range(DEPTH)], torch.randn(ROWS, WIDTH)


def plain_step(layers, x):
    """The same network, written out."""
    for layer in layers:
        up, down = layer.up, layer.down
        inner = torch.nn.functional.gelu(x @ up.weight.T + up.bias)
        x = x + (inner @ down.weight.T + down.bias)
    x.square().mean().backward()


@pytest.mark.parametrize("name", checkpointing.FORMS)
def test_each_form_gives_the_gradient_of_the_network(stack, name):
    layers, x = stack
    plain_step(layers, x)
    expected = [p.grad.clone() for layer in layers for p in layer.parameters()]
    checkpointing.bytes_of(checkpointing.FORMS[name][1], layers, x)
    for p, one in zip((p for layer in layers for p in layer.parameters()), expected, strict=True):
        torch.testing.assert_close(p.grad, one, rtol=1e-4, atol=1e-7)


def test_the_forms_agree_to_the_bit(taught):
    lesson = taught["checkpointing"][0]
    assert lesson.numbers["largest_relative_gradient_difference"] == 0
    assert "the same gradients to the bit" in lesson.paragraph


def test_layers_are_called_as_often_as_derived_by_hand(taught):
    numbers = taught["checkpointing"][0].numbers
    depths = numbers["depths_layers"]
    # Once forward. For the backward pass of layer i of the last form: layers 1 to i again.
    by_hand = {
        "keep_everything": depths,
        "every_layer": [2 * n for n in depths],
        "every_root_n_layers": [2 * n for n in depths],
        "input_alone": [n + sum(range(1, n + 1)) for n in depths],
    }
    assert numbers["layer_calls"] == by_hand
    assert by_hand["input_alone"] == [n * (n + 3) // 2 for n in depths]


def test_what_is_held_for_the_backward_pass_is_the_closed_form(stack):
    """Of a layer: what enters it, and what is before and behind the GELU; and the loss."""
    held = {
        name: checkpointing.bytes_of(f, *stack)[1] for name, (_, f) in checkpointing.FORMS.items()
    }
    assert held == {
        "keep_everything": (3 * DEPTH + 1) * ACTIVATION + 4,
        "every_layer": (DEPTH + 1) * ACTIVATION + 4,
        "every_root_n_layers": (4 + 1) * ACTIVATION + 4,
        "input_alone": 2 * ACTIVATION,
    }


def test_what_is_held_is_what_autograd_saved(stack):
    layers, x = stack
    weights = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward = checkpointing.keep(layers, x)
    kept = sum(one.nbytes() for address, one in saved.items() if address not in weights)
    assert checkpointing.bytes_of(checkpointing.keep, layers, x)[1] == kept + 4
    backward()


def test_peaks_stay_below_what_theory_allows(stack):
    """Beside what is held: the insides of the layers that are computed again, and a few gradients
    on their way.
    """
    peak = {
        name: checkpointing.bytes_of(f, *stack)[0] for name, (_, f) in checkpointing.FORMS.items()
    }
    few = 6 * ACTIVATION
    assert (
        (3 * DEPTH + 1) * ACTIVATION < peak["keep_everything"] < (3 * DEPTH + 1) * ACTIVATION + few
    )
    assert peak["every_layer"] < (DEPTH + 1 + 3) * ACTIVATION + few
    assert peak["every_root_n_layers"] < (5 + 3 * 4) * ACTIVATION + few
    assert peak["input_alone"] < 5 * ACTIVATION + few
    assert (
        peak["input_alone"]
        == checkpointing.bytes_of(checkpointing.input_alone, stack[0][:4], stack[1])[0]
    )


@pytest.mark.parametrize("name", checkpointing.FORMS)
def test_live_bytes_are_those_of_torchs_allocator(stack, name):
    """All that is allocated, gradients too; kernels take some bytes for themselves."""
    layers, x = stack
    form = checkpointing.FORMS[name][1]
    live = LiveBytes([x, *(p for layer in layers for p in layer.parameters())])
    with live, live.phase("step"):
        form(layers, x)()
    gradients = sum(p.grad.nbytes for layer in layers for p in layer.parameters())
    assert live.now == gradients
    for layer in layers:
        layer.zero_grad()
    assert live.now == 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        form(layers, x)()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert live.peak == pytest.approx(peak, rel=0.02)


def test_gradients_take_the_same_memory_in_each_form(taught):
    lesson = taught["checkpointing"][0]
    numbers = lesson.numbers
    layer = 4 * 2 * (checkpointing.WIDTH**2 + checkpointing.WIDTH)
    expected = [layer * n for n in numbers["depths_layers"]]
    assert all(counts == expected for counts in numbers["gradient_bytes"].values())
    assert f"they take {size(expected[-1])} in each of the four" in lesson.paragraph
    for form, peaks in numbers["peak_activation_bytes"].items():
        growth = math.log(peaks[2] / peaks[1]) / math.log(25 / 16)
        assert numbers["growth_exponent"]["peak_activation_bytes"][form] == pytest.approx(growth)
        assert f"{size(peaks[-1])} (growing as {power(growth)})" in lesson.paragraph
    least, root = (
        numbers["growth_exponent"]["peak_activation_bytes"][form]
        for form in ("input_alone", "every_root_n_layers")
    )
    assert abs(least) < 1e-9
    assert 0.3 < root < 0.6


# low precision


@pytest.fixture
def heavy_tailed():
    generator = np.random.default_rng(0)
    values = generator.normal(size=20_000) * 10.0 ** generator.uniform(-11, 2, 20_000)
    values[:500] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("scale", [2.0**-7, 1.0, 64.0, 65536.0])
def test_flushed_and_infinite_are_numpys(heavy_tailed, scale):
    ours = torch.from_numpy(heavy_tailed)
    there = heavy_tailed[heavy_tailed != 0]
    with np.errstate(over="ignore", under="ignore"):
        converted = (there * np.float32(scale)).astype(np.float16)
    zero, infinite = (converted == 0).mean(), np.isinf(converted).mean()
    assert zero > 0
    assert low_precision.flushed(ours, scale, torch.float16) == pytest.approx(zero, abs=1e-12)
    assert low_precision.infinite(ours, scale, torch.float16) == pytest.approx(infinite, abs=1e-12)
    assert low_precision.flushed(ours, scale, torch.bfloat16) == 0
    if scale == 1:
        lost = np.linalg.norm(there[converted == 0].astype(float)) / np.linalg.norm(
            there.astype(float)
        )
        assert low_precision.flushed_length(ours) == pytest.approx(lost)


def test_unchanged_is_numpys_and_has_the_thresholds_of_the_formats():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=5000).astype(np.float32) * 0.05
    weights[np.abs(weights) < 1e-3] = 0.01
    signs = generator.choice(np.float32([-1, 1]), 5000)
    ours, theirs = torch.from_numpy(weights), weights.astype(np.float16)
    for exponent in np.arange(-14, -8, 0.25):
        update = np.abs(weights) * signs * np.float32(2.0**exponent)
        expected = (theirs + update.astype(np.float16) == theirs).mean()
        found = low_precision.unchanged(ours, torch.from_numpy(update), torch.float16)
        assert found == pytest.approx(expected, abs=1e-12)
    # Half of the last place is between 2^-(p+1) and 2^-p of a number with p digits behind the one.
    for dtype, digits in ((torch.float16, 10), (torch.bfloat16, 7), (torch.float32, 23)):
        for exponent, expected in ((-(digits + 2) - 0.5, 1), (-digits + 0.5, 0)):
            update = ours.abs() * torch.from_numpy(signs) * 2.0**exponent
            assert low_precision.unchanged(ours, update, dtype) == expected


def test_the_way_that_is_gone_is_that_of_a_numpy_loop():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=2000).astype(np.float32) * 0.1
    step = generator.choice(np.float32([-2e-5, 2e-5]), 2000)
    held = start = weights.astype(np.float16)
    for _ in range(low_precision.STEPS):
        held = held + step.astype(np.float16)
    gone = ((held.astype(float) - start.astype(float)) * np.sign(step)).sum()
    expected = gone / (low_precision.STEPS * np.abs(step.astype(float)).sum())
    ours = torch.from_numpy(weights), torch.from_numpy(step), torch.float16
    assert 0 < expected < 0.9
    found = low_precision.way_gone(*ours, held_in=torch.float16)
    assert found == pytest.approx(expected, rel=1e-9)
    assert low_precision.way_gone(*ours, held_in=torch.float32) == pytest.approx(1, abs=0.01)


def test_the_gradients_are_those_of_a_real_backward_pass(tiny_checkpoint):
    ids = torch.arange(3, 15)[None]
    passed = low_precision.backward(load(tiny_checkpoint), ids)
    model = load(tiny_checkpoint).requires_grad_(True)
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    for hidden in output.hidden_states:
        hidden.retain_grad()
    output.loss.backward()
    matrices = [p for p in model.model.layers[1].parameters() if p.ndim == 2]
    assert torch.equal(passed.weights, torch.cat([p.detach().flatten() for p in matrices]))
    weights = torch.cat([p.grad.flatten() for p in matrices])
    torch.testing.assert_close(passed.gradients["weights"], weights)
    # The first layer's; behind the last, hidden_states have the final norm.
    first = output.hidden_states[1].grad.flatten()
    activations = passed.gradients["activations"]
    torch.testing.assert_close(activations[: len(first)], first)
    assert len(activations) == 2 * len(first)
    logits = output.logits.detach()[0, :-1]
    expected = (logits.softmax(-1) - torch.eye(logits.shape[1])[ids[0, 1:]]) / len(logits)
    found = passed.gradients["logits"].view(len(ids[0]), -1)
    torch.testing.assert_close(found[:-1], expected, rtol=1e-4, atol=1e-8)
    assert not found[-1].any()


def test_low_precision_says_what_was_measured(taught):
    lesson = taught["low-precision"][0]
    numbers, text = lesson.numbers, lesson.paragraph
    for name in ("float16", "bfloat16"):
        assert percent(numbers["unchanged_share_at_learning_rate"][name]) in text
        assert percent(numbers["way_gone_share"][name]) in text
    for shares in numbers["flushed_share"]["float16"].values():
        assert shares == sorted(shares, reverse=True), "a larger scale loses less"
        assert percent(shares[0]) in text
    half, single = (numbers["unchanged_share"][name] for name in ("float16", "float32"))
    assert all(a >= b for a, b in zip(half, single, strict=True))


def test_low_precision_without_a_model_takes_a_tiny_one():
    numbers = LESSONS["low-precision"].teach(Asked()).numbers
    assert numbers["model"] == "a Llama of two layers with random weights"
    assert numbers["tokens"] == low_precision.TOKENS


# truncated SVD


def test_errors_are_those_of_numpys_truncated_matrices():
    matrix = np.random.default_rng(0).normal(size=(12, 7))
    found = truncated_svd.spectrum(torch.from_numpy(matrix), [1, 3, 7])
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    for k in range(8):
        left = np.linalg.norm(matrix - (u[:, :k] * values[:k]) @ v[:k]) / np.linalg.norm(matrix)
        assert found.errors[k] == pytest.approx(left, abs=1e-12)
    assert found.apart < 1e-12
    assert found.rank_for(found.errors[3]) == 3
    assert found.rank_for(found.errors[3] - 1e-9) == 4


def test_no_other_matrix_of_that_rank_comes_nearer():
    """The best on a random column space, and on one that was improved by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    errors = truncated_svd.spectrum(matrix, [1]).errors
    for k in range(1, 7):
        basis = torch.randn(12, k, generator=generator, dtype=torch.float64)
        for _ in range(200):
            basis = torch.linalg.qr(basis).Q
            left = float((matrix - basis @ (basis.T @ matrix)).norm() / matrix.norm())
            assert left >= errors[k] - 1e-12
            basis = matrix @ (matrix.T @ basis)
        assert left == pytest.approx(errors[k], rel=1e-3)


def test_the_update_is_what_peft_merges(tiny_checkpoint):
    model = adapted(tiny_checkpoint)
    found = truncated_svd.chosen(model)
    assert (found.name, found.r) == ("model.layers.1.self_attn.q_proj", 4)
    base = load(tiny_checkpoint).double().state_dict()[f"{found.name}.weight"]
    assert torch.equal(found.weight, base)
    merged = model.double().merge_and_unload().state_dict()[f"{found.name}.weight"]
    torch.testing.assert_close(found.update, merged - base, rtol=1e-6, atol=1e-9)


def test_a_chosen_spectrum_is_found(taught):
    lesson = taught["truncated-svd"][0]
    numbers = lesson.numbers
    squares = np.square(SPECTRUM)
    for k in range(1, 5):
        left = math.sqrt(squares[k:].sum() / squares.sum())
        assert numbers["relative_error"]["update"][k - 1] == pytest.approx(left, abs=1e-6)
    shares = numbers["energy_share_of_update"]
    assert list(shares) == ["1", "2"]
    assert shares["1"] == pytest.approx(16 / 21.25, abs=1e-6)
    assert numbers["numerical_rank_of_update"] == numbers["r"] == 4
    assert numbers["shape"] == [64, 64]
    assert numbers["closed_form_apart"] < 1e-12
    assert f"first 1 and 2 directions of 4 hold {percent(16 / 21.25)} and" in lesson.paragraph
    for name in ("weight", "gaussian"):
        assert numbers["relative_error"][name][-1] == 0
        assert numbers["relative_error_at_r"][name] == numbers["relative_error"][name][3]
        assert percent(numbers["relative_error_at_r"][name]) in lesson.paragraph


# rank of LoRA


def test_a_rank_costs_what_the_shapes_say(taught):
    """q_proj is 64 × 64 and v_proj 32 × 64, in each of two layers."""
    lesson = taught["lora-rank"][0]
    numbers = lesson.numbers
    assert numbers["r"] == [1, 16, 128]
    gradients = [4 * r * 2 * ((64 + 64) + (64 + 32)) for r in numbers["r"]]
    assert numbers["gradient_bytes"] == gradients
    # A and B of four matrices are eight tensors.
    assert numbers["adam_bytes"] == [2 * count + 8 * 4 for count in gradients]
    assert numbers["closed_form_gradient_bytes"] == gradients
    assert numbers["closed_form_adam_bytes"] == numbers["adam_bytes"]
    assert f"gradients take {size(gradients[1])} and Adam's state" in lesson.paragraph
    assert "each is to the byte" in lesson.paragraph


def test_full_fine_tuning_tensor_by_tensor_is_that_of_one_whole_step(taught, tiny_checkpoint):
    model = load(tiny_checkpoint).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = [v.nbytes for one in optimizer.state.values() for v in one.values()]
    numbers = taught["lora-rank"][0].numbers
    assert numbers["full_gradient_bytes"] == sum(p.grad.nbytes for p in model.parameters())
    assert numbers["full_adam_bytes"] == sum(state)
    assert numbers["full_parameters"] == model.num_parameters()


# key-value cache


def test_the_cache_is_as_large_as_the_closed_form_says(taught):
    """Two layers of two key-value heads of 16 float32 numbers; keys and values."""
    lesson = taught["kv-cache"][0]
    numbers = lesson.numbers
    assert numbers["length_tokens"] == [16, 64], "the model has 256 positions"
    assert numbers["cache_bytes"] == [2 * 2 * 2 * 16 * 4 * n for n in (16, 64)]
    assert numbers["closed_form_bytes"] == numbers["cache_bytes"]
    assert f"takes {size(numbers['cache_bytes'][-1])} for a row of 64 tokens" in lesson.paragraph
    assert "that is exactly 2 · 2 layers" in lesson.paragraph
    assert numbers["largest_relative_logit_difference"] < 1e-5
    cached, plain = numbers["seconds_a_token"].values()
    assert len(cached) == len(plain) == 2
    assert min(cached + plain) > 0
    assert f"a token {three_digits(plain[1] / cached[1])} times as fast" in lesson.paragraph


@torch.no_grad()
def test_both_ways_of_reading_give_the_logits_of_the_plain_model(tiny_checkpoint):
    model = load(tiny_checkpoint).eval()
    ids = torch.arange(3, 23)[None]
    (read,) = kv_cache.timed(model, [ids])
    output = model(ids, use_cache=True)
    for logits in (read.cached_logits, read.plain_logits):
        torch.testing.assert_close(logits, output.logits[:, -1], rtol=1e-4, atol=1e-5)
    assert kv_cache.cache_bytes(read.cache) == kv_cache.cache_bytes(output.past_key_values)
    assert read.cache.get_seq_length() == ids.shape[1]


# wording


def test_numbers_are_written_as_people_write_them():
    assert [size(count) for count in (12, 2048, 450 * 1024, 2**20, 7_670_000_000)] == [
        "12 bytes", "2.00 KiB", "450 KiB", "1.00 MiB", "7.14 GiB",
    ]  # fmt: skip
    shares = (0.0, 0.00026, 0.001, 0.6114, 0.99951, 1.0)
    assert [percent(share) for share in shares] == [
        "none", "0.03%", "0.1%", "61.1%", "over 99.9%", "100.0%",
    ]  # fmt: skip
    assert power(-0.001) == "n^0.00"
    assert growth_exponent([1, 2, 5], [3, 12, 75]) == pytest.approx(2)
