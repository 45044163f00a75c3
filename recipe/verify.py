"""All checks of one adapter: those of every load, and the probes."""

import os
from pathlib import Path

from recipe.answerer import Answerer, adapter_folder, load_answerer
from recipe.settings import RunFailed
from recipe.sharing.adapter_folder import newest_adapter
from recipe.sharing.receipt import RECEIPT
from recipe.sharing.verification import NotVerified


def verified(adapter: str | None, *, model: str | None, runs: Path) -> Answerer:
    """Load an adapter and put it through every check.

    Args:
        adapter, model: see ``recipe.answerer.load_answerer``.

    Raises:
        UserError: there is no such adapter or base.
        RunFailed: with one line for each problem.
    """
    folder = adapter_folder(adapter) if adapter else newest_adapter(runs)
    # No check of an adapter without a receipt reads a template, and it does not name one.
    template = None if os.path.isfile(folder / RECEIPT) else "raw"  # noqa: PTH113
    try:
        answerer = load_answerer(adapter=str(folder), model=model, template=template, runs=runs)
        verification = answerer.verification
        assert verification is not None  # only a base alone has none
        verification.answers(answerer.model, answerer.tokenizer, answerer.template)
    except NotVerified as error:
        raise RunFailed(str(error)) from error
    return answerer


def report(answerer: Answerer) -> list[str]:
    """Lines for the screen: what was checked and found."""
    verification = answerer.verification
    assert verification is not None
    return [f"{check:<11}{found}" for check, found in verification.passed]
