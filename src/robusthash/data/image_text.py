"""Image-text sets: texts as bags of words or token ids, and the items of a set with images and texts."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robusthash.core.runtime import packaged
from robusthash.data.base import RetrievalData, TextForm
from robusthash.data.image_files import ImageFile, ImageOptions, decode
from robusthash.data.splits import Indices, assemble, compact

logger = logging.getLogger(__name__)

_CHUNK = 4096  # texts whose bags exist as floats at a time


@dataclass(frozen=True)
class TextOptions:
    """Options of the texts of items. Nothing of an encoder is computed ahead.

    An item without any words is kept, counted in the note of the data set and warned of: its bag is all zero
    (its ids are the tokenizer's empty text), and no text encoder can tell such items apart.

    Attributes:
        texts: ``False`` none, ``True`` or ``"bag"`` a bag of words, ``"tokens"`` token ids for a transformer.
        caption: ``first`` of an item's texts, or ``all`` joined by spaces.
        vocabulary: most frequent words of the training texts that a bag counts.
        tokenizer: for tokens, the folder with the tokenizer's files, or ``minilm`` (extra ``weights``).
        max_length: for tokens, the most ids a text may have; longer ones are cut, counted and warned of.
    """

    texts: bool | str = True
    caption: Literal["first", "all"] = "all"
    vocabulary: int = 1000
    tokenizer: str | Path | None = None
    max_length: int = 64

    forms: ClassVar[tuple[str, ...]] = ("bag", "tokens")
    """Values of ``texts`` other than true and false."""

    def __post_init__(self) -> None:
        if self.texts not in (True, False, *self.forms):
            *others, last = map(repr, self.forms)
            choice = ", ".join(["true", "false", *others])
            raise ValueError(f"texts must be {choice} or {last}, got {self.texts!r}")
        if self.caption not in ("first", "all"):
            raise ValueError(f"caption must be 'first' or 'all', got {self.caption!r}")
        if self.texts == "tokens" and self.tokenizer is None:
            raise ValueError("texts='tokens' needs tokenizer=, the folder with the tokenizer's files")
        if self.texts != "tokens" and self.tokenizer is not None:
            raise ValueError(f"a tokenizer is for texts='tokens', and texts is {self.texts!r}")

    def encode(
        self,
        captions: Sequence[Sequence[str]],
        train: Tensor,
        others: Tensor,
        stop_words: Collection[str] = (),
    ) -> tuple[Tensor, str, TextForm]:
        """The texts of N items -> (N, V) bool or (N, L) int64, their note for the data set, and their form.

        The vocabulary is made of the rows ``train``; words outside it are counted in those of ``others``.
        """
        texts = [" ".join(several[:1] if self.caption == "first" else several) for several in captions]
        empty = note_empty(torch.tensor([not text.strip() for text in texts]))
        form: TextForm
        if self.texts == "tokens":
            values, note = token_ids(texts, str(self.tokenizer), self.max_length)
            where = Path(str(self.tokenizer))
            form = TokenForm(str(where.absolute() if where.is_dir() else where), self.max_length)
        else:
            form = words = Vocabulary.fit((texts[row] for row in train.tolist()), self.vocabulary, stop_words)
            starts = range(0, len(texts), _CHUNK)
            values = torch.cat([words.encode(texts[start : start + _CHUNK]).bool() for start in starts])
            unseen, total = words.unseen((texts[row] for row in others.tolist()), stop_words)
            counted = f"{unseen} of {total} caption words of query and database"
            note = f"{counted} are outside the vocabulary of {len(words)}."
        return values, f"{empty} {note}".strip(), form


def one_text_each(texts: Any) -> list[str]:
    """Texts of items as a list; a ValueError that names one which is no text, or a single text for all."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"texts= takes one text for each item, got the one text {texts[:40]!r}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            remedy = "join words by spaces, decode bytes, write '' where there is no text"
            raise ValueError(f"text {number} is {text!r:.40} and no str: {remedy}")
    return texts


def note_empty(empty: Tensor) -> str:
    """Warn of items without text and return the note that counts them; "" where there are none."""
    count = int(empty.sum())
    if count == 0:
        return ""
    note = f"{count} of {len(empty)} items have an empty text."
    logger.warning("%s They are kept, with nothing in their place.", note)
    return note


def token_ids(texts: Sequence[str], name: str | Path, max_length: int) -> tuple[Tensor, str]:
    """Texts -> (N, L) int64 ids, padded to the longest text, and a note that counts the texts that were cut.

    ``name`` is a folder with a tokenizer's files, or packaged weights; nothing is fetched. L is at most
    ``max_length``; special tokens count. ValueError where there is no tokenizer, none that pads, or a length
    above what its encoder takes.
    """
    folder = packaged(name)
    tokenizer = _load_tokenizer(folder)
    limit = tokenizer.model_max_length
    if not 2 < max_length <= limit:
        raise ValueError(f"max_length must lie in 3..{limit}, the limit of {folder}: {max_length}")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {folder} has no padding token; use one of a BERT kind")
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    padded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    note = f"Texts are token ids of {Path(name).name}."
    if (longest := max(lengths)) > max_length:
        count = sum(length > max_length for length in lengths)
        cut = f"{count} of {len(texts)} texts cut to {max_length} tokens (the longest has {longest})."
        logger.warning("%s", cut)
        note += f" {cut}"
    return padded["input_ids"].to(torch.int64), note


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, from local files only."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute()}; it should hold tokenizer.json or vocab.txt")
    try:
        from transformers import AutoTokenizer  # seconds to import, and only token ids need it
    except ImportError as error:
        raise ImportError("texts='tokens' needs transformers: pip install robusthash[text]") from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json or vocab.txt): {error}") from error


