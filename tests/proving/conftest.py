"""Proofs of the tiny checkpoint."""

import gc
from collections.abc import Callable, Iterator

import pytest

import recipe.keeping
from recipe.proving import claims
from recipe.proving.evidence import Evidence
from recipe.proving.finding import Finding
from recipe.proving.plan import make_plan
from recipe.settings import load_settings

EVERY = claims.CLAIMS


@pytest.fixture
def proof(write_config, tmp_path, monkeypatch) -> Iterator[Callable[..., dict[str, Finding]]]:
    """The findings of a config by their claim: of the claims that are named, else of all but that
    on processes.
    """
    monkeypatch.setattr(recipe.keeping, "plot_loss", lambda *_, **__: None)
    gc.collect()
    gc.freeze()  # as prove.py does

    def prove(*names: str, **sections) -> dict[str, Finding]:
        config = write_config(
            lora={"lora_dropout": 0.1, **sections.pop("lora", {})},
            data={"rows": "0:10", "held_out": "10:12", **sections.pop("data", {})},
            training={"per_device_train_batch_size": 8, **sections.pop("training", {})},
            **sections,
        )
        wanted = names or [claim.name for claim in EVERY[:-1]]
        monkeypatch.setattr(claims, "CLAIMS", [one for one in EVERY if one.name in wanted])
        folder = tmp_path / "proof"
        folder.mkdir()
        plan = make_plan(load_settings(str(config)))
        found = list(claims.judged(Evidence(plan, folder, lambda what: None)))
        print("\n".join(finding.line for finding in found))
        return {finding.claim: finding for finding in found}

    yield prove
    gc.unfreeze()
