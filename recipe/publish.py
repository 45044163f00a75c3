"""An adapter goes to the hub, and what lies there then is fetched and verified like any other."""

import gc
import json
import os
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from recipe.answerer import Answerer
from recipe.data.prompts import Prompt, read_prompts
from recipe.sealed import SEAL, seal, whole_folder
from recipe.settings import (
    GenerationSettings,
    HubSettings,
    ModelSettings,
    RunFailed,
    UserError,
    generation_settings,
)
from recipe.sharing.card import PICTURE, Card, RunFacts, Sample, read_run
from recipe.sharing.hub import HubError, Published, check_writable, commit_of, download, upload
from recipe.sharing.licence import check_license
from recipe.sharing.probes import PROMPTS
from recipe.sharing.pulled import adapter_at, shown
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT, Receipt
from recipe.sharing.tensors import WEIGHTS
from recipe.verify import report, verified

_SAMPLES = 3
_BATCH = 8
_SAMPLE_TOKENS = 96


def check_hub(hub: HubSettings, base: ModelSettings) -> None:
    """Everything about the push at the end of a run that can be known before it.

    Raises:
        UserError: it could not be published.
    """
    assert hub.repo_id is not None
    base_model = _base_model(base, hub, trained=False)
    check_writable(hub.repo_id, private=hub.private, where="hub.repo_id")
    _say_base(hub, base, base_model)


def publish(
    adapter: str | None,
    hub: HubSettings,
    *,
    model: str | None,
    samples: str | None = None,
    dry_run: bool = False,
    runs: Path,
) -> None:
    """Verify, describe, upload, download, verify.

    Args:
        samples: a file of prompts whose answers the card shows; a few of the shipped ones unless
            given, because rows of the training data may be nobody else's business.

    Raises:
        UserError: it may not be published there, or not as asked.
        RunFailed: it fails a check, or the hub did not take it; the adapter is as it was.
    """
    assert hub.repo_id is not None
    prompts = read_prompts(samples)[0] if samples else None
    if not dry_run:
        check_writable(hub.repo_id, private=hub.private, where="repo")
    answerer = verified(adapter, model=model, runs=runs)
    assert answerer.folder is not None
    receipt = _receipt(answerer)
    base_model = _base_model(receipt.base, hub, trained=True)
    with tempfile.TemporaryDirectory(prefix="recipe-push-") as clean:
        staged = Path(clean) / "adapter"
        revision = _commit(hub.base_model) if hub.base_model and not dry_run else None
        card = _stage(answerer, _with_base(receipt, hub, revision), hub, staged, prompts)
        names = sorted(file.name for file in staged.iterdir())
        if dry_run:
            print(card)
            say(f"dry run   {hub.repo_id} would hold {', '.join(names)}; nothing was sent")
            return
        _say_base(hub, receipt.base, base_model)
        command = push_command(answerer.folder, hub, model=model, samples=samples)
        # With its hub id the base is checked as others will get it, and before anything is sent.
        base_here = None if hub.base_model else answerer.tokenizer.name_or_path
        del answerer
        gc.collect()  # each check from here on loads a base of its own
        if hub.base_model:
            verified(str(staged), model=None, runs=runs)
        published = _upload(staged, hub, command)
        _verify_published(published, staged, Path(clean) / "back", base_here, command)
    visible = "private" if published.private else "public"
    say(f"published {published.url} at {published.commit[:12]}, {visible}")
    say(f"verified  {len(names)} files fetched again: equal, and they answer as trained")


def publish_run(run: Path, hub: HubSettings) -> None:
    """Publish what a run made. Whatever goes wrong is told, and the run stays a success."""
    gc.collect()  # what was trained is still in memory, and is loaded anew
    try:
        publish(str(run / "adapter"), hub, model=None, runs=run)
    except Exception as error:  # the adapter is safe; nothing that happens here may fail the run
        known = isinstance(error, UserError | RunFailed)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        command = push_command(run / "adapter", hub)
        say(f"warning   {said}")
        if command not in said:
            say(f"          The adapter is in {run / 'adapter'}; to publish it: {command}")


def pull(
    repo_id: str, revision: str | None, output: Path | None, *, model: str | None
) -> list[str]:
    """Fetch an adapter and put it through every check; return lines for the screen."""
    folder = adapter_at(repo_id, revision=revision)
    answerer = verified(str(folder), model=model, runs=Path("runs"))
    assert answerer.verification is not None
    if output is not None:
        with whole_folder(output) as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            (staged / SEAL).unlink()
    lines = [f"pulled     {repo_id} → {output or shown(folder)}", *report(answerer)]
    flags = ""
    if answerer.verification.unproven:
        lines.append(f"unproven   {answerer.verification.unproven}")
        flags = ' ARGS="--template chat"'
    return [*lines, f'next       make infer ADAPTER={output or repo_id} PROMPT="…"{flags}']


def push_command(
    folder: Path, hub: HubSettings, *, model: str | None = None, samples: str | None = None
) -> str:
    """What a person types to publish ``folder`` as ``hub`` says."""
    assert hub.repo_id is not None
    words = ["python", "recipe/adapter.py", "push", hub.repo_id, "--adapter", str(folder)]
    for flag, value in (
        ("--license", hub.license),
        ("--base-model", hub.base_model),
        ("--model", model),
        ("--samples", samples),
    ):
        words += [flag, value] if value else []
    return shlex.join([*words, *([] if hub.private else ["--public"])])


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _receipt(answerer: Answerer) -> Receipt:
    assert answerer.verification is not None
    if answerer.verification.unproven or answerer.verification.receipt is None:
        raise RunFailed(
            f"unproven: {answerer.verification.unproven}, and what nobody can check is not "
            "published here. `hf upload` does it without."
        )
    return answerer.verification.receipt


