"""Captions and tags -> the modality ``text``: bags of words, or token ids for a transformer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.data.transforms import Vocabulary

logger = logging.getLogger(__name__)

Texts = bool | Literal["bag", "tokens"]
"""``False`` none, ``True`` or ``"bag"`` a bag of words, ``"tokens"`` token ids for a transformer."""

Caption = Literal["first", "all"]

_CHUNK = 4096  # texts whose bags exist as floats at a time


@dataclass(frozen=True)
class TextStyle:
    """How the texts of the items become a tensor. Nothing of an encoder is computed ahead.

    An item without any words is kept: its bag is all zero (its ids are the tokenizer's empty text), it is
    counted in the note of the data set, and one warning says so, since no text encoder can tell such items
    apart.

    Attributes:
        texts: see ``Texts``.
        caption: ``first`` of an item's texts, or ``all`` joined by spaces.
        vocabulary: most frequent words of the training texts that a bag counts.
        tokenizer: for tokens, the folder with the tokenizer's files.
        max_length: for tokens, the most ids a text may have; longer ones are cut, counted and warned of.
        without: words that a bag never counts.
    """

    texts: Texts = True
    caption: Caption = "all"
    vocabulary: int = 1000
    tokenizer: str | Path | None = None
    max_length: int = 64
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.texts not in (True, False, "bag", "tokens"):
            raise ValueError(f"texts must be true, false, 'bag' or 'tokens', got {self.texts!r}")
        if self.caption not in ("first", "all"):
            raise ValueError(f"caption must be 'first' or 'all', got {self.caption!r}")
        if self.texts == "tokens" and self.tokenizer is None:
            raise ValueError("texts='tokens' needs tokenizer=, the folder with the tokenizer's files")
        if self.texts != "tokens" and self.tokenizer is not None:
            raise ValueError(f"a tokenizer is for texts='tokens', and texts is {self.texts!r}")

    def choose(self, captions: Sequence[Sequence[str]]) -> list[str]:
        """One text an item, of all its texts."""
        return [" ".join(several[:1] if self.caption == "first" else several) for several in captions]

    def encode(self, captions: Sequence[Sequence[str]], train: Tensor, asked: Tensor) -> tuple[Tensor, str]:
        """The texts of N items -> (N, V) bool or (N, L) int64, and what the note of the data set says of
        them.

        Args:
            captions: the texts of each item, in their order.
            train: row numbers that the vocabulary is made from.
            asked: rows of query and database, in which words outside the vocabulary are counted.
        """
        texts = self.choose(captions)
        said = note_empty([not text.strip() for text in texts])
        if self.texts == "tokens":
            values, more = token_ids(texts, Path(str(self.tokenizer)), self.max_length)
        else:
            words = Vocabulary.fit((texts[row] for row in train.tolist()), self.vocabulary, self.without)
            values = torch.cat(
                [words.encode(texts[at : at + _CHUNK]).bool() for at in range(0, len(texts), _CHUNK)]
            )
            unseen, total = words.unseen((texts[row] for row in asked.tolist()), self.without)
            outside = f"outside the vocabulary of {len(words)}"
            more = f"{unseen} of {total} caption words of query and database are {outside}."
        return values, f"{said} {more}".strip()


def note_empty(empty: Sequence[bool] | Tensor) -> str:
    """Warns of items without text, and says how many there are; nothing where there are none."""
    count = int(torch.as_tensor(empty, dtype=torch.bool).sum())
    if count == 0:
        return ""
    said = f"{count} of {len(empty)} items have an empty text."
    logger.warning("%s They are kept, with nothing in their place.", said)
    return said


def token_ids(texts: Sequence[str], folder: Path, max_length: int) -> tuple[Tensor, str]:
    """Texts -> (N, L) int64 ids, padded to the longest text, and a note with the number of texts that were
    cut.

    Args:
        folder: with a tokenizer's files (``tokenizer.json`` or ``vocab.txt``); nothing is fetched.
        max_length: L is at most this; special tokens count.

    Raises:
        ImportError: the extra ``text`` is not installed.
        FileNotFoundError: no such folder.
        ValueError: no tokenizer in it, none that pads, or a ``max_length`` above what its encoder takes.
    """
    tokenizer = load_tokenizer(folder)
    most = tokenizer.model_max_length
    if not 2 < max_length <= most:
        raise ValueError(
            f"max_length must lie in 3..{most}, the longest text of the encoder of {folder}: {max_length}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {folder} has no padding token; use one of a BERT kind")
    whole = tokenizer(list(texts), verbose=False)["input_ids"]
    cut = sum(len(ids) > max_length for ids in whole)
    padded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    note = f"Texts are token ids of {folder.name}."
    if cut:
        longest = max(len(ids) for ids in whole)
        said = f"{cut} of {len(texts)} texts cut to {max_length} tokens (the longest has {longest})."
        logger.warning("%s", said)
        note += f" {said}"
    return padded["input_ids"].to(torch.int64), note


def load_tokenizer(folder: Path) -> Any:
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
