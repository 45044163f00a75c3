"""Certificates of a real model: what each dtype loses."""

import json

import pytest

from recipe.finetune import finetune
from recipe.merge import merge
from recipe.settings import load_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, starter):
    run = tmp_path_factory.mktemp("run") / "run"
    overrides = [
        f"model.name_or_path={starter}", "data.rows=0:64", "data.held_out=null",
        "training.eval_strategy=no", "training.num_train_epochs=1", "training.save_strategy=no",
        f"training.output_dir={run}",
    ]  # fmt: skip
    return str(finetune(load_settings("starter.yaml", overrides)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_certificate(adapter, tmp_path, dtype):
    merge(adapter, tmp_path / "merged", dtype=dtype, model=None, runs=tmp_path)
    stored = json.loads((tmp_path / "merged/certificate.json").read_text())
    found = stored["against_adapter"]
    assert found["tokens"] == 2000
    if dtype == "float32":
        assert found["largest_logit_difference"] < 1e-3
        assert found["largest_logit_difference"] < 10 * stored["base_rebatched"]
        assert found["top_1"] == 1
