"""Who asks, and what they may do."""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Any

from tests.hub.repositories import Repository
from tests.hub.wire import Problem

_WRITERS = ("admin", "write", "contributor")
_SINCE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Token:
    """What a token stands for; ``role`` is read, write or fineGrained.

    A fine-grained token may only what ``scoped`` lists: entity type ("user", "org" or "model"), its
    name and permissions, as in ``("model", "alice/one", ("repo.write",))``.
    """

    user: str
    role: str = "write"
    scoped: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    name: str = "tests"

    def allows(self, permission: str, identity: str) -> bool:
        """Whether a fine-grained token has ``permission`` on a repository or on a namespace."""
        around = {identity, identity.split("/")[0]}
        return any(name in around and permission in held for _, name, held in self.scoped)


@dataclass
class Accounts:
    """Tokens by their secret, and organisations: the role of each member by name."""

    tokens: dict[str, Token] = field(default_factory=dict)
    orgs: dict[str, dict[str, str]] = field(default_factory=dict)

    def who(self, authorization: str | None) -> Token | None:
        """The token of an Authorization header, None for a request without one.

        Git sends what stands in the URL as basic authentication, where the password is the token.
        """
        if not authorization:
            return None
        kind, _, secret = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                secret = base64.b64decode(secret).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                secret = ""
        if secret not in self.tokens:
            raise Problem(401, "Invalid credentials in Authorization header")
        return self.tokens[secret]

    def role_in(self, user: str, namespace: str) -> str | None:
        return "admin" if user == namespace else self.orgs.get(namespace, {}).get(user)

    def reads(self, token: Token | None, repository: Repository) -> bool:
        if not repository.private:
            return True
        if token is None or self.role_in(token.user, repository.namespace) is None:
            return False
        if token.role != "fineGrained":
            return True
        wanted = ("repo.content.read", "repo.write")
        return any(token.allows(permission, repository.id) for permission in wanted)

    def writes(self, token: Token | None, identity: str) -> bool:
        """``identity`` is a repository, or a namespace in which to make one."""
        if token is None or self.role_in(token.user, identity.split("/")[0]) not in _WRITERS:
            return False
        return token.role == "write" or token.allows("repo.write", identity)

    def whoami(self, token: Token) -> dict[str, Any]:
        """The answer of /api/whoami-v2."""
        about: dict[str, Any] = {
            "displayName": token.name,
            "role": token.role,
            "createdAt": _SINCE,
        }
        if token.role == "fineGrained":
            scoped = [
                {
                    "entity": {"_id": _id(name), "type": kind, "name": name},
                    "permissions": list(held),
                }
                for kind, name, held in token.scoped
            ]
            about["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [
            _profile("org", name, None) | {"roleInOrg": members[token.user], "isEnterprise": False}
            for name, members in self.orgs.items()
            if token.user in members
        ]
        return _profile("user", token.user, f"{token.user}@localhost") | {
            "emailVerified": True,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": about},
        }


def _profile(kind: str, name: str, email: str | None) -> dict[str, Any]:
    return {
        "type": kind,
        "id": _id(name),
        "name": name,
        "fullname": name.title(),
        "email": email,
        "isPro": False,
        "canPay": False,
        "periodEnd": None,
        "avatarUrl": f"/avatars/{name}.svg",
    }


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]