def words_of(text: str) -> list[str]:
    """Lower-cased words: runs of letters and digits, an apostrophe inside allowed."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words that a bag of words counts, most frequent first; ``fit`` makes it of training texts."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError("a vocabulary needs at least one word; are all texts empty?")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def fit(cls, texts: Iterable[str], size: int = 1000, without: Collection[str] = ()) -> Vocabulary:
        """The ``size`` most frequent words except ``without``; equal counts in alphabetical order."""
        if size < 1:
            raise ValueError(f"a vocabulary needs a size of at least 1, got {size}")
        counts = Counter(word for text in texts for word in words_of(text))
        for word in without:
            counts.pop(word, None)
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(ordered[:size]))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, V) float32, 1 where the word occurs; words not in the vocabulary are ignored."""
        column = {word: number for number, word in enumerate(self.words)}
        bags = torch.zeros(len(texts), len(self.words))
        for row, text in enumerate(texts):
            bags[row, [column[word] for word in words_of(text) if word in column]] = 1
        return bags

    def plain(self) -> dict[str, Any]:
        """Plain data that ``text_form`` reads."""
        return {"words": list(self.words)}

    def unseen(self, texts: Iterable[str], without: Collection[str] = ()) -> tuple[int, int]:
        """(words that ``encode`` ignores, all words), ``without`` apart, repetitions counted."""
        known, apart = set(self.words), set(without)
        is_known = [word in known for text in texts for word in words_of(text) if word not in apart]
        return is_known.count(False), len(is_known)


