"""Wikipedia featured articles: 2,866 documents of image and text in ten categories, as features or as they
are."""

from __future__ import annotations

import html
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.image_files import MEMORY, Decoding
from robusthash.data.official import Pool, find, lines_of, make_data
from robusthash.data.splits import Indices, assemble, compact, one_hot
from robusthash.data.text_modality import Texts, TextStyle
from robusthash.data.transforms import Fit, ImageFile, OnError

CATEGORIES = (
    "art",
    "biology",
    "geography",
    "history",
    "literature",
    "media",
    "music",
    "royalty",
    "sport",
    "warfare",
)

_ARCHIVE = "wikipedia.npz"
_KEYS = tuple(f"{what}_{part}" for what in ("image", "text", "label") for part in ("train", "test"))
_MATRICES = {"image_train": "I_tr", "text_train": "T_tr", "image_test": "I_te", "text_test": "T_te"}
_NUMBERS = frozenset(str(number) for number in range(1, 11))
_LISTS = (
    "wikipedia_dataset.zip unpacks to trainset_txt_img_cat.list, testset_txt_img_cat.list, raw_features.mat, "
    "images/<category>/ and texts/"
)


@register("data", "wikipedia", paper="Rasiwasia et al. 2010", modality="image+text")
def wikipedia(
    root: str | Path = "data",
    npz: str | Path | None = None,
    images: Literal["features", "pixels"] = "features",
    texts: bool | Literal["topics", "bag", "tokens"] = True,
    query: int | None = None,
    train: int | None = None,
    database: int | None = None,
    seed: int = 0,
    size: int = 64,
    fit: Fit = "crop",
    vocabulary: int = 1000,
    tokenizer: str | Path | None = None,
    max_length: int = 256,
    on_error: OnError = "raise",
    memory: int = MEMORY,
) -> RetrievalData:
    """Wikipedia: 2,173 training documents, which are also the database, and 693 test documents as queries.

    The split is the official one, which DSARH and TA-DCH use. With ``images="features"`` the modality
    ``image`` is (N, 128) float32, frequencies of visual words: give it the encoder ``vector``. Documents are
    the same only where both features are: three queries share their image with a training document of another
    text, and stay.

    Args:
        root: folder that holds ``wikipedia.npz``, looked for first, or the unpacked official archive, at most
            three folders down.
        npz: read this file instead; arrays ``image_train`` (2173, 128), ``text_train`` (2173, 10),
            ``label_train`` (0 to 9), the same with ``_test``, and ``categories``.
        images: ``features`` or, from the archive only, ``pixels``.
        texts: ``True`` or ``"topics"`` is (N, 10) weights of topics; from the archive only and beside pixels
            only, ``"bag"`` is a bag of the words of the article and ``"tokens"`` token ids.
        query, train, database: cut a part to so many items, drawn by ``seed``.
        size, fit, vocabulary, tokenizer, max_length, on_error, memory: as in ``folder``, for pixels and
            words.

    Raises:
        FileNotFoundError: a file is missing; the message says which archive it is in and where it goes.
        ValueError: files that do not belong together, an option that the files cannot serve.
    """
    if images not in ("features", "pixels"):
        raise ValueError(f"images must be 'features' or 'pixels', got {images!r}")
    if texts not in (True, False, "topics", "bag", "tokens"):
        raise ValueError(f"texts must be true, false, 'topics', 'bag' or 'tokens', got {texts!r}")
    words = texts in ("bag", "tokens")
    if images == "features" and words:
        raise ValueError(f"texts={texts!r} goes with images='pixels'; with features the texts are 'topics'")
    if npz is not None and images == "pixels":
        raise ValueError(f"images='pixels' needs the official archive; {npz} holds features only")
    note = (
        f"Official split; images {fit} to {size} x {size}."
        if images == "pixels"
        else "Official split; features."
    )
    if query or train or database:
        note += f" Cut to query={query}, train={train}, database={database}, seed {seed}."
    kind: Texts = "tokens" if texts == "tokens" else "bag" if texts == "bag" else bool(texts)
    style = TextStyle(kind, "all", vocabulary, tokenizer, max_length)
    if images == "pixels":
        decoding = Decoding(size, fit, on_error, memory=memory)
        pool, tested = _documents(Path(root), words)
        pool = pool if words or not texts else replace(pool, bags=_read_mat(Path(root))[0]["text"])
        return make_data(
            "wikipedia", pool, _split(tested, query, train, database, seed), decoding, style, note
        )
    packed = Path(root) / _ARCHIVE if npz is None else Path(npz)
    if npz is not None or packed.is_file():
        arrays, labels, tested = _read_npz(packed)
    else:
        arrays, tested = _read_mat(Path(root))
        labels = _documents(Path(root), False)[0].labels
    needed, indices = compact(_split(tested, query, train, database, seed))
    hashes = ArraySource(arrays).hashes()[needed.numpy()]
    used = {name: values[needed] for name, values in arrays.items() if texts or name == "image"}
    return assemble("wikipedia", ArraySource(used), labels[needed], hashes, indices, CATEGORIES, note)


