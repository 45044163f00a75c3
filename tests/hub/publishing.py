"""A tiny base on the hub, and the recipe's commands as a user of it types them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hub.client import Answer, Client
from tests.hub.server import ALICE, Hub

BASE = "alice/tiny-llama"
TUNED = "alice/tuned"


@dataclass
class User:
    """Somebody at a terminal in an own folder, with a token."""

    hub: Hub
    client: Client
    folder: Path
    write_config: Callable[..., Path]

    def upload_base(self, checkpoint: Path, *, licence: str = "apache-2.0") -> None:
        """Put a checkpoint on the hub as others find it there: with a card, for everybody."""
        files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
        files["README.md"] = f"---\nlicense: {licence}\n---\n# Tiny\n".encode()
        self.hub.create(BASE, files)

    def train(
        self, *overrides: str, token: str | None = ALICE, hub: dict[str, object] | None = None
    ) -> Answer:
        """``train.py`` on the hub's base, into a fresh folder of ``runs``."""
        sections = {"model": {"name_or_path": BASE}, **({"hub": hub} if hub else {})}
        config = self.write_config(**sections)
        text = "\n".join(x for x in config.read_text().splitlines() if "output_dir" not in x)
        config.write_text(text)
        return self.command("train", "--config", str(config), *overrides, token=token)

    def adapter(self, *arguments: str, token: str | None = ALICE) -> Answer:
        return self.command("adapter", *arguments, token=token)

    def command(self, name: str, *arguments: str, token: str | None = ALICE) -> Answer:
        answer = self.client.call(f"recipe.{name}", arguments, token=token, cwd=self.folder)
        assert "Traceback" not in answer.err, answer.err
        # The signature of an upload's address is as good as a token.
        for secret in (*self.hub.tokens, "Signature"):
            assert secret not in answer.out + answer.err
        return answer

    @property
    def run(self) -> Path:
        """The newest run's folder."""
        return sorted((self.folder / "runs").iterdir())[-1]

    @property
    def written(self) -> list[Path]:
        return [file for file in self.folder.rglob("*") if file.is_file()]


def files_of(hub: Hub, identity: str) -> Sequence[str]:
    return sorted(hub.repositories.get(identity).files("main"))
