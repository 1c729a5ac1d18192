"""Decoding: every kind of image file that people have, and files that are none."""

from __future__ import annotations

import io
import logging
import os
import random
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.data import image_files, pixel_conversion
from robusthash.data.image_files import (
    UNREAD,
    ImageFile,
    ImageOptions,
    ImageTooLarge,
    UnreadableImage,
    iter_images,
    path_text,
    pixels_of,
    read_image,
    read_images,
)
from robusthash.data.image_listing import list_images


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def halves(mode: str, left: Any, right: Any, width: int = 32, height: int = 16) -> Image.Image:
    """An image whose left half has one value and whose right half another."""
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def pixel(image: torch.Tensor, x: int, y: int) -> list[int]:
    return image[:, y, x].tolist()


def test_rgb_png_is_read_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(values)))
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(values).permute(2, 0, 1))


def test_grey_and_bilevel_fill_three_channels(tmp_path: Path) -> None:
    grey = read_image(save(tmp_path / "grey.png", halves("L", 10, 200)))
    assert pixel(grey, 0, 0) == [10, 10, 10]
    assert pixel(grey, 31, 0) == [200, 200, 200]
    bilevel = read_image(save(tmp_path / "bits.png", halves("1", 0, 1)))
    assert pixel(bilevel, 0, 0) == [0, 0, 0]
    assert pixel(bilevel, 31, 0) == [255, 255, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned clockwise
    path = save(tmp_path / "turned.jpg", halves("RGB", (250, 0, 0), (0, 0, 250)), exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == (3, 32, 16)
    assert pixel(image, 8, 2)[0] > 200  # the left half has become the top
    assert pixel(image, 8, 29)[2] > 200
    assert (
        pixel(read_image(path, 8, "stretch"), 4, 0)[0] > 200
    )  # also where the file is decoded at a fraction


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = halves("P", 0, 1)
    image.putpalette([200, 10, 10, 10, 10, 200])
    assert pixel(read_image(save(tmp_path / "opaque.png", image)), 31, 0) == [10, 10, 200]
    clear = read_image(save(tmp_path / "clear.png", image, transparency=1))
    assert pixel(clear, 0, 0) == [200, 10, 10]
    assert pixel(clear, 31, 0) == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "opaque", "half"), [("RGBA", (100, 50, 0, 255), (0, 0, 0, 128)), ("LA", (9, 255), (0, 128))]
)
def test_alpha_is_laid_on_white(
    tmp_path: Path, mode: str, opaque: tuple[int, ...], half: tuple[int, ...]
) -> None:
    image = read_image(save(tmp_path / "alpha.png", halves(mode, opaque, half)))
    assert pixel(image, 0, 0) == (list(opaque[:3]) if mode == "RGBA" else [9, 9, 9])
    assert all(abs(value - 127) <= 1 for value in pixel(image, 31, 0))


