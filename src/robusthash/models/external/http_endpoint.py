"""A search behind HTTP: asked with a budget, a rate and patience, and believed only where its answers fit
together.

Each question is ``POST url`` with a PNG file as the body. The answer is JSON of one of two forms:

    {"code": "8f3c..."}  or  {"code": [0, 1, 1, ...]}      the code, in hex or as bits
    {"ids": ["a", "b", ...], "distances": [0, 3, ...]}      what was found, nearest first; distances may be
    left out
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
from robusthash.models.external.wrapper import Broken

_LARGEST = 1 << 20  # bytes of an answer
_LONGEST_WAIT = 60.0  # seconds; a longer Retry-After is told instead of waited for


@dataclass(frozen=True)
class Answer:
    """What an endpoint said of one image: a code, or what it found."""

    code: np.ndarray | None = None  # (K,) bool
    ids: tuple[str, ...] = ()
    distances: tuple[float, ...] | None = None


@dataclass
class Endpoint:
    """A client of one search. Calling it with images gives (B, K) codes, where it answers codes.

    Args:
        budget: questions in all, those asked again included.
        rate: questions a second at most.
        timeout: seconds of patience for one answer.
        retries: how often a question is asked again after a timeout, 429 or 5xx, each time after a longer
            pause, or after the pause that ``Retry-After`` asks for.
        headers: sent with each question, such as ``Authorization``; never written anywhere.
    """

    url: str
    budget: int = 5000
    rate: float = 5.0
    timeout: float = 10.0
    retries: int = 4
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    pause: float = 0.5  # seconds before the first repetition; doubled each time
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
        codes = [self._code(answer) for answer in self.answers(images)]
        if len({len(code) for code in codes}) != 1:
            raise Broken(
                f"{self.url} answered codes of different length: {sorted({len(code) for code in codes})}"
            )
        return np.stack(codes)

    def answers(self, images: Tensor, again: bool = False) -> list[Answer]:
        """One answer for each image. The same pixels are asked about once, unless ``again``."""
        found = []
        for pixels in to_pixels(images):
            key = pixels.tobytes()
            if again or key not in self._known:
                self._known[key] = self._ask(_png(pixels))
            found.append(self._known[key])
        return found

    def check_consistency(self, image: Tensor) -> Answer:
        """Ask about one (1, 3, H, W) image twice.

        Raises:
            Broken: the two answers differ.
        """
        first, second = self.answers(image)[0], self.answers(image, again=True)[0]
        same = first.ids == second.ids and first.distances == second.distances
        if not same or not np.array_equal(self._bits(first), self._bits(second)):
            raise Broken(
                f"{self.url} gave two answers to the same image; an audit needs a search that repeats itself"
            )
        return first

    def check_budget(self, questions: int) -> None:
        """Refuse before anything is asked.

        Raises:
            ValueError: the budget has too little left.
        """
        left = self.budget - self.asked
        if questions > left:
            raise ValueError(
                f"this audit asks {self.url} about {questions} questions and {left} of the budget are left; "
                "raise --budget, or lower --queries"
            )

    def _code(self, answer: Answer) -> np.ndarray:
        if answer.code is None:
            raise Broken(f"{self.url} answered ids, and codes before")
        return answer.code

    @staticmethod
    def _bits(answer: Answer) -> np.ndarray:
        return np.empty(0, bool) if answer.code is None else answer.code

    def _ask(self, png: bytes) -> Answer:
        import httpx

        trouble = ""
        for attempt in range(self.retries + 1):
            if self.asked >= self.budget:
                raise Broken(f"the budget of {self.budget} questions to {self.url} is spent; raise --budget")
            self._keep_rate()
            self.asked += 1
            wait = self.pause * 2**attempt
            try:
                reply = self._client.post(self.url, content=png, headers={"content-type": "image/png"})
            except httpx.TimeoutException:
                trouble = f"did not answer within {self.timeout:g} s"
            except httpx.HTTPError as error:
                raise Broken(f"{self.url} cannot be asked: {error or type(error).__name__}") from error
            else:
                if reply.status_code == 200:
                    return _read(reply.content, self.url)
                if reply.status_code != 429 and reply.status_code < 500:
                    text = reply.text.strip()[:120]
                    raise Broken(
                        f"{self.url} answered status {reply.status_code}{': ' + text if text else ''}"
                    )
                trouble = f"answered status {reply.status_code}"
                wait = max(wait, _retry_after(reply.headers.get("retry-after", ""), self.url))
            if attempt < self.retries:
                self.sleep(wait)
        raise Broken(f"{self.url} {trouble}, {self.retries + 1} times; lower --rate, or raise --timeout")

    def _keep_rate(self) -> None:
        now = time.monotonic()
        if now < self._next:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 1.0 / self.rate


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _retry_after(text: str, url: str) -> float:
    """Seconds that a ``Retry-After`` header asks for: a number of seconds or a date; 0 where it says
    nothing."""
    if not text:
        return 0.0
    if text.strip().isdigit():
        seconds = float(text)
    else:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return 0.0
    if seconds > _LONGEST_WAIT:
        raise Broken(
            f"{url} asks to wait {seconds:.0f} s before the next question; run the audit then, or lower --rate"
        )
    return seconds


def _read(content: bytes, url: str) -> Answer:
    """The answer in the body.

    Raises:
        Broken: no JSON of the two forms, or an order that its own distances contradict.
    """
    if len(content) > _LARGEST:
        raise Broken(
            f"{url} answered {len(content)} bytes, more than {_LARGEST}; return the nearest few ids only"
        )
    try:
        body: Any = json.loads(content)
    except ValueError as error:
        raise Broken(f"{url} answered no JSON: {content[:80]!r}") from error
    if not isinstance(body, dict) or ("code" in body) == ("ids" in body):
        raise Broken(f'{url} must answer {{"code": ...}} or {{"ids": [...]}}, it answered {str(body)[:120]}')
    if "code" in body:
        return Answer(code=_bits_of(body["code"], url))
    ids, distances = body["ids"], body.get("distances")
    if not isinstance(ids, list) or not ids or len(set(map(str, ids))) != len(ids):
        raise Broken(
            f"{url} must answer a list of different ids, nearest first, it answered {str(ids)[:120]}"
        )
    if distances is None:
        return Answer(ids=tuple(map(str, ids)))
    if not isinstance(distances, list) or len(distances) != len(ids) or not all(map(_is_number, distances)):
        raise Broken(
            f"{url} answered {len(ids)} ids, and not as many numbers for distances: {str(distances)[:120]}"
        )
    for rank in range(1, len(ids)):
        if distances[rank] < distances[rank - 1]:
            raise Broken(
                f"{url} lies about its order: {ids[rank]!r} at distance {distances[rank]} stands after "
                f"{ids[rank - 1]!r} at distance {distances[rank - 1]}; sort the answer by distance"
            )
    return Answer(ids=tuple(map(str, ids)), distances=tuple(map(float, distances)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _bits_of(code: Any, url: str) -> np.ndarray:
    """Hex digits, or a list of 0/1 or -1/+1, as (K,) bool."""
    if isinstance(code, str) and code:
        try:
            return np.unpackbits(np.frombuffer(bytes.fromhex(code), np.uint8)).astype(bool)
        except ValueError:
            raise Broken(
                f"{url} answered the code {code[:40]!r}, which is not whole bytes in hex digits"
            ) from None
    if (
        isinstance(code, list)
        and code
        and all(map(_is_number, code))
        and (set(code) <= {0, 1} or set(code) <= {-1, 1})
    ):
        return np.array(code) > 0
    raise Broken(f"{url} answered the code {str(code)[:60]!r}; give hex digits, or a list of 0/1 or -1/+1")