def _split(tested: Tensor, query: int | None, train: int | None, database: int | None, seed: int) -> Indices:
    draws = Draws(seed).within("wikipedia")

    def part(name: str, among: Tensor, count: int | None) -> Tensor:
        rows = torch.nonzero(among).flatten()
        if count is None:
            return rows
        if not 1 <= count <= len(rows):
            raise ValueError(f"{name} must lie in 1..{len(rows)}, got {count}")
        return rows[torch.randperm(len(rows), generator=draws.within(name).generator())[:count]]

    return Indices(
        part("train", ~tested, train), part("query", tested, query), part("database", ~tested, database)
    )


def _read_npz(path: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """``image`` and ``text`` of all documents, one-hot labels and which documents are queries."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}; it should hold the arrays {', '.join(_KEYS)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(_KEYS) - set(archive.files))
            if missing:
                raise ValueError(
                    f"it lacks the arrays {', '.join(missing)} and has {', '.join(archive.files)}"
                )
            parts = {key: archive[key] for key in _KEYS}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a Wikipedia archive: {error}") from error
    arrays, tested = _joined(parts, path)
    labels = torch.from_numpy(np.concatenate([parts["label_train"], parts["label_test"]]).astype(np.int64))
    if len(labels) != len(tested) or labels.min() < 0 or labels.max() >= len(CATEGORIES):
        raise ValueError(
            f"{path}: {len(labels)} labels in {labels.min()}..{labels.max()} for {len(tested)} documents"
        )
    return arrays, one_hot(labels, len(CATEGORIES)), tested


def _read_mat(root: Path) -> tuple[dict[str, Tensor], Tensor]:
    """``image`` and ``text`` of all documents in the order of the lists, and which documents are queries."""
    from scipy.io import loadmat  # half a second to import, and only this layout needs it

    path = find(root, "raw_features.mat", _LISTS)
    try:
        read = loadmat(path, variable_names=list(_MATRICES.values()))
        parts = {key: read[name] for key, name in _MATRICES.items()}
    except (ValueError, TypeError, OSError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{path} does not hold the matrices {', '.join(_MATRICES.values())}: {error!r}"
        ) from error
    return _joined(parts, path)


def _joined(parts: dict[str, np.ndarray], path: Path) -> tuple[dict[str, Tensor], Tensor]:
    arrays = {}
    for name in ("image", "text"):
        train, test = parts[f"{name}_train"], parts[f"{name}_test"]
        if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
            raise ValueError(
                f"{path}: {name} features should be two matrices, got {train.shape} and {test.shape}"
            )
        arrays[name] = torch.from_numpy(np.concatenate([train, test]).astype(np.float32))
        if not torch.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} features hold NaN or infinite values")
    count = len(parts["image_train"])
    return arrays, torch.arange(len(arrays["image"])) >= count


def _documents(root: Path, words: bool) -> tuple[Pool, Tensor]:
    """Image files, labels and (with ``words``) texts of the training and then the test list; which are of the
    test."""
    lists = [lines_of(find(root, f"{part}set_txt_img_cat.list", _LISTS)) for part in ("train", "test")]
    rows = [line.split() for listed in lists for line in listed]
    wrong = [row for row in rows if len(row) != 3 or row[2] not in _NUMBERS]
    if wrong:
        raise ValueError(
            f"the lists should hold text, image and category (1 to 10) a line, and hold {wrong[0]}"
        )
    labels = torch.tensor([int(category) - 1 for _, _, category in rows])
    tested = torch.arange(len(rows)) >= len(lists[0])
    folder = find(root, "images", _LISTS).parent
    files = tuple(
        ImageFile(folder / "images" / CATEGORIES[int(category) - 1] / f"{image}.jpg")
        for _, image, category in rows
    )
    texts = tuple((_words(folder / "texts" / f"{text}.xml"),) for text, _, _ in rows) if words else None
    return Pool(files, one_hot(labels, len(CATEGORIES)), CATEGORIES, texts), tested


def _words(path: Path) -> str:
    """The text of an article without its marks; not all of the files are sound XML."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {_LISTS}")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", path.read_text("utf-8", errors="replace"))).split())