def test_transparent_colour_of_an_rgb_file_becomes_white(tmp_path: Path) -> None:
    path = save(tmp_path / "key.png", halves("RGB", (1, 2, 3), (9, 9, 9)), transparency=(1, 2, 3))
    image = read_image(path)
    assert pixel(image, 0, 0) == [255, 255, 255]
    assert pixel(image, 31, 0) == [9, 9, 9]


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    image = halves("RGB", (230, 30, 30), (30, 30, 230)).convert("CMYK")
    read = read_image(save(tmp_path / "print.jpg", image, quality=95))
    assert pixel(read, 2, 2)[0] > 180 > 100 > pixel(read, 2, 2)[2]
    assert pixel(read, 29, 2)[2] > 180 > 100 > pixel(read, 29, 2)[0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = torch.arange(256).reshape(16, 16)
    for name in ("deep.png", "deep.tif"):
        image = read_image(save(tmp_path / name, Image.fromarray(values)))
        assert torch.equal(image[0].long(), expected), name


def test_floats_in_the_unit_range_and_wider_ones(tmp_path: Path) -> None:
    unit = np.array([[0.0, 0.5], [0.25, 0.75]], dtype=np.float32)
    assert read_image(save(tmp_path / "unit.tif", Image.fromarray(unit)))[0].tolist() == [[0, 128], [64, 191]]
    wide = np.array([[-10.0, 0.0], [5.0, 10.0]], dtype=np.float32)
    assert read_image(save(tmp_path / "wide.tif", Image.fromarray(wide)))[0].tolist() == [
        [0, 128],
        [191, 255],
    ]
    wider = np.array([[0, 100_000], [200_000, 400_000]], dtype=np.int32)
    assert read_image(save(tmp_path / "int.tif", Image.fromarray(wider)))[0].tolist() == [[0, 64], [128, 255]]
    level = np.full((2, 2), 70_000, dtype=np.int32)
    assert read_image(save(tmp_path / "level.tif", Image.fromarray(level))).max() == 0
    holes = np.array([[0.0, np.nan], [0.0, 0.0]], dtype=np.float32)
    with pytest.raises(UnreadableImage, match=r"holes.*NaN"):
        read_image(save(tmp_path / "holes.tif", Image.fromarray(holes)))


def test_fit_crop_pad_and_stretch(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 10, 20))
    image.paste((0, 0, 255), (30, 0, 40, 20))
    path = save(tmp_path / "bands.png", image)
    assert pixel(read_image(path, 20, "crop"), 0, 10) == [0, 255, 0]  # both outer bands are cut off
    stretched = read_image(path, 20, "stretch")
    assert pixel(stretched, 0, 10) == [255, 0, 0]
    assert pixel(stretched, 19, 10) == [0, 0, 255]
    padded = read_image(path, 20, "pad")
    assert padded.shape == (3, 20, 20)
    assert pixel(padded, 10, 0) == [0, 0, 0]
    assert pixel(padded, 10, 10) == [0, 255, 0]


def test_resizing_does_not_alias(tmp_path: Path) -> None:
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], dtype=np.uint8), (64, 32)))
    small = read_image(save(tmp_path / "stripes.png", stripes), 16).float()
    assert (small - 127.5).abs()[:, :, 2:-2].max() < 3  # the border itself has nothing to average with


def test_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.jpg", halves("RGB", (250, 0, 0), (0, 0, 250), 1600, 1600), quality=80)
    seen: list[tuple[int, int]] = []
    original = Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda image, *a, **k: seen.append(image.size) or original(image, *a, **k)
    )
    image = read_image(path, 64)
    assert seen == [(200, 200)]  # an eighth, and still more than twice the size asked for
    assert pixel(image, 4, 4)[0] > 200


def test_missing_file_is_not_called_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_truncated_file_names_file_and_reason(tmp_path: Path, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage, match=rf"cannot read .*{name} as an image: \S"):
        read_image(path)


def test_text_and_empty_files_are_unreadable(tmp_path: Path) -> None:
    for content in (b"", b"this is no picture"):
        path = tmp_path / "note.jpg"
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=r"note\.jpg"):
            read_image(path)
    with pytest.raises(UnreadableImage, match="<stream>"):
        read_image(io.BytesIO(b"GIF89a"))


def test_postscript_is_not_even_tried(tmp_path: Path) -> None:
    path = save(tmp_path / "a.eps", Image.new("RGB", (4, 4)))
    with pytest.raises(UnreadableImage, match=r"a\.eps"):
        read_image(path)


def test_pixel_limit_names_file_pixels_and_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "wide.png", Image.new("L", (300, 200)))
    with pytest.raises(ImageTooLarge, match=r"wide\.png has 300 x 200 = 60000 pixels.*59999"):
        read_image(path, max_pixels=59_999)
    assert read_image(path, max_pixels=60_000).shape == (3, 200, 300)
    assert issubclass(ImageTooLarge, UnreadableImage)
    assert issubclass(UnreadableImage, ValueError)


