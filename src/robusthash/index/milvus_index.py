"""The index in Milvus: one collection, whose codes are a binary vector under the Hamming distance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np

from robusthash.index.checked_input import NewItems, Which, check_origin, checked_keys, planned
from robusthash.index.index_address import ServerAddress
from robusthash.index.milvus_connection import MilvusConnection, Scan, WriterLock, condition, in_list
from robusthash.index.payload_filter import digest, terms
from robusthash.index.server_index import FORMAT, Allowed, ServerIndex

_TEXT = 65_535  # bytes of a text, of Milvus
_TERMS = 4_096  # members of an array, of Milvus
_ROWS, _BYTES = 5_000, 4 << 20  # of one write: more are several
_LAST_ID = 2**63 - 2  # the one after it no filter of Milvus finds
_LOADING = 60.0  # seconds
_PAGE = 1_000  # rows that are read together: with a text of 65,535 bytes each below Milvus's 100 MiB
_LISTS, _PROBES = 128, 16  # of bin-ivf-flat, in each segment
_SAVES_AT_ONCE = (2, 3, 6)  # until then Milvus wrote to disk the properties as they were before a change
_MARK = "robusthash."  # before the names of our settings


@final
class MilvusIndex(ServerIndex):
    """An index in a Milvus collection, on a server of version 2.3 or later.

    ``bin-flat`` is exact: where Milvus cuts at rank k among equal distances, the tied items are searched
    again by radius and id until those of the smallest ids are known. ``bin-ivf-flat`` is approximate; a
    filter and ``range`` look into all of its lists and are exact.

    Reads are strongly consistent: they see every acknowledged write of anybody, and wait for the server's
    next time tick (``proxy.timeTickInterval``, 200 ms by default). Writers wait for each other by a lock in
    the server. Milvus has no transactions: a write of up to 5,000 items is one request, a larger one several,
    which readers may see in part; one that fails in the middle may be there in part, and is repaired by
    repeating it by key. An acknowledged write survives a kill of the client and of the server: Milvus reads
    its log again. Before 2.3.6 a restarted Milvus had lost the last change of a collection's properties
    (milvus-io/milvus#30144), here the next id, so that new items took the ids of acknowledged ones; with
    those servers the properties are written twice, which keeps the first.
    """

    ENGINES = ("bin-flat", "bin-ivf-flat")

    def __init__(self, url: str, bits: int | None, engine: str | None, create: bool) -> None:
        address = _address(url)
        self._server_link = MilvusConnection(address)
        super().__init__(address, bits, engine, create)

    def _open(self, bits: int | None, engine: str | None, create: bool) -> str:
        call, name = self._server_link.call, self._server.collection
        self._saves = 2 if self._server_link.version() < _SAVES_AT_ONCE else 1
        if not call("has_collection", name):
            self._make(self._refuse_missing(bits, create), engine or self.ENGINES[0])
        stored_engine = str(self._settings()["engine"])
        if engine not in (None, stored_engine):
            raise ValueError(
                f"{self.address} was made with the engine {stored_engine!r}, asked for {engine!r}; "
                "leave the engine out, or build another collection"
            )
        if "code" not in call("list_indexes", name):  # its maker was killed in the middle
            self._make_search(stored_engine)
        call("load_collection", name, timeout=_LOADING)  # that of the address is for answers
        return stored_engine

    def _make(self, bits: int, engine: str) -> None:
        from pymilvus import DataType, MilvusClient

        fixed = {"format": FORMAT, "bits": bits, "engine": engine}
        schema = MilvusClient.create_schema(auto_id=False, description=_MARK + json.dumps(fixed))
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("code", DataType.BINARY_VECTOR, dim=(bits + 7) // 8 * 8)
        for text, size in {"key": _TEXT, "key_digest": 32, "stamp": _TEXT, "payload": _TEXT}.items():
            schema.add_field(text, DataType.VARCHAR, max_length=size)
        array = {"element_type": DataType.VARCHAR, "max_length": 32, "max_capacity": _TERMS}
        schema.add_field("terms", DataType.ARRAY, **array)
        name = self._server.collection
        try:
            self._server_link.call("create_collection", name, schema=schema, consistency_level="Strong")
        except ValueError:
            if not self._server_link.call("has_collection", name):  # another made it at the same time
                raise
        self._make_search(engine)

    def _make_search(self, engine: str) -> None:
        from pymilvus import MilvusClient

        params = MilvusClient.prepare_index_params()
        kind = engine.upper().replace("-", "_")
        lists = {"params": {"nlist": _LISTS}} if engine != self.ENGINES[0] else {}
        params.add_index("code", index_type=kind, metric_type="HAMMING", index_name="code", **lists)
        self._server_link.call("create_index", self._server.collection, index_params=params)

    def count(self) -> int:
        with self._lock:
            return self._count("")

    def _count(self, where: str) -> int:
        rows = self._query(where, ["count(*)"])
        return int(rows[0]["count(*)"])

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        with self._lock:
            self._check_open()
            return {row["key"]: (row["id"], row["stamp"]) for row in self._keyed(checked_keys(keys))}

    def keys_of(self, ids: Sequence[int]) -> dict[int, str]:
        with self._lock:
            self._check_open()
            rows = self._by_ids(np.array(ids, dtype=np.int64), ["id", "key", "key_digest"])
            return {row["id"]: row["key"] for row in rows if row["key_digest"]}

    def keys(self, prefix: str = "") -> list[str]:
        with self._lock:
            rows = self._pages('key_digest != ""', ["key"])
            return sorted(row["key"] for row in rows if row["key"].startswith(prefix))

    def snapshot(self, directory: str | Path) -> NoReturn:
        self._no_snapshot("milvus-backup, or a copy of its storage while it is stopped")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._server_link.close()

    def _settings(self) -> dict[str, Any]:
        self._check_open()
        facts = self._server_link.call("describe_collection", self._server.collection)
        if not facts["description"].startswith(_MARK):
            raise ValueError(f"the collection at {self.address} is not that of an index; name another")
        fixed = json.loads(facts["description"].removeprefix(_MARK))
        if fixed["format"] != FORMAT:
            raise ValueError(f"{self.address} has format {fixed['format']}; update robusthash")
        own = {key: value for key, value in facts["properties"].items() if key.startswith(_MARK)}
        changing = {key.removeprefix(_MARK): json.loads(value) for key, value in own.items()}
        return {"origin": "", "next_id": 0, **fixed, **changing}

    def _set(self, settings: Mapping[str, Any]) -> None:
        marked = {f"{_MARK}{key}": json.dumps(value) for key, value in settings.items()}
        for _ in range(self._saves):
            self._server_link.call("alter_collection_properties", self._server.collection, properties=marked)

    def _any_items(self) -> bool:
        return bool(self._query("id >= 0", ["id"], limit=1))

    def _keyed(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of the keys that are held."""
        lists = in_list("key_digest", [digest(key) for key in keys], _PAGE // 2)
        return [row for part in lists for row in self._query(part, ["id", "key", "stamp"])]

    def _by_ids(self, ids: np.ndarray, fields: list[str]) -> list[dict[str, Any]]:
        """The rows of the ids that are held."""
        low = np.unique(ids[ids >= 0]).tolist()
        return [row for part in in_list("id", low, _PAGE) for row in self._query(part, fields)]

    def _write(self, new: NewItems, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
        _check_sizes(new)
        with self._writing() as lock:
            settings, before = self._settings(), dict[int, dict[str, Any]]()
            known: Any = {row["key"]: row["id"] for row in self._keyed(new.keys or ())}
            if new.ids is not None:
                low = new.ids[new.ids < settings["next_id"]]  # none of the others was ever held
                before = {row["id"]: row for row in self._by_ids(low, ["id", "key", "key_digest", "stamp"])}
                known = np.array(list(before), dtype=np.int64)
            plan = planned(new, on_duplicate, known, settings["next_id"])
            if plan.ids.max() > _LAST_ID:
                raise ValueError(f"Milvus finds ids up to {_LAST_ID} (below 2**63 - 1), got {plan.ids.max()}")
            origin = settings["origin"]
            if origin and origin != new.origin and not self._any_items():
                origin = ""
            check_origin(new.origin, origin)
            self._set({"origin": new.origin or origin, "next_id": plan.following})
            for rows in _pieces(_rows(new, plan.ids, plan.rows, before)):
                lock.renew()
                self._server_link.call("upsert", self._server.collection, rows)
        return plan.ids, plan.held

    def _delete(self, which: Which) -> int:
        with self._writing() as lock:
            if isinstance(which, Mapping):
                rows: Any = self._pages(condition(Allowed.of(which)), ["id"])
            elif isinstance(which, np.ndarray):
                rows = self._by_ids(which, ["id"])
            else:
                rows = self._keyed(which)
            ids = sorted({row["id"] for row in rows})
            for part in in_list("id", ids):
                lock.renew()
                self._server_link.call("delete", self._server.collection, filter=part)
            if not ids and isinstance(which, Mapping):
                self._check_known(which)
        return len(ids)

    def _writing(self) -> WriterLock:
        self._check_open()
        return WriterLock(self._server_link, self._server.collection, self.address)

    def _view(self, where: np.ndarray | Mapping[str, Any] | None) -> Scan:
        self._check_open()
        selection = Allowed.of(where)
        exact = self.exact or where is not None
        unknown = (lambda: self._check_known(where)) if isinstance(where, Mapping) else None
        return self._scan(selection, exact, unknown)

    def _exact_view(self) -> Scan:
        return self._scan(Allowed(), True, None)

    def _scan(self, selection: Allowed, exact: bool, nothing: Any) -> Scan:
        probes = None if self.exact else (_LISTS if exact else _PROBES)
        return Scan(self._server_link, self._server.collection, selection, exact, probes, self._lock, nothing)

    def _parameters(self) -> dict[str, Any]:
        return {"lists": _LISTS, "probes": _PROBES}

    def _payloads(self, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        self._check_open()
        return {row["id"]: json.loads(row["payload"]) for row in self._by_ids(ids, ["id", "payload"])}

    def _payload_texts(self, selection: Allowed) -> Iterator[str]:
        return (row["payload"] for row in self._pages(condition(selection), ["payload"]))

    def _some_codes(self, count: int) -> np.ndarray:
        rows = self._query("id >= 0", ["code"], limit=count)
        codes = [np.frombuffer(row["code"][0], dtype=np.uint8) for row in rows]
        return np.stack(codes) if codes else np.zeros((0, (self._bits + 7) // 8), dtype=np.uint8)

    def _query(self, where: str, fields: list[str], **limit: int) -> list[dict[str, Any]]:
        self._check_open()
        strong = {"consistency_level": "Strong", **limit}
        rows = self._server_link.call(
            "query", self._server.collection, filter=where, output_fields=fields, **strong
        )
        return list(rows)

    def _pages(self, where: str, fields: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of a filter by ascending id, a page at a time: Milvus lists the smallest ids first."""
        last = -1
        while True:
            above = f"id > {last}" + (f" and ({where})" if where else "")
            rows = self._query(above, ["id", *fields], limit=_PAGE)
            yield from rows
            if len(rows) < _PAGE:
                return
            last = max(row["id"] for row in rows)


def _address(url: str) -> ServerAddress:
    """The address of a collection; a file of Milvus Lite is refused.

    Raises:
        ValueError: a file, or no host or collection.
    """
    rest = url.partition(":")[2].partition("?")[0]
    if not rest.startswith("//") or rest.startswith("///") or rest.rstrip("/").endswith(".db"):
        raise ValueError(
            "that is a file of Milvus Lite, which takes no binary vectors; start a Milvus server "
            "and write milvus://HOST:PORT/COLLECTION, or use file:DIR"
        )
    address = ServerAddress.read(url)
    if not address.hosts or not address.path.strip("/"):
        raise ValueError(f"an index in Milvus is milvus://HOST:PORT/COLLECTION, got {address}")
    if wrong := set(address.options) - {"tls", "db", "timeout"}:
        raise ValueError(f"a Milvus address has the options tls, db, timeout, not {', '.join(sorted(wrong))}")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", timeout := address.options.get("timeout", "30")):
        raise ValueError(f"timeout is whole seconds from 1 to 9999, got {timeout!r:.60}")
    return address


def _check_sizes(new: NewItems) -> None:
    """Refuse what Milvus has no room for."""
    texts = {"key": new.keys, "stamp": new.stamps, "payload": new.payload}
    for what, column in texts.items():
        for text in column or ():
            if len(text.encode()) > _TEXT:
                raise ValueError(f"Milvus keeps a {what} of up to {_TEXT} bytes, got {text!r:.60}...")
    for payload in new.payload or ():
        if (count := len(terms(payload))) > _TERMS:
            raise ValueError(f"Milvus filters by at most {_TERMS} values an item: {count}: {payload:.60}...")


def _rows(
    new: NewItems, ids: np.ndarray, rows: np.ndarray, before: Mapping[int, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows to be written; an item replaced by id goes on under the key that it had."""
    for at in rows.tolist():
        item = int(ids[at])
        old = before.get(item, {})
        key = new.keys[at] if new.keys is not None else old.get("key", "")
        named = digest(key) if new.keys is not None else old.get("key_digest", "")
        stamp = new.stamps[at] if new.stamps is not None else old.get("stamp", "")
        payload = new.payload[at] if new.payload is not None else "{}"
        fields = {"key": key, "key_digest": named, "stamp": stamp, "payload": payload}
        yield {"id": item, "code": new.codes[at].tobytes(), **fields, "terms": terms(payload)}


def _pieces(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows in pieces that one request takes."""
    piece, size = list[dict[str, Any]](), 0
    for row in rows:
        length = len(row["key"]) + len(row["payload"]) + 40 * len(row["terms"]) + 100
        if piece and (len(piece) == _ROWS or size + length > _BYTES):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += length
    if piece:
        yield piece
