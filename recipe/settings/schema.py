"""What a run's settings are, once they are valid. Nothing here can be changed afterwards."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from recipe.settings.option import Absent, Option, Shown
from recipe.settings.row_range import row_range


def freeze(value: Any) -> Any:
    """Read-only all the way down: mappings become proxies, lists tuples."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: freeze(item) for key, item in value.items()})
    return tuple(freeze(item) for item in value) if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """The opposite of ``freeze``: dicts and lists, as the libraries and JSON want them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _checked_range(text: str) -> str:
    row_range(text)
    return text


_REPO_ID = r"(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?/[A-Za-z0-9_][\w.-]*(?<![.-])"


def is_repo_id(text: str) -> bool:
    """Whether ``text`` could be a repository of the hub, ``user/name``."""
    return bool(re.fullmatch(_REPO_ID, text))


def _matching(pattern: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"does not look like {pattern}")
        return text

    return checked


Frozen = Annotated[Mapping[str, Any], AfterValidator(freeze), PlainSerializer(plain)]
NonEmpty = Annotated[str, MinLen(1)]
RepoId = Annotated[
    str,
    AfterValidator(_matching(_REPO_ID)),
    Shown("a repository such as 'user/name'"),
]
LicenseId = Annotated[
    str,
    AfterValidator(_matching(r"[a-z0-9][a-z0-9.-]*")),
    Shown("an identifier of the hub such as 'apache-2.0'"),
]
RowRange = Annotated[
    str,
    AfterValidator(_checked_range),
    Shown("a range of rows such as '0:200', '200:' or ':200', the first below the second"),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSettings(_Section):
    """Which checkpoint is adapted, and how it is held in memory."""

    name_or_path: NonEmpty = Field(
        description="Hub id, local folder, or what recipe/convert.py made."
    )
    revision: NonEmpty | None = Field(
        default=None, description="Branch, tag or commit of a hub id; null is its main branch."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Type of the base's weights; auto is the checkpoint's own."
    )
    attn_implementation: Literal["per_row_sdpa", "sdpa", "eager"] = Field(
        default="per_row_sdpa",
        description="per_row_sdpa computes each row of a flattened batch on its own; the others "
        "compute one masked matrix over all rows.",
    )
    quantization: Frozen | None = Field(
        default=None,
        description="Fields of transformers.BitsAndBytesConfig, with load_in_4bit or "
        "load_in_8bit set; null leaves the base as it is.",
    )


class DataSettings(_Section):
    """Which rows are trained on, and how they become tokens."""

    path: NonEmpty = Field(
        description="Local .json, .jsonl, .csv or .parquet file, or the hub id of a dataset."
    )
    split: NonEmpty = Field(default="train", description="Split of a hub dataset.")
    rows: RowRange | None = Field(
        default=None, description="Rows to train on, counted from 0; null is all of them."
    )
    held_out: RowRange | None = Field(
        default=None, description="Rows to evaluate on, which must not be among data.rows."
    )
    format: Literal["alpaca", "prompt_completion", "messages", "sharegpt"] | None = Field(
        default=None, description="Meaning of the columns; null finds out from their names."
    )
    template: Literal["alpaca", "chat", "raw"] | None = Field(
        default=None,
        description="Text around prompt and answer: alpaca's, the tokenizer's own chat template, "
        "or none; null is alpaca for alpaca rows, raw for prompt_completion, chat for the others.",
    )
    share_openings: bool | None = Field(
        default=None,
        description="Compute once what rows of a micro-batch begin with in common, wherever that "
        "pays. Without dropout nothing changes; with it these rows share one mask of the opening, "
        "which is unbiased. null is true with model.attn_implementation per_row_sdpa, which it "
        "needs, and else false.",
    )
    max_length: Annotated[int, Ge(8)] | None = Field(
        default=None, description="Most tokens a row may have; null is the model's context."
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error", description="What happens to a row above data.max_length."
    )


class HubSettings(_Section):
    """Where the adapter is published when the run ends, and how; see also ``adapter.py push``."""

    push: bool = Field(
        default=False,
        description="Publish the finished adapter. Token, name and permission are checked before "
        "training; a push that fails loses nothing.",
    )
    repo_id: RepoId | None = Field(default=None, description="Repository, user/name.")
    private: bool = Field(default=True, description="Make it so that nobody else may see it.")
    license: LicenseId | None = Field(
        default=None,
        description="The hub's identifier, such as apache-2.0; checked against the base's.",
    )
    base_model: RepoId | None = Field(
        default=None,
        description="Hub id of the base, for others, where model.name_or_path is a folder.",
    )


class JudgingSettings(_Section):
    """What is found out about the adapter when training has ended; see also ``compare.py``."""

    report: bool = Field(
        default=False,
        description="Compare base and tuned model when the run ends, and write report.html and "
        "report.json into its folder.",
    )
    rows: Annotated[int, Ge(1)] = Field(
        default=100, description="Most seen and most held-out rows that are compared."
    )
    max_new_tokens: Annotated[int, Ge(1)] = Field(
        default=128, description="Longest answer that is written to a row, in tokens."
    )


class StudySettings(_Section):
    """What ``study.py`` measures; the last three keys are how an arm differs from any run."""

    arms: Mapping[NonEmpty, list[str]] | None = Field(
        default=None, description="Name of each arm, and its overrides, such as [lora.r=8]."
    )
    ladder: list[str] | None = Field(
        default=None, description="Arms that build on one another, in their order."
    )
    train: Literal["adapter", "everything"] = Field(
        default="adapter", description="everything: the base's own weights, without an adapter."
    )
    logits: Literal["chunked", "whole"] = Field(
        default="chunked", description="whole: of all kept positions at once, as stock code does."
    )
    checkpoint: Literal["feed_forward"] | None = Field(
        default=None,
        description="feed_forward: compute only the feed-forward parts again, re-entrant, as the "
        "course reports did.",
    )


class Settings(_Section):
    """One run. ``lora`` and ``training`` hold what the config says, without library defaults."""

    name: NonEmpty = Field(description="Names the run folder; the config's file name by default.")
    model: ModelSettings
    data: DataSettings
    lora: Frozen = Field(description="Fields of peft.LoraConfig.")
    training: Frozen = Field(
        default_factory=lambda: MappingProxyType({}),
        description="Fields of transformers.TrainingArguments.",
    )
    judging: JudgingSettings = Field(default_factory=JudgingSettings)
    hub: HubSettings = Field(default_factory=HubSettings)
    study: StudySettings = Field(default_factory=StudySettings)


def options_of(model: type[BaseModel]) -> dict[str, Option]:
    """A model's fields as options."""
    return {
        name: Option(
            name,
            Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation,
            Absent.REQUIRED if field.is_required() else field.default,
            field.description or "",
        )
        for name, field in model.model_fields.items()
    }