def test_pillows_own_bomb_checks_become_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", Image.new("L", (300, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageTooLarge, match=r"bomb\.png.*60000 pixels"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # between one and two times: Pillow only warns
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_image(path).shape == (3, 200, 300)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bomb_warning_raised_as_an_error_is_ours_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", Image.new("L", (300, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(ImageTooLarge, match=r"bomb\.png"):
        read_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": 8, "fit": "squeeze"}, "fit must be"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match=message):
        read_image(path, **options)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_damaged_files_raise_nothing_but_unreadable() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, options in (
        (noise, {"format": "PNG"}),
        (noise, {"format": "JPEG", "exif": exif}),
        (noise.convert("P"), {"format": "GIF"}),
        (noise, {"format": "BMP"}),
        (noise, {"format": "WEBP"}),
        (noise.convert("P"), {"format": "PNG", "transparency": 3, "exif": exif}),
    ):
        stream = io.BytesIO()
        image.save(stream, **options)
        files.append(stream.getvalue())
    chance = random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(chance.choice(files))
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(min(len(damaged), 4)):
            damaged[chance.randrange(min(len(damaged), 200))] = chance.randrange(256)
        try:
            assert read_image(io.BytesIO(bytes(damaged)), 8).shape == (3, 8, 8)
        except UnreadableImage:
            refused += 1
    assert 100 < refused < 600


def test_part_of_an_archive_is_read_in_place(tmp_path: Path) -> None:
    content = save(tmp_path / "a.png", halves("L", 10, 200)).read_bytes()
    (tmp_path / "box").write_bytes(b"before" + content + b"after")
    file = ImageFile(tmp_path / "box", "a.png", 6, len(content))
    assert torch.equal(read_image(file), read_image(tmp_path / "a.png"))
    with pytest.raises(UnreadableImage, match=r"box:a\.png"):
        read_image(ImageFile(tmp_path / "box", "a.png", 6, 40))


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    """Five files, of which the second and the fourth are broken."""
    paths = [save(tmp_path / f"{number}.png", Image.new("L", (6, 6), 50 * number)) for number in range(5)]
    for number in (1, 3):
        paths[number].write_bytes(b"broken")
    return paths


