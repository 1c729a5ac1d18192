"""A search behind HTTP, queried under a budget and a rate; its answers are checked against each other.

Each request is ``POST url`` with a PNG file as the body. The answer is JSON of one of two forms:

    {"code": "8f3c..."}  or  {"code": [0, 1, 1, ...]}      the code, in hex or as bits
    {"ids": ["a", "b", ...], "distances": [0, 3, ...]}      results, nearest first; distances may be left out
"""

from __future__ import annotations

import email.utils
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from robusthash.data.transforms import to_pixels
from robusthash.models.external.model_answers import Broken

_LARGEST = 1 << 20  # bytes of an answer
_LONGEST_WAIT = 60.0  # seconds; a longer Retry-After is reported instead of waited for


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer on one image: a code, or search results."""

    code: np.ndarray | None = None  # (K,) bool
    ids: tuple[str, ...] = ()
    distances: tuple[float, ...] | None = None


@dataclass
class Endpoint:
    """A client of one search. Calling it with images gives (B, K) codes, where it answers codes.

    Args:
        budget: requests in all, repeated ones included.
        rate: requests a second at most.
        timeout: seconds to wait for one answer.
        retries: repetitions after a timeout, 429 or 5xx, each after a longer pause or after ``Retry-After``.
        headers: sent with each request, such as ``Authorization``; never written anywhere.
        pause: seconds before the first repetition; doubled each time.
    """

    url: str
    budget: int = 5000
    rate: float = 5.0
    timeout: float = 10.0
    retries: int = 4
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    pause: float = 0.5
    sleep: Callable[[float], None] = time.sleep
    asked: int = 0
    _known: dict[bytes, Answer] = field(default_factory=dict, repr=False)
    _next: float = 0.0

    def __post_init__(self) -> None:
        for name in ("budget", "rate", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                f"endpoints need an extra: pip install 'robusthash[audit]' ({error})"
            ) from error
        self._client = httpx.Client(timeout=self.timeout, headers=dict(self.headers))

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B, 3, H, W) float in [0, 1] -> (B, K) bool."""
        codes = []
        for answer in self.answers(images):
            if answer.code is None:
                raise Broken(f"{self.url} answered ids, and codes before")
            codes.append(answer.code)
        if len(lengths := {len(code) for code in codes}) != 1:
            raise Broken(f"{self.url} answered codes of different length: {sorted(lengths)}")
        return np.stack(codes)

    def answers(self, images: Tensor, again: bool = False) -> list[Answer]:
        """One answer for each image. The same pixels are sent once, unless ``again``."""
        answers = []
        for pixels in to_pixels(images):
            key = pixels.tobytes()
            if again or key not in self._known:
                self._known[key] = self._ask(pixels)
            answers.append(self._known[key])
        return answers

    def check_consistency(self, image: Tensor) -> Answer:
        """Send one (1, 3, H, W) image twice.

        Raises:
            Broken: the two answers differ.
        """
        first, second = self.answers(image)[0], self.answers(image, again=True)[0]
        one, two = (np.empty(0, bool) if answer.code is None else answer.code for answer in (first, second))
        if first.ids != second.ids or first.distances != second.distances or not np.array_equal(one, two):
            reason = "an audit needs a search that repeats itself"
            raise Broken(f"{self.url} gave two answers to the same image; {reason}")
        return first

    def check_budget(self, questions: int) -> None:
        """Refuse an audit before its first request.

        Raises:
            ValueError: the budget has too little left.
        """
        left = self.budget - self.asked
        if questions > left:
            raise ValueError(
                f"this audit asks {self.url} about {questions} questions and {left} of the budget are left; "
                "raise --budget, or lower --queries"
            )

    def _ask(self, pixels: np.ndarray) -> Answer:
        import httpx

        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        problem = ""
        for attempt in range(self.retries + 1):
            if self.asked >= self.budget:
                raise Broken(f"the budget of {self.budget} questions to {self.url} is spent; raise --budget")
            self._keep_rate()
            self.asked += 1
            wait = self.pause * 2**attempt
            try:
                headers = {"content-type": "image/png"}
                reply = self._client.post(self.url, content=png.getvalue(), headers=headers)
            except httpx.TimeoutException:
                problem = f"did not answer within {self.timeout:g} s"
            except httpx.HTTPError as error:
                raise Broken(f"{self.url} cannot be asked: {error or type(error).__name__}") from error
            else:
                if reply.status_code == 200:
                    return _read(reply.content, self.url)
                if reply.status_code != 429 and reply.status_code < 500:
                    text = f"{reply.status_code}: {reply.text.strip()[:120]}".rstrip(": ")
                    raise Broken(f"{self.url} answered status {text}")
                problem = f"answered status {reply.status_code}"
                wait = max(wait, _retry_after(reply.headers.get("retry-after", ""), self.url))
            if attempt < self.retries:
                self.sleep(wait)
        raise Broken(f"{self.url} {problem}, {self.retries + 1} times; lower --rate, or raise --timeout")

    def _keep_rate(self) -> None:
        now = time.monotonic()
        if now < self._next:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 1.0 / self.rate


