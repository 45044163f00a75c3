"""The model card: what it says, what it must not say, and what a text cannot do to it."""

import json

import pytest
import yaml

from recipe import adapter
from recipe.exit_codes import run_command
from recipe.finetune import finetune
from recipe.settings import ModelSettings, load_settings
from recipe.sharing.card import Card, RunFacts, Sample, read_run
from recipe.sharing.receipt import read_receipt

EVIL = "a | b\r\r# Title\n<script>x</script> `code` $$x$$ \x1b[31m [y](http://z) ![i](j)"


@pytest.fixture
def run(write_config):
    config = write_config(
        data={"rows": "0:8", "held_out": "8:12"}, training={"eval_strategy": "epoch"}
    )
    return finetune(load_settings(str(config)))


def card(run, **more):
    receipt = read_receipt(run / "adapter")
    facts = read_run(run, receipt.manifest_sha256)
    given = {"samples": (), "license": None, "base_model": "meta/llama", **more}
    return Card("me/mine", given.pop("receipt", receipt), given.pop("facts", facts), **given)


def test_it_says_what_was_measured(run):
    text = card(run, license="mit").text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["license"]) == ("meta/llama", "mit")
    assert metadata["base_model_relation"] == "adapter"
    assert "datasets" not in metadata
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in logged:
        if "epoch_loss" in record:
            assert f"{record['epoch_loss']:.3f}" in text
    assert "### Instruction:" in text
    assert str(run) not in text
    assert "rows.json" not in text


@pytest.mark.parametrize("samples", [[Sample(EVIL, EVIL, EVIL)], [Sample("x", "", "---\n---")]])
def test_a_models_output_is_text(run, samples):
    text = card(run, samples=samples).text()
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"
    answers = text[text.index("## Answers") : text.index("## Settings")]
    assert "\r" not in text
    assert "\x1b" not in text
    assert "<script" not in answers
    rows = [line for line in answers.splitlines() if line.startswith("| ")]
    assert len(rows) == 2  # the head and one row, whatever the texts hold
    bare = rows[1].replace("\\|", "").count("|")
    assert bare == 3
    assert "\n# Title" not in answers


def test_a_receipt_from_elsewhere_is_text_too(run):
    receipt = read_receipt(run / "adapter")
    base = ModelSettings(name_or_path='x"); import os #`\n## Owned')
    text = card(run, receipt=receipt.model_copy(update={"base": base}), base_model=None).text()
    assert "\n## Owned" not in text
    assert 'x"' not in text


def test_another_runs_figures_are_not_shown(run):
    receipt = read_receipt(run / "adapter").model_copy(update={"manifest_sha256": "0" * 64})
    assert read_run(run, receipt.manifest_sha256) == RunFacts()
    assert "## Measured" not in card(run, receipt=receipt, facts=RunFacts()).text()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"eval_perplexity": 3}\n'),
        ("metrics.jsonl", '{"epoch_loss": "x"}\n'),
        ("settings.yaml", "- a\n"),
        ("settings.yaml", ""),
        ("settings.yaml", "a: [\n"),
    ],
)
def test_files_of_a_run_that_somebody_edited(run, capsys, file, content):
    (run / file).write_text(content)
    capsys.readouterr()
    command = ["push", "me/mine", "--adapter", str(run), "--base-model", "me/base", "--dry-run"]
    assert run_command(lambda: adapter.main(command)) == 0
    assert "library_name: peft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("tatsu-lab/alpaca", "tatsu-lab/alpaca"),
        ("clients/acme.JSONL", None),
        ("../rows", None),
        ("~/rows", None),
        ("/home/me/rows.json", None),
    ],
)
def test_only_a_dataset_of_the_hub_is_named(run, path, shown):
    facts = RunFacts(settings={"data": {"path": path}}, manifest={"device": "CPU"})
    text = card(run, facts=facts).text()
    assert yaml.safe_load(text.split("---")[1]).get("datasets") == ([shown] if shown else None)
    assert (path in text) == bool(shown)