def test_skip_warns_once_with_count_and_names(mixed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pixels, kept = read_images(mixed, 4)
    assert kept.tolist() == [0, 2, 4]
    assert pixels[:, 0, 0, 0].tolist() == [0, 100, 200]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "2 of 5 images skipped" in message
    assert "1.png" in message
    assert "3.png" in message


def test_raise_gives_the_first_error(mixed: list[Path]) -> None:
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        read_images(mixed, 4, on_error="raise")


def test_nothing_left_is_an_error(mixed: list[Path]) -> None:
    with pytest.raises(ValueError, match="none of the 2 images"):
        read_images([mixed[1], mixed[3]], 4)
    with pytest.raises(ValueError, match="on_error must be"):
        read_images(mixed, 4, on_error="ignore")  # type: ignore[arg-type]


def test_missing_file_is_never_skipped(mixed: list[Path]) -> None:
    mixed[0].unlink()
    with pytest.raises(FileNotFoundError):
        read_images(mixed, 4)


def test_many_files_come_in_order_from_several_threads(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.png", Image.new("L", (3, 3), n % 256)) for n in range(300)]
    before = threading.active_count()
    values = [
        int(image[0, 0, 0])
        for image in iter_images(paths, ImageOptions(3))
        if not isinstance(image, UnreadableImage)
    ]
    assert values == [n % 256 for n in range(300)]
    assert threading.active_count() == before


# Metadata of strangers


def exif_directory(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF block of (tag, type, count, value) entries, as cameras and editors write them."""
    head, data = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for tag, kind, count, value in entries:
        place = (
            struct.pack("<I", 14 + 12 * len(entries) + len(data)) if len(value) > 4 else value.ljust(4, b"\0")
        )
        head += struct.pack("<HHI", tag, kind, count) + place
        data += value if len(value) > 4 else b""
    return b"Exif\0\0" + head + bytes(4) + data


def odd_entries(chance: random.Random) -> list[tuple[int, int, int, bytes]]:
    """Up to six tags of any type and count, with values that need not fit them."""
    tags = [
        0x11A,
        0x11B,
        0x128,
        0x10F,
        0x110,
        0x8769,
        0x8825,
        0xA005,
        0x100,
        0x111,
        0x927C,
        0x201,
        0x14A,
        0x2BC,
    ]
    entries = []
    for _ in range(chance.randint(1, 6)):
        size = chance.choice([1, 2, 4, 8, 24])
        value = chance.choice([bytes(size), chance.randbytes(size), b"\xff" * size])
        entries.append(
            (chance.choice(tags), chance.randrange(15), chance.choice([0, 1, 2, 1000, 2**31]), value)
        )
    return entries


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_orientation_is_all_that_is_taken_of_odd_exif() -> None:
    chance, noise = random.Random(0), np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    turned = {1: torch.from_numpy(noise).permute(2, 0, 1)}
    for value, turn in {6: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}.items():
        turned[value] = torch.from_numpy(np.array(image.transpose(turn))).permute(2, 0, 1)
    for number in range(3000):
        value = (1, 3, 6)[number % 3]
        entries = [(0x112, 3, 1, struct.pack("<H", value)), *odd_entries(chance)]
        stream = io.BytesIO()
        image.save(stream, "PNG", exif=exif_directory(entries))
        assert torch.equal(read_image(stream), turned[value]), entries


@pytest.mark.filterwarnings("ignore")
def test_an_orientation_of_another_type_turns_nothing_and_ends_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    for value in (
        (0x112, 2, 3, b"six\0"),
        (0x112, 5, 1, bytes(8)),
        (0x112, 12, 1, b"\xff" * 8),
        (0x112, 3, 1, b"\x63\0"),
    ):
        path = save(tmp_path / "a.png", image, exif=exif_directory([value, (0x11A, 2, 4, b"high")]))
        assert read_image(path).shape == (3, 16, 24)
        with Image.open(path) as opened:
            assert torch.equal(pixels_of(opened, 8), read_image(path, 8))


# Files that are no files


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name, kind in (
        ("pipe", "a pipe"),
        ("folder", "a folder"),
        ("loop", "symbolic links"),
        ("zero", "a device"),
    ):
        with pytest.raises(UnreadableImage, match=rf"{name}\.jpg.*{kind}"):
            read_image(tmp_path / f"{name}.jpg")


def test_a_folder_is_listed_by_content_and_the_rest_is_named(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    read = ["a.jpg", "b.jfif", "c", "d.dat", "deep/e.PNG", "album.jpg/f.webp"]
    for name in read:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture.save(path, {".jpg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))
    (tmp_path / "broken.png").write_bytes(b"")  # reported when it is read
    (tmp_path / "notes.txt").write_text("P5 is how some pictures begin")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "again").symlink_to(".")
    listing = list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in listing.images] == sorted(
        [*read, "broken.png"], key=lambda name: Path(name).parts
    )
    reasons = {os.path.relpath(one.file, tmp_path): one.reason for one in listing.skipped}
    assert reasons == {
        ".cache": "a hidden folder",
        ".hidden.jpg": "a hidden file",
        "again": "a link to a folder",
        "album.jpg": "a folder, not an image file",
        "gone.jpg": "a link to nothing",
        "loop.jpg": "Too many levels of symbolic links",
        "notes.txt": UNREAD,
        "phone.heic": "a HEIC picture, which is not read; save it as JPEG or PNG",
        "pipe.jpg": "a pipe (fifo)",
    }
    assert {path.name for path in list_images(tmp_path, deep=False).images} == {
        "a.jpg",
        "b.jfif",
        "broken.png",
        "c",
        "d.dat",
    }


def test_names_that_are_no_utf8_are_written_readably(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (4, 4)).save(name)
    (listed,) = list_images(tmp_path).images
    assert os.fsencode(listed) == os.fsencode(name)
    assert read_image(listed).shape == (3, 4, 4)
    assert path_text(listed).endswith("/caf\\xe9.png")
    path_text(listed).encode()


# Memory


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_bands_of_a_large_transparent_image_are_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    image = Image.fromarray(chance.integers(0, 256, (50, 37, 4), dtype=np.uint8), "RGBA")
    if mode != "RGBA":
        image = image.convert(mode) if mode == "LA" else image.convert("RGB").convert("P")
    if mode == "P":
        image.info["transparency"] = bytes(chance.integers(0, 256, 256, dtype=np.uint8))
    whole = image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole).convert("RGB")
    monkeypatch.setattr(pixel_conversion, "_BAND", 100)
    assert np.array_equal(np.array(pixel_conversion.to_rgb(image)), np.array(expected))


def test_no_more_pixels_are_decoded_at_once_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [save(tmp_path / f"{number}.png", Image.new("RGB", (40, 25), "red")) for number in range(12)]
    small = [save(tmp_path / f"s{number}.png", Image.new("RGB", (10, 10), "red")) for number in range(12)]
    alone = save(tmp_path / "alone.png", Image.new("RGB", (100, 100), "red"))
    room, held, most = pixel_conversion.Decoding(2500), [], threading.Lock()
    monkeypatch.setattr(image_files, "DECODING", room)
    convert = pixel_conversion.to_rgb

    def watched(image: Image.Image) -> Image.Image:
        with most:
            held.append(room._held)
        time.sleep(0.002)  # so that the threads meet
        return convert(image)

    monkeypatch.setattr(image_files, "to_rgb", watched)
    images = list(iter_images([*large, alone, *small], ImageOptions(4), workers=8))
    assert all(isinstance(image, torch.Tensor) for image in images)
    assert max(count for count in held if count != 10_000) <= 2500
    assert 10_000 in held  # larger than the room, so alone
    assert max(held) == 10_000
    assert room._held == 0


def test_max_pixels_takes_the_place_of_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(
        tmp_path / "huge.png", Image.new("L", (19_000, 9_500), 7)
    )  # 180 megapixels, refused by Pillow
    with pytest.raises(ImageTooLarge, match=r"--max-pixels.* to 180500000 if you trust it"):
        read_image(path, 8)
    assert read_image(path, 8, max_pixels=180_500_000).unique().tolist() == [7]
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.parametrize("workers", [0, -2])
def test_workers_must_be_positive(workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers must be at least 1, got {workers}"):
        list(iter_images([], ImageOptions(4), workers))


def progressive(side: int = 64) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", progressive=True)
    return stream.getvalue()


def png_of_chunks(count: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    content, empty = stream.getvalue(), struct.pack(">I", 0) + b"abCd"
    return content[:33] + (empty + struct.pack(">I", zlib.crc32(b"abCd"))) * count + content[33:]


JPEG = progressive()
SCAN = JPEG[JPEG.rindex(b"\xff\xda") : -2]  # the last
MANY = {
    "a scan repeated": (JPEG[:-2] + SCAN * 200 + b"\xff\xd9", "100 scans"),
    "empty markers": (JPEG[:2] + b"\xff\xe1\0\2" * 5_000 + JPEG[2:], "1000 markers"),
    "fill bytes": (JPEG[:2] + b"\xff" * 100_000 + JPEG[2:], "65536 fill bytes"),
    "escaped bytes as fill": (JPEG[:20] + b"\xff\0" * 50_000 + JPEG[20:], "65536 fill bytes"),
    "junk between segments": (JPEG[:20] + b"x" * 100_000 + JPEG[20:], "65536 fill bytes"),
    "empty chunks": (png_of_chunks(20_000), "10000 chunks"),
}


@pytest.mark.parametrize("name", MANY)
def test_files_of_many_parts_are_refused_before_a_decoder_walks_them(name: str) -> None:
    content, reason = MANY[name]
    with pytest.raises(UnreadableImage, match=f"of more than {reason}"):
        read_image(io.BytesIO(content), 16)


def test_files_of_the_parts_that_encoders_write_are_read() -> None:
    whole = read_image(io.BytesIO(JPEG), 16)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 20 * len(SCAN)) + SCAN * 20  # scans inside a segment
    for content in (
        JPEG[:2] + thumbnail * 10 + JPEG[2:],
        JPEG[:2] + b"\xff" * 1_000 + JPEG[2:],
        JPEG[:2] + b"\xff\xe1\0\2" * 300 + JPEG[2:],
        JPEG + SCAN * 1_000,  # behind the end
    ):
        assert torch.equal(read_image(io.BytesIO(content), 16), whole)
    assert read_image(io.BytesIO(JPEG[:-2] + SCAN * 50 + b"\xff\xd9"), 16).shape == (3, 16, 16)
    noise = np.random.default_rng(1).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "JPEG", quality=95, **options)
        stream.seek(0)
        assert read_image(stream, 16).shape == (3, 16, 16)
    assert read_image(io.BytesIO(png_of_chunks(1_000))).shape == (3, 8, 8)
