"""Kills of a service at work: reads and writes through ``robusthash.client`` while processes die by kill -9.

Clients search, add (with idempotency keys), replace and remove; one of them, the service, or with
``--server`` the server of its index is killed at random moments and started again. Each client writes down
what it sends and what it is answered. At the end every acknowledged item must be there once and be found, and
every answer must fit what may have been stored while it was made. On this machine alone, in a temporary
folder.

``python benchmarks/service_kills.py --minutes 30 --kills 20 --server postgresql``
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from robusthash.client import Client, ServiceError

K = 10
_PAUSE = 0.05  # seconds between the requests of one client
_NAMES = 40  # keys of a client whose items are replaced again and again
CONFIG = {  # enough that different pictures have different codes: among equal ones no answer is wrong
    "name": "kills",
    "data": {"name": "photos", "size": 32, "train": 200, "query": 20, "database": 20},
    "hasher": {"bits": 64, "image": {"name": "small", "width": 16}},
    "training": {"objective": "csq", "epochs": 3, "batch_size": 32},
    "runtime": {"device": "cpu"},
}
SETTINGS = "{rate: 0, detection: false, max_wait: 60000, queue: 1000}"


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------ a client


class Journal:
    """What a client sent and was answered: a line each, in one write, so that a kill loses none."""

    def __init__(self, path: Path) -> None:
        self.lines = read(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **line: Any) -> None:
        os.write(self._file, (json.dumps({**line, "time": time.monotonic()}) + "\n").encode())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(url: str, journal: Journal, number: int, until: float) -> None:
    """Requests one after the other; what was sent and not answered is sent again first, under its key."""
    begun = [line for line in journal.lines if "do" in line]
    answered = {line["done"] for line in journal.lines if "done" in line}
    chance, place = random.Random(f"{number} {len(journal.lines)}"), len(begun)
    held: dict[str, int] = {}  # ids by name, of items that are there
    for line in journal.lines:
        if line.get("done") is not None and line["kind"] == "add":
            held |= dict(zip(line["names"], line["ids"], strict=True))
        elif line.get("done") is not None and line["kind"] == "remove":
            del held[line["names"][0]]
    with Client(url, timeout=60, attempts=1) as client:
        for line in begun:
            if line["do"] not in answered and line["kind"] in ("add", "remove"):
                perform(client, journal, line["do"], line, held)
        while time.monotonic() < until:
            line = {"kind": chance.choices(("search", "add", "remove", "item"), (50, 30, 12, 8))[0]}
            name = f"{number}/{place}"
            if line["kind"] == "search":
                new = chance.random() < 0.2
                line |= {"picture": chance.randrange(1 << 30) if new else near(chance, number, place)}
            elif line["kind"] == "add":
                named = chance.random() < 0.3
                names = [f"{number}/hot{chance.randrange(_NAMES)}"] if named else []
                names = names or [f"{name}.{at}" for at in range(chance.randint(1, 3))]
                pictures = [number * 1_000_000 + place * 4 + at for at in range(len(names))]
                line |= {"names": names, "pictures": pictures, "named": named}
            elif held:
                chosen = chance.choice(sorted(held))
                line |= {"names": [chosen], "ids": [held[chosen]]}
            else:
                continue
            journal.write(do=place, **line)
            perform(client, journal, place, line, held)
            place += 1
            time.sleep(_PAUSE)


def near(chance: random.Random, number: int, place: int) -> int:
    """A picture that this client may have added."""
    return number * 1_000_000 + chance.randrange(max(1, place)) * 4


def perform(client: Client, journal: Journal, place: int, line: dict[str, Any], held: dict[str, int]) -> None:
    """Send a request until it is answered. A read begins again each time: its answer is of the last try."""
    sent = line.get("time", time.monotonic())
    for tries in itertools.count():
        began = time.monotonic()
        try:
            answer = once(client, line, place)
            break
        except httpx.TransportError:
            time.sleep(0.2)
        except ServiceError as error:
            if error.status != 503:
                journal.write(error=str(error), kind=line["kind"])
                if tries > 100:
                    raise
            time.sleep(0.2)
    if line["kind"] == "add":
        held |= dict(zip(line["names"], answer["ids"], strict=True))
    elif line["kind"] == "remove":
        del held[line["names"][0]]
    journal.write(done=place, kind=line["kind"], names=line.get("names"), sent=sent, began=began, **answer)


def once(client: Client, line: dict[str, Any], place: int) -> dict[str, Any]:
    if line["kind"] == "search":
        hits = client.search(picture(line["picture"]), k=K)
        rows = [(hit.id, hit.distance, hit.payload["name"], hit.payload["picture"]) for hit in hits]
        return {"picture": line["picture"], "hits": rows}
    if line["kind"] == "item":
        return {"payload": client.item(line["ids"][0]), "ids": line["ids"]}
    if line["kind"] == "remove":
        client.remove(ids=line["ids"])
        return {}
    about = [{"name": n, "picture": p} for n, p in zip(line["names"], line["pictures"], strict=True)]
    files = [picture(one) for one in line["pictures"]]
    key = f"{line['names'][0]} {line['pictures'][0]}"
    keys = line["names"] if line["named"] else None
    return {"ids": client.add(files, keys=keys, payload=about, idempotency_key=key)}


# ------------------------------------------------------------------------------------------ the checks


@dataclass
class States:
    """What each item was over time, of all clients: arrays of the same length, a place for each add."""

    name: list[str] = field(default_factory=list)
    picture: list[int] = field(default_factory=list)
    id: list[int] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)
    ending: list[float] = field(default_factory=list)  # a replacement or removal was sent
    ended: list[float] = field(default_factory=list)  # and acknowledged

    @classmethod
    def of(cls, lines: list[dict[str, Any]]) -> States:
        states, last = cls(), dict[str, int]()
        sent = {line["do"]: line for line in lines if "do" in line}
        for done in (line for line in lines if "done" in line and line["kind"] in ("add", "remove")):
            asked = sent[done["done"]]
            for at, name in enumerate(asked["names"]):
                if name in last:
                    states.ending[last[name]], states.ended[last[name]] = asked["time"], done["time"]
                    del last[name]
                if done["kind"] == "add":
                    last[name] = len(states.name)
                    rows = (name, asked["pictures"][at], done["ids"][at], asked["time"], done["time"])
                    for values, value in zip(vars(states).values(), (*rows, np.inf, np.inf), strict=True):
                        values.append(value)
        return states


class Checker:
    """Answers against what may have been stored: each wrong one is a sentence in ``wrong``."""

    def __init__(self, states: States, codes: dict[int, np.ndarray]) -> None:
        self.states, self.codes = states, codes
        self.packed = np.stack([codes[one] for one in states.picture])
        moments = ("begun", "acknowledged", "ending", "ended")
        self.times = {name: np.array(getattr(states, name)) for name in moments}
        self.ids = np.array(states.id)
        self.places: dict[str, list[int]] = {}
        for place, name in enumerate(states.name):
            self.places.setdefault(name, []).append(place)
        self.wrong: list[str] = []
        self.mixed = 0  # hits whose payload and distance are of different states of one item

    def doubled(self) -> None:
        ids = {name: {self.states.id[at] for at in places} for name, places in self.places.items()}
        seen = Counter(one for some in ids.values() for one in some)
        self.wrong += [f"two items have the id {one}" for one, times in seen.items() if times > 1]
        hot = [name for name, some in ids.items() if len(some) > 1]
        removed = {self.states.name[at] for at in np.flatnonzero(np.isfinite(self.times["ended"]))}
        self.wrong += [f"{name} has several ids" for name in hot if name not in removed]

    def possible(self, began: float, ended: float) -> np.ndarray:
        return (self.times["begun"] <= ended) & (self.times["ended"] >= began)

    def certain(self, began: float, ended: float) -> np.ndarray:
        return (self.times["acknowledged"] <= began) & (self.times["ending"] > ended)

    def search(self, line: dict[str, Any]) -> None:
        began, ended, hits = line["began"], line["time"], line["hits"]
        apart = np.bitwise_count(self.packed ^ self.codes[line["picture"]]).sum(1)
        possible, certain = self.possible(began, ended), self.certain(began, ended)
        found = [(distance, one) for one, distance, *_ in hits]
        if found != sorted(found) or len({one for _, one in found}) < len(found):
            self.wrong.append(f"a search is out of order or names an item twice: {hits}")
        for one, distance, name, shown in hits:
            places = [at for at in self.places.get(name, ()) if possible[at] and self.ids[at] == one]
            as_shown = [at for at in places if self.states.picture[at] == shown]
            if not as_shown or not any(apart[at] == distance for at in places):
                self.wrong.append(f"{name} (id {one}) was found at {distance}, which it cannot be")
            else:
                self.mixed += not any(apart[at] == distance for at in as_shown)
        last = found[-1] if len(found) == K else (np.inf, np.inf)
        before = (apart < last[0]) | ((apart == last[0]) & (self.ids < last[1]))
        missing = set(self.ids[certain & before].tolist()) - {one for _, one in found}
        self.wrong += [
            f"a search did not find the item {one}, which is nearer than the last" for one in missing
        ]

    def item(self, line: dict[str, Any]) -> None:
        name, shown, possible = line["names"][0], line["payload"], self.possible(line["began"], line["time"])
        states = [self.states.picture[at] for at in self.places[name] if possible[at]]
        if shown["name"] != name or shown["picture"] not in states:
            self.wrong.append(f"the item {name} was read as {shown}")

    def held(self, url: str) -> int:
        """Each item that is there at the end, by its id and by a search for it."""
        last = np.flatnonzero(~np.isfinite(self.times["ended"]))
        with Client(url, timeout=60) as client:
            if (count := client.info()["items"]) != len(last):
                self.wrong.append(f"{count} items at the end, and {len(last)} are acknowledged")
            for at in last:
                about = {"name": self.states.name[at], "picture": self.states.picture[at]}
                hits = client.search(picture(about["picture"]), k=100)  # a filter by name would take longer
                if len(hits) == 100 and hits[-1].distance == 0:  # more share the code than are listed
                    hits = client.search(picture(about["picture"]), where={"name": about["name"]})
                same = [hit for hit in hits if hit.payload["name"] == about["name"]]
                found = [(hit.id, hit.distance, dict(hit.payload)) for hit in same]
                if found != [(self.states.id[at], 0, about)]:
                    self.wrong.append(f"{about} is lost or doubled: {found}")
        return len(last)


# ------------------------------------------------------------------------------------------ processes


class Service:
    """The service as a process, started again where it was killed."""

    def __init__(self, home: Path, address: str, run: Path) -> None:
        (home / "settings.yaml").write_text(SETTINGS)
        port = str(20_000 + os.getpid() % 10_000)  # none that a connection of others may be given meanwhile
        options = ["--run", str(run), "--port", port, "--settings", str(home / "settings.yaml")]
        self.command = [sys.executable, "-m", "robusthash", "serve", address, *options]
        self.url, self.log = f"http://127.0.0.1:{port}", (home / "service.log").open("ab")

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=self.log)
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        said = Path(self.log.name).read_text()[-1000:]
        raise RuntimeError(f"the service did not start ({self.process.poll()}): {said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_client(home: Path, url: str, number: int, until: float) -> subprocess.Popen[bytes]:
    journal = str(home / f"{number}.jsonl")
    return subprocess.Popen([sys.executable, __file__, "--client", url, journal, str(number), str(until)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--server", choices=("postgresql", "milvus"), help="of the index; without, a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        url, path, number, until = given.client
        work(url, Journal(Path(path)), int(number), float(until))
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        facts, wrong = trouble(Path(folder), stack, given)
    print(json.dumps(facts))
    for line in wrong[:20]:
        print(line)
    sys.exit(1 if wrong else 0)


def trouble(home: Path, stack: ExitStack, given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The clients at work and the kills; figures, and what was wrong."""
    from robusthash.apps.experiment.config import make_config
    from robusthash.apps.experiment.training_stages import train
    from robusthash.index import open_index

    run, database, address = train(make_config(CONFIG), home / "runs").path, None, f"file:{home}/index"
    if given.server:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from index_servers import running

        database = stack.enter_context(running(given.server))
        address = database.url("kills")
    open_index(address, CONFIG["hasher"]["bits"]).close()
    service = Service(home, address, run)
    service.start()
    stack.callback(service.kill)
    until = time.monotonic() + given.minutes * 60
    clients = [start_client(home, service.url, number, until) for number in range(given.clients)]
    stack.callback(lambda: [one.kill() for one in clients])
    chance, kills = random.Random(given.seed), Counter[str]()
    kinds = ["client", "service", "index server"][: 2 + (database is not None)]
    slot = given.minutes * 60 / (given.kills + 1)
    for kill in range(given.kills):
        moment = until - given.minutes * 60 + slot * (kill + chance.uniform(0.4, 1.0))
        time.sleep(max(0.0, moment - time.monotonic()))
        kind = kinds[kill % len(kinds)]
        kills[kind] += 1
        if kind == "client":
            number = chance.randrange(given.clients)
            clients[number].kill()
            clients[number].wait()
            clients[number] = start_client(home, service.url, number, until)
        elif kind == "service":
            service.kill()
            service.start()
        elif database is not None:
            database.kill()
            time.sleep(chance.uniform(0, 3))
            database.start()
    codes = [one.wait(given.minutes * 60 + 300) for one in clients]
    assert not any(codes), codes
    return judged(home, run, service.url, given, dict(kills))


