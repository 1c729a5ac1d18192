"""A search behind HTTP, queried under a budget and a rate; its answers are checked against each other.

Each request is ``POST url`` with a PNG file as the body. The answer is JSON of one of these forms:

    {"code": "8f3c..."}  or  {"code": [0, 1, 1, ...]}      the code, in hex or as bits
    {"ids": ["a", "b", ...], "distances": [0, 3, ...]}      results, nearest first; distances may be left out

or that of ``robusthash serve``, {"results": [{"id": 3, "distance": 0}, ...], "code": "8f3c..."}, where the
code counts if it is there.
A search with a threshold may find nothing: an empty list of ids, status 204 or 404.
"""

from __future__ import annotations

import email.utils
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from robusthash.core.runtime import Progress, silent
from robusthash.data.transforms import to_pixels
from robusthash.models.external.http_exchange import Exchanger, Reply, Unanswered
from robusthash.models.external.model_answers import Broken


class AnswerCache:
    """A file of answers by image. The first line names the endpoint; a line that a kill cut off is ignored.

    Headers, which may hold secrets, are not in it.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url

    def read(self) -> dict[str, Any]:
        """Answers by image; none where the file is missing or of another endpoint."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if not entries or entries[0].get("endpoint") != self.url:
            self.delete()
            return {}
        return {entry["image"]: entry["answer"] for entry in entries[1:] if "image" in entry}

    def add(self, image: str, answer: Any) -> None:
        """Append one answer."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as stream:
            if stream.tell() == 0:
                stream.write(json.dumps({"endpoint": self.url}) + "\n")
            # a new line first: the one before may have been cut off
            stream.write("\n" + json.dumps({"image": image, "answer": answer}) + "\n")

    def delete(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


_LARGEST = 1 << 20  # bytes of an answer
_TELLING = 100  # digits of codes that tell their notation: hex ones are never so long without a to f
_LONGEST_WAIT = 60.0  # seconds; a longer Retry-After is reported instead of waited for
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that another try may change
_SHORTEST = 0.1  # seconds of an exchange that is worth a try
_IN_ALL = 30.0  # seconds that one query may take, repetitions included
_NOTHING = frozenset({204, 404})  # statuses of a search that found nothing


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer on one image: a code as it was written, or search results, none where nothing was
    near enough."""

    code: str | tuple[float, ...] | None = None
    ids: tuple[str, ...] = ()
    distances: tuple[float, ...] | None = None

    @property
    def nothing(self) -> bool:
        """The search found nothing."""
        return self.code is None and not self.ids


