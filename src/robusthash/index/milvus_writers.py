"""One writer at a time to a Milvus collection, which has no transactions."""

from __future__ import annotations

import random
import secrets
import time
from typing import Self

from robusthash.index.milvus_connection import MilvusConnection

_WAIT = 60.0  # seconds that a writer waits for another
_DEAD = 15.0  # seconds after which a writer that shows no life counts as killed
_PAUSE = 0.05


class WriterLock:
    """A lock that outlives no killed writer: an empty collection ``NAME__writer_N``, made by its holder.

    Making a collection of a given name succeeds for one client alone. A holder shows life by taking the
    number N + 1 and giving up N; a writer that has seen the same lock for 15 seconds takes N + 1 itself, and
    the old holder, were it alive, would fail to renew before it writes again. No clocks are compared.
    """

    def __init__(self, connection: MilvusConnection, collection: str, address: str) -> None:
        self._connection, self._address = connection, address
        self._prefix = f"{collection}__writer_"
        self._number, self._taken_at = 0, 0.0

    def __enter__(self) -> Self:
        end, last_holder, since = time.monotonic() + _WAIT, ("", 0), 0.0
        while True:
            before = self._numbers()
            top = max(before, default=0)
            holder = (self._holder(top), top)
            if holder != last_holder:
                last_holder, since = holder, time.monotonic()
            dead = time.monotonic() - since > _DEAD
            if (top == 0 or dead) and self._take(top + 1):
                if set(self._numbers()) <= {*before, top + 1}:
                    for number in before:
                        self._drop(number)
                    return self
                self._drop(top + 1)  # somebody else took another number at the same moment
                time.sleep(random.uniform(0, 10 * _PAUSE))
            if time.monotonic() > end:
                text = f"another process has been writing to {self._address} for {_WAIT:g} s; try again later"
                raise TimeoutError(text)
            time.sleep(random.uniform(_PAUSE / 2, _PAUSE))

    def __exit__(self, *error: object) -> None:
        self._drop(self._number)

    def renew(self) -> None:
        """Show life, before each request that writes.

        Raises:
            TimeoutError: another writer took over, because this one was silent for 15 seconds.
        """
        if time.monotonic() - self._taken_at < _DEAD / 3:
            return
        old = self._number
        if not self._take(old + 1):
            raise TimeoutError(f"writing to {self._address} took too long, and another has begun; repeat it")
        self._drop(old)

    def _numbers(self) -> list[int]:
        names = self._connection.call("list_collections")
        mine = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        return [int(number) for number in mine if number.isdigit()]

    def _holder(self, number: int) -> str:
        try:
            name = f"{self._prefix}{number}"
            return str(self._connection.call("describe_collection", name)["description"]) if number else ""
        except ValueError:  # given up meanwhile
            return ""

    def _take(self, number: int) -> bool:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, description=secrets.token_hex(8))
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("nothing", DataType.BINARY_VECTOR, dim=8)
        try:
            self._connection.call("create_collection", f"{self._prefix}{number}", schema=schema)
        except ValueError:  # it exists, with the token of another
            return False
        self._number, self._taken_at = number, time.monotonic()
        return True

    def _drop(self, number: int) -> None:
        self._connection.call("drop_collection", f"{self._prefix}{number}")