def judged(
    home: Path, run: Path, url: str, given: argparse.Namespace, kills: dict[str, int]
) -> tuple[dict[str, Any], list[str]]:
    """Figures of what the clients wrote down, and what was wrong."""
    journals = [read(home / f"{number}.jsonl") for number in range(given.clients)]
    parts = [States.of(lines) for lines in journals]
    states = States(*([one for part in parts for one in getattr(part, name)] for name in vars(parts[0])))
    done = [line for lines in journals for line in lines if "done" in line]
    errors = [line["error"] for lines in journals for line in lines if "error" in line]
    asked = {line["picture"] for line in done if line["kind"] == "search"} | set(states.picture)
    checker = Checker(states, codes_of(run, sorted(asked)))
    kinds = len(np.unique(checker.packed, axis=0))
    checker.doubled()
    for line in done:
        if line["kind"] in ("search", "item"):
            getattr(checker, line["kind"])(line)
    held = checker.held(url)
    facts = {
        "minutes": given.minutes,
        "kills": kills,
        "clients": given.clients,
        "index": given.server or "file",
    }
    facts |= dict(Counter(line["kind"] for line in done)) | {
        "added": len(states.name),
        "held": held,
        "codes": kinds,
    }
    waited = max(line["time"] - line["sent"] for line in done)
    facts |= {"longest wait": round(waited, 1), "mixed": checker.mixed}
    facts |= {"errors": len(errors), "wrong": len(checker.wrong)}
    return facts, [*checker.wrong, *errors]


def codes_of(run: Path, pictures: list[int]) -> dict[int, np.ndarray]:
    """Packed codes of pictures, by the run's hasher itself."""
    import robusthash as rh

    model = rh.load(run)
    rows: dict[int, np.ndarray] = {}
    for start in range(0, len(pictures), 500):
        some = pictures[start : start + 500]
        images = [Image.open(io.BytesIO(picture(one))).convert("RGB") for one in some]
        rows |= dict(zip(some, model.encode(images).packed.numpy(), strict=True))
    return rows


if __name__ == "__main__":
    main()
