"""``recipe.json``: what an adapter was made from, and what proves it."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from recipe.settings import ModelSettings, UserError
from recipe.sharing.probes import Probe

RECEIPT = "recipe.json"
ADAPTER_CONFIG = "adapter_config.json"
# What says where something lies or which version wrote it, and nothing of what is computed.
_NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
)


class Proof(BaseModel):
    """What a copy of the adapter, on a machine that has the base, can be checked against.

    ``lora`` are the fields of adapter_config.json as they were trained; ``base_sha256``, ``config``
    and ``weights_sha256``, which is of the adapter's tensors, are ``recipe.model.fingerprint``'s,
    the other hashes ``recipe.data.fingerprint``'s.
    """

    model_config = ConfigDict(frozen=True)

    base_sha256: str
    config: dict[str, Any]
    tokenizer_sha256: str
    template_sha256: str
    weights_sha256: str
    lora: dict[str, Any]
    probes: list[Probe]

    @model_validator(mode="after")
    def _has_probes(self) -> "Proof":
        whole = all(
            0 < len(p.token_ids) == len(p.base) == len(p.tuned) and p.input_ids for p in self.probes
        )
        if not self.probes or not whole:
            raise ValueError("no whole probes")
        return self


class Receipt(BaseModel):
    """``proof`` is None where plain peft, or an early version of this recipe, saved the adapter."""

    model_config = ConfigDict(frozen=True)

    base: ModelSettings
    template: Literal["alpaca", "chat", "raw"]
    recipe: str = ""
    trainable_parameters: int | None = None
    data_sha256: str | None = None
    manifest_sha256: str | None = None
    combined: list[dict[str, Any]] | None = None
    versions: dict[str, str] = {}
    proof: Proof | None = None


def lora_fields(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json that decide what is computed; lists in order."""
    fields = json.loads((folder / ADAPTER_CONFIG).read_text())
    return {
        key: sorted(value) if _is_names(value) else value
        for key, value in fields.items()
        if key not in _NOT_COMPARED
    }


def read_receipt(folder: Path) -> Receipt:
    """``recipe.json`` of a folder, whole or not; ``Verification.files`` says which.

    Raises:
        UserError: it is not what this recipe writes.
    """
    try:
        return Receipt.model_validate_json((folder / RECEIPT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError.single(
            "adapter",
            f"{folder / RECEIPT} does not say which base and template the adapter belongs to, or "
            f"not as this recipe writes it ({_first_line(error)}). Use another copy.",
        ) from error


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic: "1 validation error for Receipt", the key, what is wrong with it.
    return ": ".join(lines[1:3])[:160] if len(lines) > 2 else type(error).__name__
