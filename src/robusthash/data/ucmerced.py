"""UC Merced aerial photographs with classes, labels and captions: the smallest real image-text set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from robusthash.core.registry import register
from robusthash.data.base import RetrievalData, flat_options
from robusthash.data.folder import LabelField, folder
from robusthash.data.image_files import ImageOptions
from robusthash.data.image_text import TextOptions

_TAR, _FOLDER, _MANIFEST = "ucmerced.tar", "ucmerced", "ucmerced.jsonl"


@register(
    "data",
    "ucmerced",
    paper="Yang and Newsam 2010; Chaudhuri et al. 2018; Qu et al. 2016",
    modality="image+text",
    state="measured",
)
@flat_options()
def ucmerced(
    root: str | Path = "data",
    archive: str | Path | None = None,
    manifest: str | Path | None = None,
    labels: LabelField = "labels",
    query_splits: Sequence[str] = ("test", "val"),
    image: ImageOptions = ImageOptions(),
    text: TextOptions = TextOptions(),
) -> RetrievalData:
    """UC Merced: 2,100 aerial photographs, 17 labels (several an image), 21 classes and five captions each.

    The 1,680 training images of the caption set are training set and database, its 210 test and 210
    validation images the queries. Two images share one of the 17 labels in 64 % of all pairs, so chance is
    high: look at the classes too, which are the other label system of the data set
    (``RetrievalData.by("class")``, ``relevance: [labels, class]``).

    Args:
        root: folder that holds ``ucmerced.jsonl`` and, next to it, ``ucmerced.tar`` or that tar unpacked.
        archive, manifest: these files where they have other names or places; the manifest's columns are those
            of ``folder``.
        labels: main label system, ``labels`` (17) or ``class`` (21); the other one comes along by its name.
        query_splits: parts of the caption set that are queries; with ``["test"]``, ``val`` is for validation.
        image: the originals have 256 pixels a side.
    """
    manifest = Path(root) / _MANIFEST if manifest is None else Path(manifest)
    if not manifest.is_file():
        raise FileNotFoundError(
            f"no UC Merced at {manifest.absolute()}: it should hold one JSON object a line with file, "
            f"labels, class, captions and split, and {_TAR} the images (or give manifest= and archive=)"
        )
    tar, unpacked = Path(root) / _TAR, Path(root) / _FOLDER
    if archive is None and tar.is_file():
        archive = tar
    elif archive is None and not unpacked.is_dir():
        raise FileNotFoundError(f"no images: neither {tar} nor the folder {unpacked} is there")
    files = {"root": root if archive is None else None, "archive": archive, "manifest": manifest}
    rules = {"label_field": labels, "split": "manifest", "query_splits": query_splits}
    return replace(folder(**files, **rules, **vars(image), **vars(text)), name="ucmerced")
