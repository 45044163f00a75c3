"""An adapter goes to the hub, and what lies there then is fetched and verified like any other."""

import gc
import json
import shutil
import tempfile
from pathlib import Path

from recipe.answerer import Answerer
from recipe.data.prompts import Prompt, read_prompts
from recipe.sealed import seal
from recipe.settings import (
    GenerationSettings,
    HubSettings,
    ModelSettings,
    RunFailed,
    UserError,
    generation_settings,
)
from recipe.sharing.card import PICTURE, Card, Sample, read_run
from recipe.sharing.hub import HubError, Published, check_writable, download, upload
from recipe.sharing.licence import check_license
from recipe.sharing.probes import PROMPTS
from recipe.sharing.pulled import adapter_at, shown
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT, Receipt
from recipe.sharing.tensors import WEIGHTS
from recipe.sharing.verification import unsafe_files
from recipe.verify import report, verified

_SAMPLES = 3
_SAMPLE_TOKENS = 96


def check_hub(hub: HubSettings, base: ModelSettings, *, where: str) -> None:
    """Everything about a later push that can be known now.

    Raises:
        UserError: it could not be published.
    """
    assert hub.repo_id is not None
    base_model = _base_model(base, hub)
    check_writable(hub.repo_id, private=hub.private, where=where)
    say(check_license(hub.license, base, base_model))
    if base_model is None:
        say(
            f"note      the base is the folder {base.name_or_path}, which others may not have; "
            "--base-model or hub.base_model names it by its hub id"
        )


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
    answerer = verified(adapter, model=model, runs=runs)
    assert answerer.folder is not None
    receipt = _receipt(answerer)
    if not dry_run:
        check_hub(hub, receipt.base, where="repo")
    folder = answerer.folder
    with tempfile.TemporaryDirectory(prefix="recipe-push-") as clean:
        staged = Path(clean) / "adapter"
        card = _stage(answerer, receipt, hub, staged, prompts)
        names = sorted(file.name for file in staged.iterdir())
        if dry_run:
            print(card)
            say(f"dry run   {hub.repo_id} would hold {', '.join(names)}; nothing was sent")
            return
        trained_on = answerer.tokenizer.name_or_path
        del answerer
        gc.collect()  # what comes back is verified with a base of its own
        command = push_command(folder, hub)
        published = _upload(staged, hub, command)
        _verify_published(published, staged, Path(clean) / "back", trained_on, command)
    say(f"published {published.url} at {published.commit[:12]}, {_visible(hub)}")
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
    if output is not None:
        shutil.copytree(folder, output)
    return [
        f"pulled     {repo_id} → {output or shown(folder)}",
        *report(answerer),
        f'next       make infer ADAPTER={output or repo_id} PROMPT="…"',
    ]


def push_command(folder: Path, hub: HubSettings) -> str:
    """What a person types to publish ``folder`` as ``hub`` says."""
    flags = [f"--adapter {folder}"]
    flags += [f"--license {hub.license}"] if hub.license else []
    flags += [f"--base-model {hub.base_model}"] if hub.base_model else []
    flags += [] if hub.private else ["--public"]
    return f"python recipe/adapter.py push {hub.repo_id} {' '.join(flags)}"


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
    assert answerer.folder is not None
    if problems := unsafe_files(answerer.folder):
        raise RunFailed("\n".join(f"files: {line}. Remove it." for line in problems))
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
    base_model = _base_model(receipt.base, hub)
    if hub.base_model:
        _rename_base(staged, hub.base_model)
        base = receipt.base.model_copy(update={"name_or_path": hub.base_model, "revision": None})
        receipt = receipt.model_copy(update={"base": base})
    seal(staged)
    run = read_run(answerer.folder.parent)
    shown = prompts or [
        Prompt(number, instruction, context)
        for number, (instruction, context) in enumerate(PROMPTS[:_SAMPLES])
    ]
    card = Card(
        hub.repo_id, receipt, run, _answers(answerer, shown), hub.license, base_model
    ).text()
    (staged / "README.md").write_text(card)
    if run.picture:
        shutil.copyfile(run.picture, staged / PICTURE)
    return card


def _base_model(base: ModelSettings, hub: HubSettings) -> str | None:
    """The hub id that the card names.

    Raises:
        UserError: the base is a folder whose path tells where this user keeps things.
    """
    if hub.base_model:
        return hub.base_model
    path = Path(base.name_or_path).expanduser()
    if path.is_absolute():
        raise UserError.single(
            "hub.base_model",
            f"the adapter names its base by a path of this machine ({base.name_or_path}), which "
            "helps nobody else and tells them where you keep it. Give the base's hub id: "
            "--base-model user/name, or hub.base_model.",
        )
    return None if path.is_dir() else base.name_or_path


def _rename_base(folder: Path, base_model: str) -> None:
    for name, key in ((ADAPTER_CONFIG, None), (RECEIPT, "base")):
        content = json.loads((folder / name).read_text())
        target = content[key] if key else content
        target["name_or_path" if key else "base_model_name_or_path"] = base_model
        target["revision"] = None
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
    answers = answerer.decoder(settings).answers(answerer.encode(prompts), batch_size=len(prompts))
    return [answer.text for (answer,) in answers]


def _upload(staged: Path, hub: HubSettings, command: str) -> Published:
    assert hub.repo_id is not None
    try:
        return upload(staged, hub.repo_id, private=hub.private, message="Upload adapter", say=say)
    except HubError as error:
        raise _unfinished(f"not published: {error}", command) from error


def _verify_published(
    published: Published, staged: Path, back: Path, model: str, command: str
) -> None:
    """Fetch the very commit into an empty folder and check it as a stranger would."""
    try:
        download(published.repo_id, back, revision=published.commit)
    except HubError as error:
        raise _unfinished(f"published, but not checked: {error}", command) from error
    for name in (ADAPTER_CONFIG, WEIGHTS, RECEIPT, "README.md"):
        if (back / name).read_bytes() != (staged / name).read_bytes():
            raise RunFailed(
                f"{name} came back from {published.repo_id} other than it was sent. Push again, "
                f"and tell the hub's operators: {command}"
            )
    verified(str(back), model=model, runs=back)


def _unfinished(what: str, command: str) -> RunFailed:
    return RunFailed(f"{what}. The adapter is as it was; to finish: {command}")


def _visible(hub: HubSettings) -> str:
    return "private" if hub.private else "public"
