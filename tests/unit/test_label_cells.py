"""Labels of a manifest in the notations that people and programs write: one relevance, or one line."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.core.labels import relevant
from robusthash.data import load_data
from robusthash.data.label_cells import caption_texts, label_rows

NAMES = ("cat", "dog", "car")
ROWS = [[int(i % 3 == n or (i % 4 == 0 and (i + 1) % 3 == n)) for n in range(3)] for i in range(12)]
TRUTH = relevant(torch.tensor(ROWS), torch.tensor(ROWS))


def own(row: list[int]) -> list[str]:
    return [name for name, has in zip(NAMES, row, strict=True) if has]


def places(row: list[int]) -> list[int]:
    return [n for n, has in enumerate(row) if has]


def shuffled(row: list[int]) -> list[str]:
    return random.Random(str(row)).sample(own(row), sum(row))


READ: dict[str, Callable[[list[int]], Any]] = {
    "names.jsonl": own,
    "places.jsonl": places,
    "whole floats.jsonl": lambda row: [float(place) for place in places(row)],
    "vectors.jsonl": lambda row: row,
    "vectors of floats.jsonl": lambda row: [float(bit) for bit in row],
    "vectors of truth.jsonl": lambda row: [bool(bit) for bit in row],
    "vectors of texts.jsonl": lambda row: [str(bit) for bit in row],
    "by name.jsonl": lambda row: dict(zip(NAMES, row, strict=True)),
    "semicolons.csv": lambda row: ";".join(own(row)),
    "places.csv": lambda row: ";".join(map(str, places(row))),
    "vectors, spaces.csv": lambda row: " ".join(map(str, row)),
    "vectors, semicolons.csv": lambda row: ";".join(map(str, row)),
    "vectors, brackets.csv": str,
    "vectors, numpy.csv": lambda row: str(np.array(row, dtype=float)),
    "vectors, truth.csv": lambda row: str([bool(bit) for bit in row]),
    "lists.csv": lambda row: str(own(row)),
    "lists of json.csv": lambda row: json.dumps(own(row)),
    "tuples.csv": lambda row: str(tuple(own(row))),
    "by name.csv": lambda row: str(dict(zip(NAMES, row, strict=True))),
}
REFUSED: dict[str, Callable[[list[int]], Any]] = {
    "commas.csv": lambda row: ", ".join(shuffled(row)),
    "pipes.csv": lambda row: "|".join(own(row)),
    "no quotes.csv": lambda row: f"[{' '.join(own(row))}]",
    "numbers, spaces.csv": lambda row: " ".join(str(10 + place) for place in places(row)),
    "scores.jsonl": lambda row: [0.5 * bit for bit in row],
    "scores by name.jsonl": lambda row: {name: 0.5 * bit for name, bit in zip(NAMES, row, strict=True)},
    "other lengths.jsonl": lambda row: [*row[: 3 - row[-1]], 1, 1],
    "nested.jsonl": lambda row: [own(row)],
    "truth.jsonl": lambda row: bool(row[0]),
    "truth.csv": lambda row: str(bool(row[0])),
}


def write(folder: Path, name: str, make: Callable[[list[int]], Any]) -> Path:
    """A manifest of twelve pictures whose labels are written by ``make``."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(ROWS), 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [
        {"file": f"{n}.png", "labels": make(row), "split": "test" if n % 3 == 0 else "train"}
        for n, row in enumerate(ROWS)
    ]
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", READ)
def test_every_notation_gives_one_relevance(name: str, tmp_path: Path) -> None:
    data = load_data("folder", root=tmp_path, manifest=write(tmp_path, name, READ[name]), size=8)
    assert len(data.label_names) == 3
    assert data.query.labels is not None
    assert data.database.labels is not None
    asked, searched = data.query.rows, data.database.rows
    assert torch.equal(relevant(data.query.labels, data.database.labels), TRUTH[asked][:, searched])
    assert ("3 places of 0/1 vectors" in data.note) == name.startswith("vectors")


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_mean_something_else_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'labels', line \d+: .+; .+") as caught:
        load_data("folder", root=tmp_path, manifest=write(tmp_path, name, REFUSED[name]), size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", [",", "|"])
def test_the_remedies_of_a_refused_cell_work(mark: str) -> None:
    cell = f"tench{mark} Tinca tinca"
    with pytest.raises(ValueError, match="end the cell with"):
        label_rows([(2, cell)], "m.csv")
    assert label_rows([(2, f"{cell};")], "m.csv")[0] == [(cell,)]
    assert label_rows([(2, [cell])], "m.jsonl")[0] == [(cell,)]
    assert label_rows([(2, cell.replace(mark, ";"))], "m.csv")[0] == [("Tinca tinca", "tench")]


def test_missing_values() -> None:
    assert label_rows([(1, None), (2, float("nan")), (3, ""), (4, []), (5, "a")], "m")[0] == [
        *[()] * 4,
        ("a",),
    ]
    assert label_rows([(1, None), (2, [0, 1]), (3, []), (4, [0, 0])], "m")[0] == [(), ("1",), (), ()]
    for value in ("None", "nan", "NULL", "<NA>", ["a", None], ["a", float("nan")], "a;None"):
        with pytest.raises(ValueError, match=r"line 2: .*looks like a missing value; leave the cell"):
            label_rows([(1, "a"), (2, value)], "m")


@pytest.mark.parametrize(("one", "other"), [("7", "007"), ("1", "1.0"), (1, "1."), ([2, 3], "02"), (0, "-0")])
def test_one_number_in_two_notations(one: Any, other: Any) -> None:
    assert label_rows([(1, other), (2, other)], "m")[0][0] == (str(other),)  # alone it is a name as written
    with pytest.raises(ValueError, match=r"\(line 4\) and .* \(line 9\) are one number in two notations"):
        label_rows([(4, one), (9, other)], "m")


def test_numbers_words_and_names_with_marks_stay_what_they_are() -> None:
    values = ["007", "no", "on", "golden retriever", "bird (small)", "0", "3.5", "1e3", "R&B / soul"]
    assert label_rows(list(enumerate(values)), "m")[0] == [(value,) for value in values]
    assert label_rows([(1, 0), (2, 1.0), (3, 2), (4, -3)], "m")[0] == [("0",), ("1",), ("2",), ("-3",)]


@pytest.mark.parametrize(
    "deep", ["[" * 9000 + "]" * 9000, "{" * 300 + "}" * 300, "[__import__('os')]", "{[1]: 2}"]
)
def test_hostile_cells_are_one_line(deep: str) -> None:
    with pytest.raises(ValueError, match="may be several labels"):
        label_rows([(2, deep)], "m.csv")


def test_captions() -> None:
    assert caption_texts("['a cat', 'two']") == caption_texts(["a cat", " two "]) == ("a cat", "two")
    assert caption_texts("[a cat] sits") == ("[a cat] sits",)
    assert caption_texts(float("nan")) == caption_texts(None) == caption_texts(["", None]) == ()


def test_columns_and_keys_that_are_there_twice(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("file,labels,labels\na.png,cat,dog\n")
    (tmp_path / "two.jsonl").write_text('{"file": "a.png", "labels": "cat", "labels": "dog"}\n')
    with pytest.raises(ValueError, match="two columns 'labels'; join them into one"):
        load_data("folder", root=tmp_path, manifest=tmp_path / "two.csv")
    with pytest.raises(ValueError, match="line 1 is not JSON: the key 'labels' is there twice"):
        load_data("folder", root=tmp_path, manifest=tmp_path / "two.jsonl")
