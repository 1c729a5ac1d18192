"""Bearer tokens with scopes: made once, shown once, stored as digests."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusthash.core.atomic_files import json_text, write_aside
from robusthash.core.limited_files import read_json

SCOPES = ("read", "write", "audit")
"""``audit`` reads nothing by itself: queries with it pass neither query detection nor code agreement."""
_PREFIX = "rh_"


@dataclass(frozen=True)
class Token:
    """A token that the service accepts: its name, its scopes, and the SHA-256 of its text."""

    name: str
    scopes: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a JSON file. A token has 256 random bits, so a plain digest hides it."""

    path: Path

    def tokens(self) -> list[Token]:
        """The tokens of the file; none where it is missing.

        Raises:
            ValueError: the file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            content = read_json(self.path)
            return [_token(one) for one in content["tokens"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is no token file ({error}); make one with 'robusthash token new'"
            ) from None

    def add(self, name: str, scopes: Sequence[str]) -> str:
        """Store a new token and return its text, which is nowhere else.

        Raises:
            ValueError: a name that is taken or empty, or an unknown scope.
        """
        held = self.tokens()
        if not name or any(token.name == name for token in held):
            raise ValueError(f"a token needs a name of its own, got {name!r}")
        if not scopes or (unknown := set(scopes) - set(SCOPES)):
            raise ValueError(
                f"scopes are {', '.join(SCOPES)}, got {', '.join(sorted(unknown)) if scopes else 'none'}"
            )
        text = _PREFIX + secrets.token_urlsafe(32)
        self._write([*held, Token(name, tuple(dict.fromkeys(scopes)), _digest(text))])
        return text

    def remove(self, name: str) -> None:
        """Forget a token.

        Raises:
            ValueError: there is none of this name.
        """
        held = self.tokens()
        if all(token.name != name for token in held):
            raise ValueError(
                f"{self.path} has no token {name!r}; it has {', '.join(t.name for t in held) or 'none'}"
            )
        self._write([token for token in held if token.name != name])

    def _write(self, tokens: Sequence[Token]) -> None:
        content = {"tokens": [{**vars(token), "scopes": [*token.scopes]} for token in tokens]}
        with write_aside(self.path) as aside:
            aside.touch(0o600)
            aside.write_text(json_text(content))


class AcceptedTokens(Sequence[Token]):
    """The tokens that a service accepts; true where tokens are needed, also when none is left.

    Args:
        tokens: without any, and without a file, everybody is let in.
        file: from which they are read again.
    """

    def __init__(self, tokens: Sequence[Token] = (), file: TokenFile | None = None) -> None:
        self._tokens, self._file = tuple(tokens), file
        self._needed = file is not None or bool(tokens)

    def reload(self) -> None:
        """Take the tokens that the file holds now.

        Raises:
            FileNotFoundError, ValueError: the file is gone or damaged; the tokens in use stay.
        """
        if self._file is not None:
            if not self._file.path.exists():
                raise FileNotFoundError(f"{self._file.path} is gone; the tokens in use stay")
            self._tokens = tuple(self._file.tokens())

    def __bool__(self) -> bool:
        return self._needed

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, place: Any) -> Any:
        return self._tokens[place]


def token_of(text: str, tokens: Sequence[Token]) -> Token | None:
    """The token with this text, in a time that does not depend on the tokens."""
    digest = _digest(text)
    matches = [token for token in tokens if hmac.compare_digest(token.sha256, digest)]
    return matches[0] if matches else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _token(one: dict[str, Any]) -> Token:
    token = Token(str(one["name"]), tuple(one["scopes"]), str(one["sha256"]))
    if len(token.sha256) != 64 or set(token.scopes) - set(SCOPES):
        raise ValueError(f"token {token.name!r} has no digest or an unknown scope")
    return token
