"""Real runs of the tiny model: what is learned, written and said."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM, TrainerCallback

from recipe.data.rows import read_rows
from recipe.data.templates import build_template
from recipe.data.tokens import tokenize_rows
from recipe.finetune import finetune
from recipe.model.checkpoint import load_tokenizer
from recipe.settings import RunFailed, UserError, load_settings


class Keep(TrainerCallback):
    """Keeps the model that the Trainer trained."""

    model = None

    def on_train_end(self, args, state, control, model=None, **_):
        self.model = model


def run(config, *overrides, watchers=()):
    return finetune(load_settings(str(config), overrides), watchers=watchers)


def test_base_stays_bit_equal_and_every_adapter_tensor_moves(write_config, tiny_checkpoint):
    keep = Keep()
    folder = run(write_config(lora={"target_modules": "all-linear"}), watchers=[keep])
    stock = LlamaForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    trained = keep.model.get_base_model().state_dict()
    for name, tensor in stock.items():
        ours = trained.get(name, trained.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(ours, tensor), name
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_the_run_folder_tells_the_run(write_config, capsys):
    folder = run(
        write_config(data={"rows": "0:8", "held_out": "8:12"}), "training.eval_strategy=epoch"
    )
    assert {"adapter", "loss.png", "manifest.json", "metrics.jsonl", "settings.yaml"} == {
        p.name for p in folder.iterdir()
    }
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    epochs = [r["epoch_loss"] for r in records if "epoch_loss" in r]
    held_out = [r["eval_perplexity"] for r in records if "eval_perplexity" in r]
    assert len(losses) == 4
    assert len(epochs) == 2
    assert len(held_out) == 3  # before and after each of two epochs
    assert epochs[1] < epochs[0]
    screen = capsys.readouterr().out
    assert f"held-out perplexity {held_out[0]:.2f} → {held_out[-1]:.2f}" in screen
    assert f"training loss {epochs[0]:.3f} → {epochs[-1]:.3f}" in screen
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["rows"] == 8
    assert manifest["parameters"]["trainable"] == 2 * 4 * ((64 + 64) + (64 + 32))


def test_saved_settings_repeat_the_run(write_config, tmp_path):
    first = run(write_config(lora={"lora_dropout": 0.1}))
    again = run(first / "settings.yaml", f"training.output_dir={tmp_path / 'again'}")
    weights = "adapter/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    hashes = [
        json.loads((f / "manifest.json").read_text())["initial_adapter_sha256"]
        for f in (first, again)
    ]
    assert hashes[0] == hashes[1]


def test_runs_are_numbered_and_never_overwritten(write_config, tmp_path, monkeypatch):
    config = yaml.safe_load(write_config().read_text())
    del config["training"]["output_dir"]
    (tmp_path / "numbered.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    overrides = ["training.max_steps=1"]
    assert str(run("numbered.yaml", *overrides)) == "runs/numbered-001"
    assert str(run("numbered.yaml", *overrides)) == "runs/numbered-002"
    with pytest.raises(UserError, match="is not empty"):
        run("numbered.yaml", "training.output_dir=runs/numbered-001")


@pytest.mark.parametrize("eval_batch", [1, 3, 4])
def test_held_out_perplexity_is_weighted_by_tokens(write_config, tiny_checkpoint, eval_batch):
    """Oracle: the saved adapter on the stock model, one row at a time, in float64."""
    config = write_config(
        lora={"lora_dropout": 0.5},  # nothing is dropped out while evaluating
        data={"rows": "0:8", "held_out": "8:12"},
    )
    folder = run(config, f"training.per_device_eval_batch_size={eval_batch}")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

    settings = load_settings(str(config))
    tokenizer = load_tokenizer(settings.model)
    rows = tokenize_rows(
        read_rows(settings.data).held_out,
        build_template("alpaca", tokenizer),
        tokenizer,
        source="rows",
    )
    base = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, folder / "adapter").double().eval()
    nll = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype("int64"))
        with torch.no_grad():
            log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
        nll += [-log_probabilities[i - 1, ids[i]] for i in range(1, len(ids)) if row.trained[i]]
    mean = torch.stack(nll).mean()
    assert last["eval_trained_tokens"] == len(nll)
    assert last["eval_loss"] == pytest.approx(mean.item(), rel=1e-6)
    assert last["eval_perplexity"] == pytest.approx(mean.exp().item(), rel=1e-6)


def test_before_and_after_are_evaluated_in_the_same_precision(write_config):
    config = write_config(
        data={"rows": "0:8", "held_out": "8:12"},
        lora={"init_lora_weights": False},
        training={"bf16": True, "learning_rate": 1e-60},
    )
    folder = run(config)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (r["eval_loss"] for r in records if "eval_loss" in r)
    assert before == after
    single = run(config, "training.bf16=false", f"training.output_dir={folder}-fp32")
    first = json.loads((single / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] != before


def test_nan_stops_the_run_and_saves_nothing(write_config, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")

    with pytest.raises(RunFailed, match="nan at step 3"):
        run(write_config(), watchers=[Poison()])
    assert not (tmp_path / "run/adapter").exists()
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize("lora", [{}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_learned_nothing_is_not_saved(write_config, tmp_path, lora):
    with pytest.raises(RunFailed, match=r"B·A is zero for .* so it changes nothing"):
        run(write_config(lora=lora, training={"learning_rate": 1e-60, "max_steps": 1}))
    assert not (tmp_path / "run/adapter").exists()


@pytest.fixture
def edited(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint with other keys in one of its JSON files."""

    def edit(file, **values):
        copy = shutil.copytree(tiny_checkpoint, tmp_path / "edited", dirs_exist_ok=True)
        (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **values}))
        return {"name_or_path": str(copy)}

    return edit