def _stage(
    answerer: Answerer,
    receipt: Receipt,
    hub: HubSettings,
    staged: Path,
    prompts: list[Prompt] | None,
) -> str:
    """Make the folder as it will lie on the hub; return the card.

    The seal holds for everything but card and picture, which people edit on the hub.
    """
    assert answerer.folder is not None
    assert hub.repo_id is not None
    staged.mkdir()
    for name in (ADAPTER_CONFIG, WEIGHTS, RECEIPT):
        shutil.copyfile(answerer.folder / name, staged / name)
    if hub.base_model:
        _rename_base(staged, receipt.base)
    seal(staged)
    run = read_run(answerer.folder.parent, receipt.manifest_sha256)
    shown_prompts = prompts or [Prompt(n, *prompt) for n, prompt in enumerate(PROMPTS[:_SAMPLES])]
    answers = _answers(answerer, shown_prompts)
    base_model = _base_model(receipt.base, hub, trained=True)
    card = Card(hub.repo_id, receipt, run, answers, hub.license, base_model)
    try:
        text = card.text()
    except (AttributeError, KeyError, TypeError, ValueError):  # files of a run that somebody edited
        text = replace(card, run=RunFacts()).text()
    (staged / "README.md").write_text(text, encoding="utf-8")
    if run.picture:
        shutil.copyfile(run.picture, staged / PICTURE)
    return text


def _commit(base_model: str) -> str:
    try:
        return commit_of(base_model, None)
    except (HubError, UserError) as error:
        raise UserError.single(
            "hub.base_model",
            f"{base_model} cannot be had from the hub, so nobody could use the adapter with it "
            f"({error}). Correct the name: --base-model, or hub.base_model.",
        ) from error


def _with_base(receipt: Receipt, hub: HubSettings, revision: str | None) -> Receipt:
    """As the base is named on the hub: pinned, so that it stays the one that was checked."""
    if not hub.base_model:
        return receipt
    base = {"name_or_path": hub.base_model, "revision": revision}
    return receipt.model_copy(update={"base": receipt.base.model_copy(update=base)})


def _base_model(base: ModelSettings, hub: HubSettings, *, trained: bool) -> str | None:
    """The hub id that the card names; None for a folder that is found from the repository's root.

    Args:
        trained: ``base`` is of a receipt, which has the commit of everything that is on the hub.

    Raises:
        UserError: the base is a folder whose path tells where this user keeps things.
    """
    if hub.base_model:
        return hub.base_model
    name = base.name_or_path
    is_folder = os.path.isdir(os.path.expanduser(name))  # noqa: PTH111, PTH112
    if not is_folder and (base.revision or not trained):
        return name
    if Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~"):
        raise UserError.single(
            "hub.base_model",
            f"the adapter names its base by a path of this machine ({name}), which helps nobody "
            "else and tells them where you keep it. Give the base's hub id: --base-model "
            "user/name, or hub.base_model.",
        )
    return None


def _say_base(hub: HubSettings, base: ModelSettings, base_model: str | None) -> None:
    say(check_license(hub.license, base, base_model))
    if base_model is None:
        say(
            f"note      the base is the folder {base.name_or_path}, which others may not have; "
            "--base-model or hub.base_model names it by its hub id"
        )


def _rename_base(folder: Path, base: ModelSettings) -> None:
    for name, inside, key in (
        (ADAPTER_CONFIG, None, "base_model_name_or_path"),
        (RECEIPT, "base", "name_or_path"),
    ):
        content = json.loads((folder / name).read_text())
        target = content[inside] if inside else content
        target |= {key: base.name_or_path, "revision": base.revision}
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _answers(answerer: Answerer, prompts: list[Prompt]) -> list[Sample]:
    settings = generation_settings({"max_new_tokens": _SAMPLE_TOKENS})
    tuned = _greedy(answerer, prompts, settings)
    with answerer.as_base() as base:
        untuned = _greedy(base, prompts, settings)
    return [
        Sample("\n".join(filter(None, (p.instruction, p.context))), b, t)
        for p, b, t in zip(prompts, untuned, tuned, strict=True)
    ]


def _greedy(answerer: Answerer, prompts: list[Prompt], settings: GenerationSettings) -> list[str]:
    answers = answerer.decoder(settings).answers(answerer.encode(prompts), batch_size=_BATCH)
    return [answer.text for (answer,) in answers]


def _upload(staged: Path, hub: HubSettings, command: str) -> Published:
    assert hub.repo_id is not None
    try:
        return upload(staged, hub.repo_id, private=hub.private, message="Upload adapter", say=say)
    except HubError as error:
        raise _unfinished(f"not published: {error}", command) from error


def _verify_published(
    published: Published, staged: Path, back: Path, model: str | None, command: str
) -> None:
    """Fetch the very commit into an empty folder and check it as a stranger would."""
    try:
        download(published.repo_id, back, revision=published.commit)
        for name in (ADAPTER_CONFIG, WEIGHTS, RECEIPT, "README.md"):
            if (back / name).read_bytes() != (staged / name).read_bytes():
                raise RunFailed(f"{name} is another than was sent")
        verified(str(back), model=model, runs=back)
    except HubError as error:
        raise _unfinished(f"published, but not checked: {error}", command) from error
    except RunFailed as error:
        what = f"published, but what came back is not sound: {error}".rstrip(".")
        raise _unfinished(what, command) from error


def _unfinished(what: str, command: str) -> RunFailed:
    return RunFailed(f"{what}. The adapter is as it was; to finish: {command}")