@dataclass
class Endpoint:
    """A client of one search. Calling it with images gives (B, K) codes, where it answers codes.

    Args:
        budget: requests in all, repeated ones included.
        rate: requests a second at most.
        timeout: seconds that one whole exchange may take. One query may take 30 seconds in all, or one
            timeout where that is longer: repetitions and pauses count, a wait by ``Retry-After`` does not.
        retries: repetitions after no whole answer (a timeout, a dropped connection, half a body) and after
            408, 425, 429 or 5xx, each after a longer pause or after ``Retry-After``. A server that cannot be
            reached before it ever answered is not queried again.
        headers: sent with each request, such as ``Authorization``; never written anywhere.
        pause: seconds before the first repetition; doubled each time.
        cache: a file of the answers, so that an interrupted audit goes on; see ``AnswerCache``.
        progress: shows the requests sent, of the budget.
    """

    url: str
    budget: int = 5000
    rate: float = 5.0
    timeout: float = 10.0
    retries: int = 4
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    pause: float = 0.5
    sleep: Callable[[float], None] = time.sleep
    cache: Path | None = None
    requests_sent: int = 0
    progress: Progress = silent
    _known: dict[str, Answer] = field(default_factory=dict, repr=False)
    _next: float = 0.0
    _in_bits: bool | None = None  # codes that are texts are 0s and 1s, rather than hex digits

    def __post_init__(self) -> None:
        for name in ("budget", "rate", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")
        try:
            import httpx  # noqa: F401 - a missing extra is reported before the first query
        except ImportError as error:
            raise ImportError(f"endpoints need: pip install 'robusthash[audit]' ({error})") from error
        self._exchanger = Exchanger(self.url, self.headers, self.timeout, _LARGEST)
        self._answer_cache = None if self.cache is None else AnswerCache(self.cache, self.url)
        if self._answer_cache is not None:
            self._known = {key: _read(body, self.url) for key, body in self._answer_cache.read().items()}

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B, 3, H, W) float in [0, 1] -> (B, K) bool."""
        answers = self.answers(images)
        codes = [answer.code for answer in answers if answer.code is not None]
        if len(codes) < len(answers):
            raise Broken(f"{self.url} answered ids, and codes before")
        if self._in_bits is None and (texts := [code for code in codes if isinstance(code, str)]):
            self._in_bits = _in_bits(texts, self.url)
        bits = [_bits(code, bool(self._in_bits), self.url) for code in codes]
        if len(lengths := {len(code) for code in bits}) != 1:
            raise Broken(f"{self.url} answered codes of different length: {sorted(lengths)}")
        return np.stack(bits)

    def answers(self, images: Tensor, again: bool = False) -> list[Answer]:
        """One answer for each image. The same pixels are sent once, unless ``again``."""
        answers = []
        for pixels in to_pixels(images):
            key = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            if again or key not in self._known:
                body = self._request(pixels)
                self._known[key] = _read(body, self.url)
                if self._answer_cache is not None:
                    self._answer_cache.add(key, body)
            answers.append(self._known[key])
        return answers

    def check_consistency(self, images: Tensor) -> Answer:
        """Send one image twice, and of the (n, 3, H, W) others as many as it takes to find something.

        Stored answers of a search that has changed since are forgotten.

        Raises:
            Broken: the two answers differ, or it finds nothing for any of the images.
        """
        before = len(self._known)
        first, second = self.answers(images[:1])[0], self.answers(images[:1], again=True)[0]
        if first != second and before:
            self.forget()
            first, second = self.answers(images[:1])[0], self.answers(images[:1], again=True)[0]
        if first != second:
            reason = "an audit needs a search that repeats itself"
            raise Broken(f"{self.url} gave two answers to the same image; {reason}")
        for row in range(1, len(images)):
            if not first.nothing:
                break
            first = self.answers(images[row : row + 1])[0]
        if first.nothing:
            raise Broken(
                f"{self.url} finds nothing for {len(images)} unchanged photographs (an empty list, 204 or "
                "404); check the address, and that the search holds these photographs"
            )
        return first

    def check_budget(self, queries: int) -> None:
        """Refuse an audit before its first request. Answers that are known already cost nothing.

        Raises:
            ValueError: the budget has too little left.
        """
        left = self.budget - self.requests_sent
        if queries - len(self._known) > left:
            raise ValueError(
                f"this audit sends {queries} queries to {self.url} and {left} of the budget are left; "
                "raise --budget, or lower --queries"
            )

    def forget(self) -> None:
        """Forget all answers, and delete their file."""
        self._known.clear()
        if self._answer_cache is not None:
            self._answer_cache.delete()

    def _request(self, pixels: np.ndarray) -> Any:
        """The JSON that the endpoint answers; an empty list of ids where it says by its status that there is
        nothing."""
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        problem, attempts = "", 0
        end = time.monotonic() + max(_IN_ALL, self.timeout)
        for attempt in range(self.retries + 1):
            if self.requests_sent >= self.budget:
                raise Broken(f"the budget of {self.budget} queries to {self.url} is spent; raise --budget")
            end += self._keep_rate()
            self.requests_sent, attempts = self.requests_sent + 1, attempts + 1
            self.progress(self.requests_sent, self.budget, "requests, of the budget")
            wait, retry_after = self.pause * 2**attempt, 0.0
            try:
                left = max(_SHORTEST, min(self.timeout, end - time.monotonic()))
                reply = self._exchanger.post(png.getvalue(), "image/png", left)
            except Unanswered as error:
                if not error.connected and not self._known:
                    raise Broken(f"{self.url} {error}") from error
                problem = str(error)
            else:
                if reply.status not in _PASSING:
                    return _content(reply, self.url)
                problem = f"answered status {reply.status}"
                retry_after = _retry_after(reply, self.url)
            if attempt == self.retries or (not retry_after and time.monotonic() + wait > end - _SHORTEST):
                break
            self.sleep(max(wait, retry_after))
            end += retry_after
        again = " (the answers so far are stored: the same command goes on)" if self._answer_cache else ""
        times = f"{attempts} time{'s' * (attempts != 1)}"
        raise Broken(f"{self.url} {problem}, {times}; lower --rate, or raise --timeout{again}")

    def _keep_rate(self) -> float:
        """Wait for the next query's turn; the seconds waited."""
        now = time.monotonic()
        wait = max(0.0, self._next - now)
        if wait:
            self.sleep(wait)
        self._next = max(now, self._next) + 1.0 / self.rate
        return wait


def _content(reply: Reply, url: str) -> Any:
    """The JSON of a reply that is final.

    Raises:
        Broken: a refusal, a redirect, or no JSON.
    """
    if reply.status in _NOTHING:
        return {"ids": []}
    if reply.status != 200:
        excerpt = reply.headers.get("location", "") or reply.body[:400].decode("utf-8", "replace")
        excerpt = "".join(each if each.isprintable() else " " for each in excerpt).strip()[:120]
        remedy = "; audit that address" if 300 <= reply.status < 400 and excerpt else ""
        raise Broken(f"{url} answered status " + f"{reply.status}: {excerpt}".rstrip(": ") + remedy)
    try:
        return json.loads(reply.body)
    except (ValueError, RecursionError) as error:
        raise Broken(f"{url} answered no JSON: {reply.body[:80]!r}") from error


