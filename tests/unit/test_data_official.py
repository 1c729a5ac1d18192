"""How items are chosen and files are found, shared by the readers of official sets."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from robusthash.core.registry import card
from robusthash.data import load_data
from robusthash.data.base import find
from robusthash.data.image_files import ImageFile, ImageOptions
from robusthash.data.image_text import Pool, TextOptions, Vocabulary, make_data
from robusthash.data.splits import SplitOptions, SplitProtocol, find_protocol, protocol_split
from tests.unit.test_data_folder import picture

NAMES = ("a", "b", "c")


def overlapping(count: int = 60) -> torch.Tensor:
    """Every item has the class i mod 3, every second item also the next one."""
    rows = torch.arange(count)
    labels = torch.nn.functional.one_hot(rows % 3, 3)
    labels[::2] += torch.nn.functional.one_hot((rows[::2] + 1) % 3, 3)
    return labels.float()


def test_classes_one_after_the_other_never_take_an_item_twice() -> None:
    labels = overlapping()
    chosen = protocol_split(labels, SplitProtocol(6, 12, "per-class", ""), SplitOptions(seed=3), NAMES)
    assert len(torch.unique(torch.cat([chosen.query, chosen.train]))) == 18
    for number in range(3):  # each class drew its share among its own members
        assert labels[chosen.query[2 * number : 2 * number + 2], number].all()
        assert labels[chosen.train[4 * number : 4 * number + 4], number].all()
    assert sorted([*chosen.database.tolist(), *chosen.query.tolist()]) == list(range(60))
    again = protocol_split(labels, SplitProtocol(6, 12, "per-class", ""), SplitOptions(seed=3), NAMES)
    assert torch.equal(again.train, chosen.train)
    other = protocol_split(labels, SplitProtocol(6, 12, "per-class", ""), SplitOptions(seed=4), NAMES)
    assert not torch.equal(other.query, chosen.query)
    fewer = protocol_split(
        labels, SplitProtocol(6, 12, "per-class", ""), SplitOptions(train=3, database=10, seed=3), NAMES
    )
    assert torch.equal(fewer.query, chosen.query)  # queries do not depend on the other sizes
    assert len(fewer.database) == 10
    with pytest.raises(ValueError, match=r"class 'a' has 30 items left for the queries and 40 are needed"):
        protocol_split(labels, SplitProtocol(120, 3, "per-class", ""), SplitOptions(), NAMES)


def test_random_and_last() -> None:
    labels = overlapping()
    chosen = protocol_split(labels, SplitProtocol(10, 20, "random", ""), SplitOptions(), NAMES)
    assert [len(chosen.query), len(chosen.train), len(chosen.database)] == [10, 20, 50]
    assert torch.isin(chosen.train, chosen.database).all()
    assert not torch.isin(chosen.query, chosen.database).any()
    last = protocol_split(labels, SplitProtocol(10, None, "last", ""), SplitOptions(), NAMES)
    assert last.query.tolist() == list(range(50, 60))
    assert torch.equal(last.train, last.database)
    assert last.train.tolist() == list(range(50))
    assert (
        len(
            protocol_split(
                labels, SplitProtocol(10, None, "last", ""), SplitOptions(query=5, train=7, database=9), NAMES
            ).train
        )
        == 7
    )
    with pytest.raises(ValueError, match="60 queries were asked for and 59 are there"):
        protocol_split(labels, SplitProtocol(60, None, "last", ""), SplitOptions(), NAMES)
    with pytest.raises(ValueError, match="train must be at least 1, got 0"):
        protocol_split(labels, SplitProtocol(6, 12, "per-class", ""), SplitOptions(train=0), NAMES)


def test_unknown_split_is_met_with_the_nearest() -> None:
    with pytest.raises(KeyError, match="no split is called 'sflc'; did you mean 'sfcl'"):
        find_protocol({"sfcl": SplitProtocol(1, 1, "random", "")}, "sflc")


def test_files_are_found_below_prefix_folders(tmp_path: Path) -> None:
    (tmp_path / "NUS" / "inner" / "lists").mkdir(parents=True)
    (tmp_path / "NUS" / "inner" / "lists" / "a.txt").write_text("x")
    for strange in ("__MACOSX", ".cache"):
        (tmp_path / strange).mkdir()
        (tmp_path / strange / "a.txt").write_text("y")
    assert find(tmp_path, "a.txt", "").parent.name == "lists"
    (tmp_path / "NUS" / "a.txt").write_text("x")
    assert find(tmp_path, "a.txt", "").parent.name == "NUS"  # the nearest
    (tmp_path / "COPY").mkdir()
    (tmp_path / "COPY" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt is there twice"):
        find(tmp_path, "a.txt", "")
    with pytest.raises(FileNotFoundError, match=r"no b\.txt in .*; it belongs here"):
        find(tmp_path, "b.txt", "it belongs here")


def pool_of(tmp_path: Path, count: int = 9) -> Pool:
    files = tuple(ImageFile(picture(tmp_path / f"{number}.png", number)) for number in range(count))
    return Pool(files, overlapping(count), NAMES, texts=tuple((f"word{number}",) for number in range(count)))


def test_unreadable_files_leave_every_split(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    chosen = protocol_split(pool.labels, SplitProtocol(2, None, "last", ""), SplitOptions(), NAMES)
    pool.files[3].path.write_bytes(b"broken")
    data = make_data("x", pool, chosen, ImageOptions(8, on_error="skip", memory=0), TextOptions(True), "")
    assert [len(split) for split in data.splits.values()] == [6, 2, 6]
    whole = make_data("x", pool_of(tmp_path), chosen, ImageOptions(8), TextOptions(True), "")
    for split in ("train", "query"):  # what is left kept its own labels and pixels
        kept = [row for row in range(len(whole.splits[split])) if split != "train" or row != 3]
        assert torch.equal(data.splits[split].labels, whole.splits[split].labels[kept])
        assert list(data.splits[split].hashes) == list(whole.splits[split].hashes[kept])
    pool.files[3].path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r'on_error="skip" leaves such files out'):
        make_data("x", pool, chosen, ImageOptions(8), TextOptions(True), "")


def test_items_that_do_not_fit_together(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    labels = pool.labels.clone()
    labels[2, 0] = float("nan")
    chosen = protocol_split(labels, SplitProtocol(2, None, "last", ""), SplitOptions(), NAMES)
    with pytest.raises(ValueError, match=r"train: labels are \(N, C\) of 0 and 1, and one is nan"):
        make_data("x", Pool(pool.files, labels, NAMES), chosen, ImageOptions(8), TextOptions(False), "")
    with pytest.raises(ValueError, match="these items come without texts"):
        make_data("x", Pool(pool.files, pool.labels, NAMES), chosen, ImageOptions(8), TextOptions(True), "")
    with pytest.raises(ValueError, match="no item is left: 9 of 9 items dropped: no label"):
        pool.only(torch.zeros(9, dtype=torch.bool), "no label")


def test_bags_in_memory_are_bool_and_reach_the_hasher_as_float(tmp_path: Path) -> None:
    pool = pool_of(tmp_path)
    chosen = protocol_split(pool.labels, SplitProtocol(2, None, "last", ""), SplitOptions(), NAMES)
    for memory in (0, 1 << 20):
        data = make_data("x", pool, chosen, ImageOptions(8, memory=memory), TextOptions(True), "")
        text = data.train.batch(torch.arange(7)).inputs["text"]
        assert text.dtype == torch.float32
        assert torch.equal(text, torch.eye(7))  # each item has a word of its own
        assert "2 of 2 caption words of query and database" not in data.note
        assert "2 of 9 caption words of query and database are outside the vocabulary of 7" in data.note


def test_stop_words_are_neither_counted_nor_missed() -> None:
    texts = ["the cat and the dog", "the bird"]
    words = Vocabulary.fit(texts, 10, without={"the", "and"})
    assert words.words == ("bird", "cat", "dog")
    assert words.unseen(["the fish and the cat"], {"the", "and"}) == (1, 2)
    assert words.unseen(["the fish and the cat"]) == (4, 5)


def test_records_of_options_are_flat_to_recipes() -> None:
    """A reader takes the fields of its records by name; what it has no use for is no option of it."""
    reader = card("data", "mirflickr").make
    options = {name: option.default for name, option in inspect.signature(reader).parameters.items()}
    assert options["split"] == "sfcl"
    assert (options["size"], options["texts"], options["max_length"]) == (64, True, 64)
    assert not {"splits", "image", "text", "caption", "vocabulary"} & set(options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'caption'"):
        reader(caption="all")
    with pytest.raises(KeyError, match="takes no 'sise'; did you mean 'size'"):
        load_data("mirflickr", sise=3)
    with pytest.raises(
        ValueError, match="fit of data 'mirflickr' must be 'crop', 'stretch' or 'pad', got 'cut'"
    ):
        load_data("mirflickr", fit="cut")
