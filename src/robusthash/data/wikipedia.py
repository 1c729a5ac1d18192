"""Wikipedia featured articles: 2,866 documents of image and text, as features or as they are."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.data.base import ArraySource, RetrievalData, find, flat_options, lines_of, read_npz
from robusthash.data.image_files import ImageFile, ImageOptions
from robusthash.data.image_text import Pool, TextOptions, make_data
from robusthash.data.splits import Indices, SplitOptions, assemble, compact, draw_rows, one_hot

CATEGORIES = (
    *("art", "biology", "geography", "history", "literature"),
    *("media", "music", "royalty", "sport", "warfare"),
)

_ARCHIVE = "wikipedia.npz"
_KEYS = tuple(f"{what}_{part}" for what in ("image", "text", "label") for part in ("train", "test"))
_MATRICES = {"image_train": "I_tr", "text_train": "T_tr", "image_test": "I_te", "text_test": "T_te"}
_NUMBERS = frozenset(str(number) for number in range(1, 11))
_LISTS = (
    "wikipedia_dataset.zip unpacks to trainset_txt_img_cat.list, testset_txt_img_cat.list, raw_features.mat, "
    "images/<category>/ and texts/"
)


class WikipediaTexts(TextOptions):
    """Texts that may also be the weights of topics that come with the set."""

    forms = ("topics", "bag", "tokens")


@register("data", "wikipedia", paper="Rasiwasia et al. 2010", modality="image+text", state="measured")
@flat_options("caption", "split")
def wikipedia(
    root: str | Path = "data",
    npz: str | Path | None = None,
    images: Literal["features", "pixels"] = "features",
    image: ImageOptions = ImageOptions(),
    text: WikipediaTexts = WikipediaTexts(max_length=256),
    splits: SplitOptions = SplitOptions(),
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
        image: for pixels.
        text: ``True`` or ``"topics"`` is (N, 10) weights of topics; from the archive only and next to pixels
            only, ``"bag"`` is a bag of the words of the article and ``"tokens"`` token ids.
        splits: cuts a part to a number of items, drawn by ``seed``.
    """
    words = text.texts in ("bag", "tokens")
    if images == "features" and words:
        raise ValueError(f"texts={text.texts!r} goes with images='pixels'; features have 'topics'")
    if npz is not None and images == "pixels":
        raise ValueError(f"images='pixels' needs the official archive; {npz} holds features only")
    note = f"Official split; images {image}." if images == "pixels" else "Official split; features."
    if splits.query or splits.train or splits.database:
        sizes = f"query={splits.query}, train={splits.train}, database={splits.database}"
        note += f" Cut to {sizes}, seed {splits.seed}."
    if images == "pixels":
        pool, is_query = _documents(Path(root), words)
        pool = pool if words or not text.texts else replace(pool, bags=_read_mat(Path(root))[0]["text"])
        return make_data("wikipedia", pool, _split(is_query, splits), image, text, note)
    packed = Path(root) / _ARCHIVE if npz is None else Path(npz)
    if npz is not None or packed.is_file():
        arrays, labels, is_query = _read_features(packed)
    else:
        arrays, is_query = _read_mat(Path(root))
        labels = _documents(Path(root), False)[0].labels
    needed, indices = compact(_split(is_query, splits))
    hashes = ArraySource(arrays).hashes()[needed.numpy()]
    used = {name: values[needed] for name, values in arrays.items() if text.texts or name == "image"}
    return assemble("wikipedia", ArraySource(used), labels[needed], hashes, indices, CATEGORIES, note)


def _split(is_query: Tensor, splits: SplitOptions) -> Indices:
    draws = Draws(splits.seed).within("wikipedia")

    def part(name: str, among: Tensor, count: int | None) -> Tensor:
        rows = torch.nonzero(among).flatten()
        return rows if count is None else draw_rows(rows, count, draws.within(name), f"{name} documents")

    training, database = part("train", ~is_query, splits.train), part("database", ~is_query, splits.database)
    return Indices(training, part("query", is_query, splits.query), database)


def _read_features(path: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """``image`` and ``text`` of all documents, one-hot labels and (N,) bool, which documents are queries."""
    parts = read_npz(path, _KEYS, "Wikipedia")
    arrays, is_query = _joined(parts, path)
    labels = torch.from_numpy(np.concatenate([parts["label_train"], parts["label_test"]]).astype(np.int64))
    if len(labels) != len(is_query) or labels.min() < 0 or labels.max() >= len(CATEGORIES):
        span = f"{len(labels)} labels in {labels.min()}..{labels.max()}"
        raise ValueError(f"{path}: {span} for {len(is_query)} documents")
    return arrays, one_hot(labels, len(CATEGORIES)), is_query


def _read_mat(root: Path) -> tuple[dict[str, Tensor], Tensor]:
    """``image`` and ``text`` of all documents in the order of the lists, and which documents are queries."""
    from scipy.io import loadmat  # half a second to import, and only this layout needs it

    path = find(root, "raw_features.mat", _LISTS)
    try:
        read = loadmat(path, variable_names=list(_MATRICES.values()))
        parts = {key: read[name] for key, name in _MATRICES.items()}
    except Exception as error:  # of ten kinds, as NotImplementedError for the HDF5 of MATLAB 7.3
        names = ", ".join(_MATRICES.values())
        raise ValueError(f"{path} does not hold the matrices {names}: {error!r}") from error
    return _joined(parts, path)


def _joined(parts: dict[str, np.ndarray], path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Training and then test documents, and which of them are of the test."""
    arrays = {}
    for name in ("image", "text"):
        train, test = parts[f"{name}_train"], parts[f"{name}_test"]
        if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
            raise ValueError(f"{path}: {name} features must be matrices, got {train.shape} and {test.shape}")
        arrays[name] = torch.from_numpy(np.concatenate([train, test]).astype(np.float32))
        if not torch.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} features hold NaN or infinite values")
    return arrays, torch.arange(len(arrays["image"])) >= len(parts["image_train"])


def _documents(root: Path, words: bool) -> tuple[Pool, Tensor]:
    """The documents of the training and then the test list, and which are of the test."""
    lists = [lines_of(find(root, f"{part}set_txt_img_cat.list", _LISTS)) for part in ("train", "test")]
    rows = [line.split() for listed in lists for line in listed]
    wrong = [row for row in rows if len(row) != 3 or row[2] not in _NUMBERS]
    if wrong:
        raise ValueError(f"the lists should hold text, image, category (1 to 10) a line, and hold {wrong[0]}")
    labels = torch.tensor([int(category) - 1 for _, _, category in rows])
    is_query = torch.arange(len(rows)) >= len(lists[0])
    folder = find(root, "images", _LISTS).parent
    categories = [CATEGORIES[label] for label in labels.tolist()]
    paths = [folder / "images" / name / f"{row[1]}.jpg" for name, row in zip(categories, rows, strict=True)]
    texts = tuple((_words(folder / "texts" / f"{text}.xml"),) for text, _, _ in rows) if words else None
    files = tuple(ImageFile(path) for path in paths)
    return Pool(files, one_hot(labels, len(CATEGORIES)), CATEGORIES, texts), is_query


def _words(path: Path) -> str:
    """The text of an article without its marks; not all of the files are sound XML."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {_LISTS}")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", path.read_text("utf-8", errors="replace"))).split())