def test_special_ids_that_disagree_stop_a_run(write_config, edited, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        run(write_config(model=edited("config.json", eos_token_id=5)))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_a_larger_model_stops_a_run(write_config, edited, tokenizer):
    """Its weights are not even asked for."""
    config = write_config(model=edited("config.json", vocab_size=len(tokenizer) - 60))
    with pytest.raises(UserError, match=r"makes token .* but the model knows"):
        run(config)


def test_the_first_llama_2_generation_config_is_said_and_does_no_harm(write_config, edited, capsys):
    model = edited("generation_config.json", temperature=0.9, top_p=0.6)
    run(write_config(model=model, training={"save_strategy": "steps", "save_steps": 2}))
    screen = capsys.readouterr().out
    assert "temperature" in screen
    assert "top_p" in screen
    assert "saved " in screen


def test_tensorboard_if_asked(write_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(data={"rows": "0:8", "held_out": "8:12"})
    folder = run(config, "training.report_to=tensorboard", "training.max_steps=1")
    events = tmp_path.rglob("events.out.tfevents.*")
    assert {file.parent for file in events} == {folder / "tensorboard"}
    reader = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(reader.Scalars("eval/perplexity")) == 2
    assert reader.Scalars("train/loss")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.fp16=true"], "fp16 training needs a GPU"),
        (["training.bf16=true", "training.use_cpu=false"], "must be meant"),
        (["lora.target_modules=[q_porj]"], "Choose among .*q_proj"),
        (["lora.target_modules=[q_proj, v_porj]"], "v_porj matches no module"),
        (["lora.target_modules=q_proj,v_proj"], "Write a list: .q_proj,v_proj."),
        (["lora.modules_to_save=[lm_haed]"], "lm_haed matches no module"),
        (["lora.target_modules=("], "peft refuses it"),
        (["lora.init_lora_weights=pissa", "lora.use_dora=true"], "cannot make it a plain adapter"),
        (
            ["lora.init_lora_weights=pissa", "lora.target_modules=[q_proj, embed_tokens]"],
            "cannot make it a plain adapter",
        ),
        (
            [
                "lora.init_lora_weights=pissa",
                "lora.use_rslora=true",
                "lora.rank_pattern={q_proj: 2}",
            ],
            "peft refuses",
        ),
        (["training.report_to=wandb"], "transformers refuses it: .*wandb"),
        (["training.optim=galore_adamw"], "transformers refuses it"),
        (["training.lr_scheduler_type=cosine_with_min_lr"], "transformers refuses it"),
        (["model.name_or_path=models/absent"], "no folder models/absent"),
        (["data.path=absent.json"], "no file absent.json"),
        (["data.max_length=20"], "are longer than 20 tokens"),
        (["data.max_length=257"], "this model's context of 256"),
        (
            [
                "training.gradient_checkpointing=true",
                "training.gradient_checkpointing_kwargs={use_reentrant: true}",
            ],
            "no gradient",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    write_config, tmp_path, overrides, message
):
    if "fp16" in overrides[0] and torch.cuda.is_available():
        overrides = [*overrides, "training.use_cpu=true"]
    before = sorted(tmp_path.iterdir())
    config = write_config()
    with pytest.raises(UserError, match=message):
        run(config, *overrides)
    assert sorted(tmp_path.iterdir()) == sorted({*before, config, tmp_path / "rows.json"})


@pytest.mark.parametrize(("rate", "said"), [(1e-12, True), (0.01, False)])
def test_a_learning_rate_that_changes_no_answer_is_said(write_config, capsys, rate, said):
    folder = run(write_config(training={"learning_rate": rate}))
    line = "warning   the adapter leaves the base's answers as they are"
    assert (line in capsys.readouterr().out) == said
    assert ('"note": "unchanged"' in (folder / "metrics.jsonl").read_text()) == said
