"""A learning rate that destroys the adapter, freezes it or leaves the answers alone is said."""

import pytest
import torch
from transformers import TrainerCallback

from tests.training.harm import At, notes, records


class Kwargs(TrainerCallback):
    """Keeps the names that the model's forward is called with."""

    names: frozenset = frozenset()

    def on_train_begin(self, args, state, control, model=None, **_):
        def keep(module, arguments, named):
            self.names |= named.keys()

        model.register_forward_pre_hook(keep, with_kwargs=True)


def test_a_sound_run_warns_of_nothing_and_the_model_sees_no_indices(run, trainer, capsys):
    kwargs = Kwargs()
    data = {"rows": "0:8", "held_out": "8:12"}
    folder = run(kwargs, data=data, training={"eval_strategy": "epoch", "warmup_steps": 2})
    assert "warning" not in capsys.readouterr().out
    assert notes(folder) == []
    assert "row_lengths" in kwargs.names
    assert "row_indices" not in kwargs.names
    assert not trainer().answers_unchanged(trainer().train_dataset[0])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # Far from the base after one step, and the loss grows without bound.
        (
            {"lora": {"target_modules": ["o_proj", "lm_head"]}, "training": {"learning_rate": 1e6}},
            [(1, "grown"), (2, "exploded")],
        ),
        ({"training": {"learning_rate": 1e6}}, [(1, "grown")]),
        # Attention saturates, and no gradient comes back.
        ({"training": {"learning_rate": 1e30}}, [(1, "grown"), (2, "frozen")]),
    ],
)
def test_a_learning_rate_that_destroys_the_adapter_is_said_once(run, capsys, sections, expected):
    folder = run(**sections)
    assert notes(folder) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == len(expected)
    rate = sections["training"]["learning_rate"]
    assert all(f"Lower training.learning_rate (now {rate:g})." in line for line in lines)
    assert [f"warning   {r['line']}" for r in records(folder) if "note" in r] == lines


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_has_noted_what_the_whole_one_did(run, tmp_path, step):
    def stop(model):
        raise RuntimeError("power cut")

    training = {"learning_rate": 1e6, "num_train_epochs": 1}
    lora = {"target_modules": ["o_proj", "lm_head"]}
    outputs = [f"training.output_dir={tmp_path / name}" for name in ("whole", "stopped")]
    whole = run(lora=lora, training=training, overrides=outputs[:1])
    with pytest.raises(RuntimeError, match="power cut"):
        run(At("on_substep_end", step, stop), lora=lora, training=training, overrides=outputs[1:])
    resume = f"training.resume_from_checkpoint={tmp_path / 'stopped'}"
    resumed = run(lora=lora, training=training, overrides=[*outputs[1:], resume])
    assert notes(resumed) == notes(whole) == [(1, "grown"), (2, "exploded")]
    lines = [[r["line"] for r in records(f) if "note" in r] for f in (resumed, whole)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"learning_rate": 1e-12}},
        {"training": {"learning_rate": 1e-12, "warmup_steps": 2}},
        {"training": {"learning_rate": 1e-12, "bf16": True}},
        {"training": {"learning_rate": 1e-12}, "lora": {"lora_dropout": 0.5}},
    ],
)
def test_an_adapter_too_small_to_matter_leaves_the_answers_unchanged(run, trainer, sections):
    folder = run(**sections)
    assert [kind for _, kind in notes(folder)] == ["unchanged"]
    model, row = trainer().model, trainer().train_dataset[0]
    model.train()
    model.get_base_model().model.norm.eval()
    modes = [module.training for module in model.modules()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    random = torch.get_rng_state()
    assert trainer().answers_unchanged(row)
    assert [module.training for module in model.modules()] == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert not trainer().answers_unchanged(row)  # it is switched on again


@pytest.mark.parametrize("lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_an_adapter_that_took_its_start_out_of_the_base_always_matters(run, trainer, lora):
    run(lora=lora)
    assert not trainer().answers_unchanged(trainer().train_dataset[0])
