"""Addresses of indexes, and ``open_index``, which opens any of them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from robusthash.index.code_index import CodeIndex
from robusthash.index.file_index import FileIndex

_SCHEMES = "file, milvus, postgresql"
_FORMS = "file:DIR, milvus://HOST:PORT/COLLECTION or postgresql://USER@HOST/DATABASE?collection=NAME"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_SERVERS = ("milvus:", "postgresql:", "postgres:")


class ServerRefused(ValueError):
    """The index on a server is not as it should be, which is no fault of what was asked of it."""


@dataclass(frozen=True)
class ServerAddress:
    """The address of an index on a server."""

    scheme: str
    user: str
    password: str = field(repr=False)
    hosts: str  # with the port; of PostgreSQL several are possible, and none means its socket
    path: str
    options: dict[str, str] = field(repr=False)  # after the question mark, without ``collection``
    collection: str

    def __str__(self) -> str:
        """The address without password and options."""
        user = f"{self.user}@" if self.user else ""
        name = f"?collection={self.collection}" if self.scheme == "postgresql" else ""
        return f"{self.scheme}://{user}{self.hosts}{self.path}{name}"

    def without_secrets(self, text: object) -> str:
        """One line of a text, with no secret of the address in it."""
        line = " ".join(str(text).split())
        for secret in (self.password, self.options.get("password", "")):
            line = line.replace(secret, "***") if secret else line
        return line

    @classmethod
    def read(cls, url: str) -> ServerAddress:
        """From ``scheme://user:password@host:port/path?option=value``.

        Raises:
            ValueError: another form, or a collection's name that not every engine takes. No message has a
                part in which a password could be.
        """
        scheme, _, rest = url.partition(":")
        scheme = "postgresql" if scheme == "postgres" else scheme
        rest, _, query = rest.partition("?")
        if not rest.startswith("//"):
            raise ValueError(f"an index on a server is {_FORMS.partition(', ')[2]}: no // after {scheme}:")
        place, slash, path = rest[2:].partition("/")
        if "@" in path + query:  # perhaps the rest of a password, of which no message may show the begin
            raise ValueError("write @, / and ? in a user, password or option as %40, %2F and %3F")
        login, _, hosts = place.rpartition("@")
        user, _, password = login.partition(":")
        options = dict(parse_qsl(query.replace("+", "%2B")))  # libpq takes + as it is
        collection = options.pop("collection", "")
        if scheme == "milvus" and not collection:
            collection = path
        name = collection or "robusthash"
        if not _NAME.fullmatch(name):
            raise ValueError(f"a collection is named by up to 40 letters, digits and _, got {name!r:.60}")
        return cls(scheme, unquote(user), unquote(password), hosts, slash + path, options, name)

    def libpq(self) -> str:
        """The address as PostgreSQL's own library reads it."""
        login = quote(self.user, "") + (f":{quote(self.password, '')}" if self.password else "")
        query = f"?{urlencode(self.options, quote_via=quote)}" if self.options else ""
        return f"postgresql://{login}{'@' if login else ''}{self.hosts}{self.path}{query}"


def address_of(index: str | os.PathLike[str]) -> str:
    """The address that a command line means: an address, or the directory of an index."""
    text = os.fspath(index)
    return text if text.startswith(("file:", *_SERVERS)) or "://" in text else f"file:{text}"


def address_without_password(index: str | os.PathLike[str]) -> str:
    """An address or a directory for people, without a password."""
    text = os.fspath(index)
    return str(ServerAddress.read(text)) if text.startswith(_SERVERS) else text


def directory_of(address: str) -> Path | None:
    """The directory that a ``file:`` address names; None of an index on a server.

    Raises:
        ValueError: an address of another kind.
    """
    scheme, _, rest = address.partition(":")
    if address.startswith(_SERVERS):
        return None
    if scheme != "file" or not rest:
        raise ValueError(f"an index address is {_FORMS}, got {scheme!r}; supported schemes: {_SCHEMES}")
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise ValueError(f"{address!r} names a host; write file:DIR or file:///DIR, on this machine")
        rest = rest[2:]
    return Path(rest).expanduser()


def open_index(
    url: str, bits: int | None = None, engine: str | None = None, create: bool = True
) -> CodeIndex:
    """Open the index at an address, or make it.

    Args:
        url: ``file:DIR``, a directory of this machine; ``milvus://HOST:PORT/COLLECTION``;
            ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE?collection=NAME``.
        bits: code length; needed for a new index, checked against an old one.
        engine: None is the exact one of the address. ``file:`` has ``faiss``, ``numpy`` (exact, the oracle)
            and ``faiss-ivf`` (approximate) over one store. Milvus has ``bin-flat`` (exact) and
            ``bin-ivf-flat`` (approximate), fixed when the collection is made. PostgreSQL has ``scan`` (exact)
            and ``hnsw`` (approximate) over one table. The measured recall of an approximate engine is in
            ``info()["approximation"]``.
        create: make the index where there is none.

    Raises:
        FileNotFoundError: there is no index and ``create`` is False.
        ValueError: an unknown scheme or engine, codes of another length, or a store that is damaged or of
            another format.
        ServerRefused: (a ValueError) the tables or the collection on the server are not those of an index.
        ConnectionError: the server does not answer.
        PermissionError: the server refuses the user.
        ImportError: the client of the server is not installed.
    """
    directory = directory_of(url)
    if directory is not None:
        return FileIndex(directory, bits, engine or "faiss", create)
    if url.startswith("milvus:"):
        from robusthash.index.milvus_index import MilvusIndex

        return MilvusIndex(url, bits, engine, create)
    address = ServerAddress.read(url)  # before the client of the server, which may not be installed
    from robusthash.index.postgres_index import PostgresIndex

    return PostgresIndex(address, bits, engine, create)
