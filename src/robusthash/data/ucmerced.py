"""UC Merced aerial photographs with classes, several labels and captions: the smallest real image-text
set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData
from robusthash.data.folder import folder
from robusthash.data.image_files import MEMORY
from robusthash.data.manifest import LabelField
from robusthash.data.text_modality import Caption, Texts
from robusthash.data.transforms import Fit

_TAR, _FOLDER, _MANIFEST = "ucmerced.tar", "ucmerced", "ucmerced.jsonl"


@register(
    "data",
    "ucmerced",
    paper="Yang and Newsam 2010; Chaudhuri et al. 2018; Qu et al. 2016",
    modality="image+text",
    state="measured",
)
def ucmerced(
    root: str | Path = "data",
    archive: str | Path | None = None,
    manifest: str | Path | None = None,
    labels: LabelField = "labels",
    size: int = 64,
    fit: Fit = "crop",
    texts: Texts = True,
    caption: Caption = "all",
    vocabulary: int = 1000,
    tokenizer: str | Path | None = None,
    max_length: int = 64,
    query_splits: Sequence[str] = ("test", "val"),
    memory: int = MEMORY,
) -> RetrievalData:
    """UC Merced: 2,100 aerial photographs, 17 labels (several an image), 21 classes and five captions an
    image.

    The 1,680 training images of the caption set are training set and database, its 210 test and 210
    validation images the queries. Two images share one of the 17 labels in 64 % of all pairs, so chance is
    high: look at the classes too, which are the other label system of the data set
    (``RetrievalData.by("class")``, ``relevance: [labels, class]``).

    Args:
        root: folder that holds ``ucmerced.jsonl`` and, beside it, ``ucmerced.tar`` or that tar unpacked.
        archive, manifest: these files where they have other names or places; the manifest's columns are those
            of ``folder``.
        labels: main label system, ``labels`` (17) or ``class`` (21); the other one comes along under its
            name.
        size: side of the square images in pixels; the originals have 256.
        fit, texts, caption, vocabulary, tokenizer, max_length, memory: as in ``folder``; texts are on by
            default.
        query_splits: parts of the caption set that are queries; with ``["test"]``, ``val`` is for validation.

    Raises:
        FileNotFoundError: nothing is there; the message says what belongs where.
        ValueError: as in ``folder``.
    """
    manifest = Path(root) / _MANIFEST if manifest is None else Path(manifest)
    if not manifest.is_file():
        raise FileNotFoundError(
            f"no UC Merced at {manifest.absolute()}: it should hold one JSON object a line with file, labels, class, "
            f"captions and split, with the images in {_TAR} or unpacked (or name them by manifest= and archive=)"
        )
    if archive is None and (Path(root) / _TAR).is_file():
        archive = Path(root) / _TAR
    elif archive is None and not (Path(root) / _FOLDER).is_dir():
        raise FileNotFoundError(
            f"no images: neither {Path(root) / _TAR} nor the folder {Path(root) / _FOLDER} is there"
        )
    data = folder(
        root=root if archive is None else None,
        archive=archive,
        manifest=manifest,
        label_field=labels,
        size=size,
        fit=fit,
        texts=texts,
        caption=caption,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        max_length=max_length,
        split="manifest",
        query_splits=query_splits,
        memory=memory,
    )
    return replace(data, name="ucmerced")