def _retry_after(text: str, url: str) -> float:
    """Seconds of a ``Retry-After`` header, which holds a number or a date; 0 where it holds neither."""
    if text.strip().isdigit():
        seconds = float(text)
    else:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return 0.0
    if seconds > _LONGEST_WAIT:
        remedy = "run the audit then, or lower --rate"
        raise Broken(f"{url} asks to wait {seconds:.0f} s before the next question; {remedy}")
    return seconds


def _read(content: bytes, url: str) -> Answer:
    """The answer in the body.

    Raises:
        Broken: no JSON of the two forms, or an order that its own distances contradict.
    """
    if len(content) > _LARGEST:
        reason = f"more than {_LARGEST}; return the nearest few ids only"
        raise Broken(f"{url} answered {len(content)} bytes, {reason}")
    try:
        body: Any = json.loads(content)
    except ValueError as error:
        raise Broken(f"{url} answered no JSON: {content[:80]!r}") from error
    if not isinstance(body, dict) or ("code" in body) == ("ids" in body):
        raise Broken(f'{url} must answer {{"code": ...}} or {{"ids": [...]}}, it answered {str(body)[:120]}')
    if "code" in body:
        return Answer(code=_bits(body["code"], url))
    ids, distances = body["ids"], body.get("distances")
    if not isinstance(ids, list) or not ids or len(set(map(str, ids))) != len(ids):
        shown = str(ids)[:120]
        raise Broken(f"{url} must answer a list of different ids, nearest first, it answered {shown}")
    names = tuple(map(str, ids))
    if distances is None:
        return Answer(ids=names)
    if not isinstance(distances, list) or len(distances) != len(ids) or not all(map(_is_number, distances)):
        shown = str(distances)[:120]
        raise Broken(f"{url} answered {len(ids)} ids, and not as many numbers for distances: {shown}")
    for rank in range(1, len(ids)):
        if distances[rank] < distances[rank - 1]:
            raise Broken(
                f"{url} lies about its order: {ids[rank]!r} at distance {distances[rank]} stands after "
                f"{ids[rank - 1]!r} at distance {distances[rank - 1]}; sort the answer by distance"
            )
    return Answer(ids=names, distances=tuple(map(float, distances)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _bits(code: Any, url: str) -> np.ndarray:
    """Hex digits, or a list of 0/1 or -1/+1, as (K,) bool."""
    if isinstance(code, str) and code:
        try:
            return np.unpackbits(np.frombuffer(bytes.fromhex(code), np.uint8)).astype(bool)
        except ValueError:
            reason = "which is not whole bytes in hex digits"
            raise Broken(f"{url} answered the code {code[:40]!r}, {reason}") from None
    numbers = isinstance(code, list) and bool(code) and all(map(_is_number, code))
    if numbers and (set(code) <= {0, 1} or set(code) <= {-1, 1}):
        return np.array(code) > 0
    raise Broken(f"{url} answered the code {str(code)[:60]!r}; give hex digits, or a list of 0/1 or -1/+1")