def _retry_after(reply: Reply, url: str) -> float:
    """Seconds of a ``Retry-After`` header, which holds a number or a date; 0 where it holds neither."""
    text = reply.headers.get("retry-after", "")
    if text.strip().isdigit():
        seconds = float(text)
    else:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return 0.0
    if seconds > _LONGEST_WAIT:
        remedy = "run the audit then, or lower --rate"
        if reply.status == 429:
            remedy += (
                "; a 'robusthash serve' of your own, which detects near queries, lets a token with the scope "
                "audit pass: robusthash token new auditor --scopes read,audit"
            )
        raise Broken(f"{url} asks to wait {seconds:.0f} s before the next query; {remedy}")
    return seconds


def _read(body: Any, url: str) -> Answer:
    """The answer in a JSON value.

    Raises:
        Broken: none of the forms, or an order that its own distances contradict.
    """
    body = _of_service(body)
    if not isinstance(body, dict) or ("code" in body) == ("ids" in body):
        raise Broken(f'{url} must answer {{"code": ...}} or {{"ids": [...]}}, it answered {str(body)[:120]}')
    if "code" in body:
        code = body["code"]
        if isinstance(code, str) and re.fullmatch("[0-9a-fA-F]+", code):
            return Answer(code=code)
        numbers = isinstance(code, list) and bool(code) and all(map(_is_number, code))
        if numbers and (set(code) <= {0, 1} or set(code) <= {-1, 1}):
            return Answer(code=tuple(code))
        excerpt = f"{str(code)[:60]!r}"
        raise Broken(f"{url} answered the code {excerpt}; give hex digits, or a list of 0/1 or -1/+1")
    ids, distances = body["ids"], body.get("distances")
    if not isinstance(ids, list) or len(set(map(str, ids))) != len(ids):
        excerpt = str(ids)[:120]
        raise Broken(f"{url} must answer a list of different ids, nearest first, it answered {excerpt}")
    names = tuple(map(str, ids))
    if distances is None:
        return Answer(ids=names)
    if not isinstance(distances, list) or len(distances) != len(ids) or not all(map(_is_number, distances)):
        excerpt = str(distances)[:120]
        raise Broken(f"{url} answered {len(ids)} ids, and not as many numbers for distances: {excerpt}")
    for rank in range(1, len(ids)):
        if distances[rank] < distances[rank - 1]:
            raise Broken(
                f"{url} lies about its order: {ids[rank]!r} at distance {distances[rank]} stands after "
                f"{ids[rank - 1]!r} at distance {distances[rank - 1]}; sort the answer by distance"
            )
    return Answer(ids=names, distances=tuple(map(float, distances)))


def _of_service(body: Any) -> Any:
    """An answer of ``robusthash serve`` as a code or as ids; any other as it is."""
    rows = body.get("results") if isinstance(body, dict) and "ids" not in body else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        return body
    if "code" in body:
        return {"code": body["code"]}
    ids = {"ids": [row["id"] for row in rows]}
    has_distances = bool(rows) and all("distance" in row for row in rows)
    return {**ids, "distances": [row["distance"] for row in rows]} if has_distances else ids


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _in_bits(texts: Sequence[str], url: str) -> bool:
    """True where codes are written as 0s and 1s, not as hex digits; a few digits alone do not tell.

    Raises:
        Broken: decimal digits alone, which long hex codes are not by chance.
    """
    digits = set("".join(texts))
    if len("".join(texts)) < _TELLING:
        return False
    if digits <= set("01"):
        return True
    if digits <= set("0123456789"):
        raise Broken(f"{url} answered the code {texts[0][:40]!r}, a decimal number; give hex digits")
    return False


def _bits(code: str | tuple[float, ...], in_bits: bool, url: str) -> np.ndarray:
    """Hex digits, 0s and 1s, or a tuple of 0/1 or -1/+1, as (K,) bool."""
    if isinstance(code, tuple):
        return np.array(code, dtype=float) > 0
    if in_bits:
        if set(code) <= set("01"):
            return np.array([each == "1" for each in code])
        raise Broken(f"{url} answered the code {code[:40]!r}, and codes of 0s and 1s before")
    if len(code) % 2:
        raise Broken(f"{url} answered the code {code[:40]!r}, which is not whole bytes in hex digits")
    return np.unpackbits(np.frombuffer(bytes.fromhex(code), np.uint8)).astype(bool)
