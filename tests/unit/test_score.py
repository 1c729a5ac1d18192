"""Codes of other programs: every accepted form gives the same values; every malformed file says what to
do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robusthash.metrics.code_scoring import read_codes, score
from robusthash.metrics.comparison import compare
from robusthash.metrics.protocol import Protocol, measure
from robusthash.metrics.results import EvalResult

QUERIES, ITEMS, BITS = 20, 150, 12


def arrays(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {
        side: (random.integers(0, 2, (count, BITS)), random.integers(0, 4, count))
        for side, count in (("query", QUERIES), ("database", ITEMS))
    }


def save(path: Path, **content: object) -> Path:
    np.savez(path, **content)  # type: ignore[arg-type]
    return path


def scored(folder: Path, form: str) -> EvalResult:
    files = []
    for side, (bits, classes) in arrays().items():
        codes = {
            "0/1": bits,
            "bool": bits.astype(bool),
            "float -1/+1": bits * 2.0 - 1,
            "int8 -1/+1": (bits * 2 - 1).astype(np.int8),
            "uint8 0/1": bits.astype(np.uint8),
            "uint8 0/1 with bits": bits.astype(np.uint8),
            "packed": np.packbits(bits.astype(np.uint8), axis=1),
            "multi-hot": bits,
        }[form]
        labels = np.eye(4)[classes] if form == "multi-hot" else classes
        more = {"bits": BITS} if form in ("packed", "uint8 0/1 with bits") else {}
        files.append(read_codes(save(folder / f"{side}.npz", codes=codes, labels=labels, **more)))
    return score(files[0], files[1])


FORMS = (
    "0/1",
    "bool",
    "float -1/+1",
    "int8 -1/+1",
    "uint8 0/1",
    "uint8 0/1 with bits",
    "packed",
    "multi-hot",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_codes_gives_the_same_values(form: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain, made = scored(tmp_path / "plain", "0/1"), scored(tmp_path, form)
    assert made.values == plain.values
    assert made.interval["MAP"] == plain.interval["MAP"]
    assert made.interval["MAP"][0] < made["MAP"] < made.interval["MAP"][1]
    if form != "multi-hot":
        assert compare(plain, made)["MAP"].mean == 0


def test_scoring_files_equals_scoring_codes(tmp_path: Path) -> None:
    made = scored(tmp_path, "0/1")
    query, database = (read_codes(tmp_path / f"{side}.npz") for side in ("query", "database"))
    protocol = Protocol("own", ("MAP", "P@10"))
    hot = [np.eye(4)[classes] for _, classes in arrays().values()]
    expected = measure(protocol, query.codes, torch.tensor(hot[0]), database.codes, torch.tensor(hot[1]))
    assert score(query, database, protocol).values == expected.values
    assert made["MAP"] == expected.values["MAP"]
    assert made.setting.queries == "query.npz"


def test_sparse_class_numbers_and_ids(tmp_path: Path) -> None:
    (codes, classes), (items, item_classes) = arrays().values()
    far = np.array([7, 10**9, 3, 500])
    query = read_codes(
        save(tmp_path / "q.npz", codes=codes, labels=far[classes], ids=np.arange(QUERIES) * 10)
    )
    database = read_codes(save(tmp_path / "d.npz", codes=items, labels=far[item_classes].astype(float)))
    assert score(query, database)["MAP"] == scored(tmp_path, "0/1")["MAP"]
    assert query.codes.ids.tolist() == list(range(0, QUERIES * 10, 10))


GOOD = {"codes": np.array([[0, 1, 1], [1, 0, 0]]), "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": None}, r"key 'codes' is missing \(found: labels\)"),
        ({"labels": None}, r"key 'labels' is missing"),
        ({"codes": np.array([[0, 2, 1], [1, 0, 0]])}, r"'codes' must be all -1/\+1.*such as 2; binarise"),
        ({"codes": np.array([[0.3, -0.8, 1.0], [1, -1, 1]])}, r"'codes' .*such as -0\.8; binarise"),
        ({"codes": np.array([[-1, 0, 1], [1, 0, 0]])}, r"'codes' .*-1 and 0 together"),
        ({"codes": np.array([[0, np.nan, 1], [1, 0, 0]])}, r"'codes' holds 1 NaN or infinite"),
        ({"codes": np.array([[0, np.inf, 1], [1, 0, 0]])}, r"'codes' holds 1 NaN or infinite"),
        ({"codes": np.zeros((0, 3))}, r"'codes' must be \(N, K\) with N and K above 0, got shape \(0, 3\)"),
        ({"codes": np.zeros(3)}, r"'codes' must be \(N, K\)"),
        ({"codes": np.array([["a", "b"]])}, r"'codes' has the type"),
        ({"codes": np.array([[200, 3], [4, 5]], dtype=np.uint8)}, r"looks packed.*add the key 'bits'"),
        (
            {"codes": np.array([[200], [4]], dtype=np.uint8), "bits": 12},
            r"1 bytes a row, but 12 bits are 2 bytes",
        ),
        ({"codes": np.array([[201], [4]], dtype=np.uint8), "bits": 5}, r"bits set beyond the 5"),
        ({"bits": 4}, r"'bits' is 4 but 'codes' has 3 columns"),
        ({"bits": 2.5}, r"'bits' must be one positive integer"),
        ({"bits": 0}, r"'bits' must be one positive integer"),
        ({"labels": np.array([0, 1, 2])}, r"'labels' has 3 rows and 'codes' 2"),
        ({"labels": np.array([0.5, 1])}, r"must be integer classes"),
        ({"labels": np.array([-1, 1])}, r"holds the class -1"),
        ({"labels": np.array([[0, 2], [1, 0]])}, r"must be 0 or 1 \(multi-hot\)"),
        ({"labels": np.array([[0, np.nan], [1, 0]])}, r"'labels' holds 1 NaN"),
        ({"labels": np.zeros((2, 0))}, r"'labels' must be \(N,\) classes or \(N, C\)"),
        ({"labels": np.array(["a", "b"])}, r"'labels' has the type .*np.searchsorted\(names, labels\)"),
        ({"labels": np.array([[-1, 1], [1, -1]])}, r"must be 0 or 1 \(multi-hot\); save \(labels > 0\)"),
        (
            {"labels": np.array([[0], [1]])},
            r"'labels' of shape \(2, 1\) are classes in a column, or a single",
        ),
        ({"labels": np.array([[True], [False]])}, r"save classes as labels.ravel\(\)"),
        ({"labels": np.array([{"a": 1}, None], dtype=object)}, r"cannot be read.*no object arrays"),
        ({"ids": np.array([1, 1])}, r"'ids' holds duplicates"),
        ({"ids": np.array([0.5, 1])}, r"'ids' must be 2 integers"),
    ],
)
def test_malformed_files_name_the_file_the_key_and_the_remedy(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = save(tmp_path / "codes.npz", **content)
    with pytest.raises(ValueError, match=message) as caught:
        read_codes(path)
    assert str(path) in str(caught.value)


WORDS = 64  # bits


def words(form: str, bits: np.ndarray) -> np.ndarray:
    """(N, 64) bits of 0 and 1 as other programs pack them."""
    packed = np.packbits(bits.astype(np.uint8), axis=1)
    return {
        "value - 128": (packed.astype(np.int16) - 128).astype(np.int8),
        "signed bytes": packed.view(np.int8),
        "bytes as int64": packed.astype(np.int64),
        "uint16": packed.view(np.uint16),
        "uint64": packed.view(np.uint64),
        "uint64 (N,)": packed.view(np.uint64)[:, 0],
        "int64 (N,)": packed.view(np.int64)[:, 0],
        "big-endian": packed.view(">u4").astype(np.uint32),
    }[form]


@pytest.mark.parametrize("with_bits", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        "value - 128",
        "signed bytes",
        "bytes as int64",
        "uint16",
        "uint64",
        "uint64 (N,)",
        "int64 (N,)",
        "big-endian",
    ],
)
def test_packed_codes_of_other_types_are_refused_with_a_remedy_that_works(
    form: str, with_bits: bool, tmp_path: Path
) -> None:
    if form == "bytes as int64" and not with_bits:
        pytest.skip("without bits they are any whole numbers")
    random, right, saved = np.random.default_rng(1), [], []
    for count in (QUERIES, ITEMS):
        bits, labels = random.integers(0, 2, (count, WORDS)), random.integers(0, 3, count)
        right.append(read_codes(save(tmp_path / "plain.npz", codes=bits, labels=labels)))
        codes, more = words(form, bits), {"bits": WORDS} if with_bits else {}
        with pytest.raises(ValueError, match="if they are packed codes, save") as caught:
            read_codes(save(tmp_path / "words.npz", codes=codes, labels=labels, **more))
        line = str(caught.value).split("packed codes, save ")[1].split(";")[0]
        expression, _, named = line.removesuffix(", in both files").partition(" with bits=")
        made = eval(expression, {"np": np, "codes": codes})
        size = int(named) if named else WORDS
        saved.append(read_codes(save(tmp_path / "made.npz", codes=made, labels=labels, bits=size)))
    assert score(*saved).values == score(*right).values


def test_remedies_for_labels_in_a_column_work(tmp_path: Path) -> None:
    (codes, classes), _ = arrays().values()
    plain = read_codes(save(tmp_path / "a.npz", codes=codes, labels=classes))
    column = (classes[:, None] > 1).astype(int)
    single = read_codes(save(tmp_path / "b.npz", codes=codes, labels=np.pad(column, ((0, 0), (0, 1)))))
    two = read_codes(save(tmp_path / "c.npz", codes=codes, labels=column.ravel()))
    assert score(single, single).empty == int((column == 0).sum())
    assert score(two, two).empty == score(plain, plain).empty == 0


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_codes(tmp_path / "absent.npz")
    for name, content in (("text.npz", b"hello"), ("empty.npz", b""), ("cut.npz", None)):
        path = tmp_path / name
        if content is None:
            whole = save(tmp_path / "whole.npz", **GOOD).read_bytes()
            content = whole[: len(whole) // 2]
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
            read_codes(path)
    np.save(tmp_path / "bare.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="one bare array"):
        read_codes(tmp_path / "bare.npy")


def test_two_files_that_do_not_fit(tmp_path: Path) -> None:
    plain = read_codes(save(tmp_path / "plain.npz", **GOOD))
    longer = read_codes(save(tmp_path / "longer.npz", codes=np.ones((2, 4)), labels=[0, 1]))
    with pytest.raises(ValueError, match=r"plain\.npz has codes of 3 bits and longer\.npz of 4"):
        score(plain, longer)
    hot = read_codes(save(tmp_path / "hot.npz", codes=GOOD["codes"], labels=np.eye(2)))
    with pytest.raises(ValueError, match=r"plain\.npz has integer classes \(N,\) and hot\.npz multi-hot"):
        score(plain, hot)
    wide = read_codes(save(tmp_path / "wide.npz", codes=GOOD["codes"], labels=np.eye(3)[:2]))
    with pytest.raises(ValueError, match=r"hot\.npz has 2 label columns and wide\.npz 3"):
        score(hot, wide)
    with pytest.raises(KeyError, match="no protocol is called"):
        score(plain, plain, "hause")
