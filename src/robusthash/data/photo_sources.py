"""The twenty photographs of the embedded data set: where they are, their tags and what captions call them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Photograph:
    """One photograph and what is written about it."""

    name: str
    file: str  # package / path inside the package
    tags: tuple[str, ...]  # each is shared with another photograph
    phrases: tuple[str, ...]  # what a caption calls it


# The wheels also hold drawings (chessboards, colour wheel, horse, phantom, logo), tiny crops (microaneurysms,
# LFW faces, multi-page TIFF) and the right-hand view of the motorcycle. That view shows the scene of the left
# one from a step aside: as a photograph of its own it would be a near copy that counts as irrelevant, so it
# is left out.
PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "skimage/data/astronaut.png",
        ("person", "face", "space"),
        (
            "a smiling astronaut in an orange suit",
            "a woman in a space suit before a flag and a model of the shuttle",
        ),
    ),
    Photograph(
        "brick",
        "skimage/data/brick.png",
        ("texture", "building"),
        ("a brick wall", "rows of long bricks in a wall"),
    ),
    Photograph(
        "camera",
        "skimage/data/camera.png",
        ("person", "outdoor", "building"),
        ("a man behind a camera on a tripod", "a photographer in a dark coat on a lawn"),
    ),
    Photograph(
        "cell",
        "skimage/data/cell.png",
        ("medical",),
        ("a bright cell under the microscope", "a single round cell in saline"),
    ),
    Photograph(
        "cat",
        "skimage/data/chelsea.png",
        ("face", "closeup"),
        ("a tabby cat", "the face of a ginger cat with green eyes"),
    ),
    Photograph(
        "clock",
        "skimage/data/clock_motion.png",
        ("indoor",),
        ("a wall clock blurred by motion", "a blurred grey clock"),
    ),
    Photograph(
        "coffee",
        "skimage/data/coffee.png",
        ("indoor", "closeup"),
        ("a cup of coffee on a wooden table", "espresso in a red cup with a spoon"),
    ),
    Photograph(
        "coins",
        "skimage/data/coins.png",
        ("metal", "closeup"),
        ("rows of ancient coins", "old greek coins on a dark ground"),
    ),
    Photograph(
        "grass",
        "skimage/data/grass.png",
        ("texture", "plant"),
        ("blades of grass", "a meadow seen from above"),
    ),
    Photograph(
        "gravel",
        "skimage/data/gravel.png",
        ("texture",),
        ("a bed of gravel", "many small grey stones"),
    ),
    Photograph(
        "galaxies",
        "skimage/data/hubble_deep_field.jpg",
        ("space", "sky", "night"),
        ("distant galaxies in a black sky", "the deep field of a space telescope"),
    ),
    Photograph(
        "tissue",
        "skimage/data/ihc.png",
        ("medical", "texture"),
        ("stained tissue under the microscope", "brown and blue stained cells of a gland"),
    ),
    Photograph(
        "moon",
        "skimage/data/moon.png",
        ("space",),
        ("the surface of the moon", "craters on the grey ground of the moon"),
    ),
    Photograph(
        "motorcycle",
        "skimage/data/motorcycle_left.png",
        ("vehicle", "indoor", "metal"),
        ("a red motorcycle in a garage", "a parked motorcycle before shelves"),
    ),
    Photograph(
        "page",
        "skimage/data/page.png",
        ("document",),
        ("a printed page", "a page of text about segmentation"),
    ),
    Photograph(
        "retina",
        "skimage/data/retina.jpg",
        ("medical",),
        ("the retina of an eye with its blood vessels", "a red eye ground with a bright disc"),
    ),
    Photograph(
        "rocket",
        "skimage/data/rocket.jpg",
        ("vehicle", "space", "sky", "night", "outdoor"),
        ("a rocket on its launch pad", "a white rocket between two towers at dusk"),
    ),
    Photograph(
        "writing",
        "skimage/data/text.png",
        ("document",),
        ("words written by hand", "handwriting seen aslant"),
    ),
    Photograph(
        "pagoda",
        "sklearn/datasets/images/china.jpg",
        ("building", "plant", "sky", "outdoor"),
        ("a chinese pagoda among trees", "a temple tower above a lake"),
    ),
    Photograph(
        "flower",
        "sklearn/datasets/images/flower.jpg",
        ("plant", "closeup", "outdoor"),
        ("an orange dahlia", "a round flower with many petals"),
    ),
)

TAGS = tuple(sorted({tag for photograph in PHOTOGRAPHS for tag in photograph.tags}))


def photograph_path(photograph: Photograph) -> Path:
    """Where the installed package keeps the file; the package itself is not imported.

    Raises:
        FileNotFoundError: it is not there.
    """
    package, _, inside = photograph.file.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / inside if spec is not None and spec.origin else Path(photograph.file)
    if not path.is_file():
        raise FileNotFoundError(
            f"the photograph {photograph.file} is missing; it comes inside the wheel of scikit-image or scikit-learn, "
            "so install them again: pip install --force-reinstall --no-deps scikit-image scikit-learn"
        )
    return path
