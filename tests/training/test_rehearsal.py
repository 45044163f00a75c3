"""Before step 1, everything once; and nothing of it stays."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe import rehearsal as rehearsal_module
from recipe.data.tokens import TokenizedRow
from recipe.finetune import finetune
from recipe.memory.forecast import _longest
from recipe.rehearsal import rehearse
from recipe.settings import RunFailed, load_settings
from recipe.training.trainer import TokenWeightedTrainer
from tests.training.test_resume import WEIGHTS, metrics


@pytest.fixture
def config(write_config):
    return write_config(
        lora={"lora_dropout": 0.1},
        data={"rows": "0:9", "held_out": "9:12"},
        training={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
    )


def run(config, *overrides, rehearse=rehearse):
    return finetune(load_settings(str(config), overrides), rehearse=rehearse)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.gradient_checkpointing=true"],
        ["lora.init_lora_weights=pissa", "training.dataloader_num_workers=1"],
    ],
)
def test_nothing_of_it_stays(config, tmp_path, capsys, overrides):
    plain = run(config, *overrides, f"training.output_dir={tmp_path / 'plain'}", rehearse=None)
    assert "rehearsed" not in capsys.readouterr().out
    rehearsed = run(config, *overrides)
    said = capsys.readouterr().out
    assert re.search(
        r"\nrehearsed longest micro-batch \(2 rows, \d+ tokens\), evaluation, checkpoint saved and "
        r"reopened, generation · \d+\.\d s · \d\.\d\d GiB resident\nepoch 1",
        said,
    )
    assert (rehearsed / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert metrics(rehearsed) == metrics(plain)
    assert {p.name for p in rehearsed.iterdir()} == {p.name for p in plain.iterdir()}


def test_it_takes_the_longest_micro_batch_of_the_run(config, monkeypatch):
    taken, seen = [], []

    def step(self, rows, forward):
        taken.append(sorted(row.index for row in rows))
        return rehearse_step(self, rows, forward)

    def train(self, model, inputs, *rest):
        seen.append((sum(inputs["row_lengths"]) + sum(inputs["openings"]), inputs["row_indices"]))
        return training_step(self, model, inputs, *rest)

    rehearse_step, training_step = (
        TokenWeightedTrainer.rehearse_step,
        TokenWeightedTrainer.training_step,
    )
    monkeypatch.setattr(TokenWeightedTrainer, "rehearse_step", step)
    monkeypatch.setattr(TokenWeightedTrainer, "training_step", train)
    for overrides in ([], ["training.max_steps=1"], ["training.num_train_epochs=5"]):
        taken.clear()
        seen.clear()
        shutil.rmtree(run(config, *overrides))
        most = max(tokens for tokens, _ in seen)
        assert taken[0] in [sorted(rows) for tokens, rows in seen if tokens == most]


def cut_conversations() -> list[TokenizedRow]:
    """Of 9 tokens 2 are needed of the first, of 6 tokens 5 of the others."""
    whole, needed = (9, 6, 6), (2, 5, 5)
    return [
        TokenizedRow(index, np.arange(n, dtype=np.int32), np.arange(n) == last)
        for index, (n, last) in enumerate(zip(whole, needed, strict=True))
    ]


def test_what_is_longest_needs_most():
    """The end of a row from which nothing is predicted takes no memory."""
    rows = cut_conversations()
    loader = SimpleNamespace(batch_sampler=[[0], [1], [2]], set_epoch=lambda epoch: None)
    trainer = SimpleNamespace(
        train_dataset=rows,
        callback_handler=SimpleNamespace(train_dataloader=loader),
        state=SimpleNamespace(max_steps=3),
        args=SimpleNamespace(gradient_accumulation_steps=1),
    )
    assert [r.index for r in TokenWeightedTrainer.longest_micro_batch(trainer)] == [1]
    assert [r.index for r in _longest(rows, 2, None)] == [1, 2]
    (cut,) = _longest(rows, 1, 4)
    assert (cut.input_ids.tolist(), cut.needed) == ([2, 3, 4, 5], 3)


def test_too_little_memory_is_told_before_the_first_step(config, tmp_path, monkeypatch):
    def lack(self, *args, **named):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(TokenWeightedTrainer, "compute_loss_context_manager", lack)
    with pytest.raises(RunFailed) as raised:
        run(config)
    said = str(raised.value)
    assert re.match(
        r"out of memory with \d+ tokens at a time \(rows \d+, \d+\), after step 0", said
    )
    halved = "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=4 ("
    assert halved in said  # the same rows a step
    assert "training.gradient_checkpointing=true (" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_user_stays(config, tmp_path, monkeypatch):
    def lack(*args, **named):
        raise MemoryError

    monkeypatch.setattr(TokenWeightedTrainer, "compute_loss_context_manager", lack)
    (tmp_path / "run").mkdir()
    with pytest.raises(RunFailed, match="out of memory"):
        run(config)
    assert not list((tmp_path / "run").iterdir())


def test_memory_that_ends_later_names_the_rows(config, tmp_path, monkeypatch):
    def lack(self, *args, **named):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return compute_loss(self, *args, **named)

    compute_loss = TokenWeightedTrainer.compute_loss
    monkeypatch.setattr(TokenWeightedTrainer, "compute_loss", lack)
    with pytest.raises(RunFailed) as raised:
        run(config, "training.gradient_checkpointing=true")
    said = str(raised.value)
    assert re.match(r"out of memory with \d+ tokens at a time \(rows? \d", said)
    assert "after step 3 of 6" in said
    assert "gradient_checkpointing" not in said
    assert said.endswith(f"training.resume_from_checkpoint={tmp_path / 'run'}")


def test_a_checkpoint_that_reads_otherwise_is_told(config, tmp_path, monkeypatch):
    def harm(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        next(iter(weights.values()))[0, 0] += 1
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        seal(folder)

    seal = rehearsal_module.seal
    monkeypatch.setattr(rehearsal_module, "seal", harm)
    with pytest.raises(RunFailed, match="differs from the trained values"):
        run(config)
    assert not (tmp_path / "run").exists()