@dataclass(frozen=True)
class TokenForm:
    """Texts as token ids."""

    tokenizer: str  # a folder, or packaged weights
    max_length: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, L) int64; see ``token_ids``."""
        return token_ids(texts, self.tokenizer, self.max_length)[0]

    def plain(self) -> dict[str, Any]:
        """Plain data that ``text_form`` reads."""
        return {"tokenizer": self.tokenizer, "max_length": self.max_length}


def text_form(plain: Mapping[str, Any]) -> TextForm:
    """The form of texts that ``plain`` wrote; ValueError for other data."""
    if isinstance(words := plain.get("words"), list) and all(isinstance(word, str) for word in words):
        return Vocabulary(tuple(words))
    if isinstance(plain.get("tokenizer"), str) and isinstance(plain.get("max_length"), int):
        return TokenForm(plain["tokenizer"], plain["max_length"])
    raise ValueError(f"a form of texts holds words, or tokenizer and max_length, got {', '.join(plain)}")


@dataclass(frozen=True)
class Pool:
    """All items of a set before any is chosen."""

    files: tuple[ImageFile, ...]
    labels: Tensor  # (N, C) float32
    names: tuple[str, ...]  # of the label columns
    texts: tuple[tuple[str, ...], ...] | None = None  # of each item
    bags: Tensor | None = None  # (N, V) bool or float32, where the set comes with text vectors of its own
    stop_words: frozenset[str] = frozenset()  # that bags of its texts never count
    note: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Tensor) -> Pool:
        """The items of these rows, in their order."""
        files = tuple(self.files[row] for row in rows.tolist())
        texts = None if self.texts is None else tuple(self.texts[row] for row in rows.tolist())
        bags = None if self.bags is None else self.bags[rows]
        return replace(self, files=files, labels=self.labels[rows], texts=texts, bags=bags)

    def only(self, mask: Tensor, lacking: str) -> Pool:
        """The items where ``mask`` (N,) holds, at least one; the note counts those ``lacking`` something."""
        dropped = int((~mask).sum())
        if dropped == 0:
            return self
        note = f"{dropped} of {len(self)} items dropped: {lacking}."
        if dropped == len(self):
            raise ValueError(f"no item is left: {note}")
        return replace(self.take(torch.nonzero(mask).flatten()), note=f"{self.note} {note}".strip())

    def on_disk(self, belong: str) -> Pool:
        """The items whose image files are there; a set may be partial, and then one warning says so.

        FileNotFoundError where none is; ``belong`` says which archive they are in and where they go.
        """
        there = torch.tensor([file.path.is_file() for file in self.files])
        if not there.any():
            raise FileNotFoundError(f"none of the {len(self)} images is there (as {self.files[0]}); {belong}")
        if not there.all():
            logger.warning("%d of %d images are not there (%s)", int((~there).sum()), len(self), belong)
        return self.only(there, "their image file is not there")

    def expect(self, count: int) -> Pool:
        """Warn where a complete set does not have the published number of items."""
        if len(self) == count:
            return self
        note = f"Published protocols have {count} items here, these files give {len(self)}."
        logger.warning("%s", note)
        return replace(self, note=f"{self.note} {note}".strip())


def make_data(
    name: str, pool: Pool, indices: Indices, image: ImageOptions, text: TextOptions, note: str
) -> RetrievalData:
    """The data set of chosen items: images decoded, texts encoded, splits checked.

    The images of the splits are decoded once here, and the content hashes are of their pixels. Unreadable
    files leave every split under ``on_error="skip"``.
    """
    needed, indices = compact(indices)
    pool = pool.take(needed)
    source, readable = decode(pool.files, image)
    if len(readable) < len(pool):
        pool, indices = pool.take(readable), _without_unreadable(indices, readable, len(pool))
    note = f"{note} {pool.note}".strip()
    form = None
    if text.texts:
        values, text_note, form = _encode_texts(pool, indices, text)
        source, note = replace(source, others={"text": values}), f"{note} {text_note}".strip()
    return assemble(name, source, pool.labels, source.hashes, indices, pool.names, note, text_form=form)


def _encode_texts(pool: Pool, indices: Indices, text: TextOptions) -> tuple[Tensor, str, TextForm | None]:
    if pool.bags is not None and text.texts != "tokens":
        return pool.bags, note_empty(~pool.bags.any(1)), None
    if pool.texts is None:
        raise ValueError(f"these items come without texts, and texts={text.texts!r} was asked for")
    others = torch.cat([indices.query, indices.database])
    return text.encode(pool.texts, indices.train, others, pool.stop_words)


def _without_unreadable(indices: Indices, readable: Tensor, total: int) -> Indices:
    """Indices into ``total`` items as indices into those that are readable."""
    number = torch.full((total,), -1)
    number[readable] = torch.arange(len(readable))

    def part(rows: Tensor) -> Tensor:
        return number[rows][number[rows] >= 0]

    validation = None if indices.validation is None else part(indices.validation)
    return Indices(part(indices.train), part(indices.query), part(indices.database), validation)
