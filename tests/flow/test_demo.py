"""The demo at a small scale: the whole story, stopped on the way and called again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.demo_run import EPS, run_demo, summary_rows
from robusthash.apps.experiment.run_directory import load_run
from robusthash.index import open_index

from .test_report import check_self_contained

SMALL = (
    *("data.size=32", "data.train=160", "data.query=40", "data.database=200"),
    *("hasher.image.width=8", "training.epochs=2", "evaluation.batch_size=20"),
    *(f"evaluation.attacks.{number}.steps=2" for number in range(5)),
)
ATTACKS = ("mainstay", "hag", "cgat", "guided-apgd", "mainstay-targeted")


class Stopped(Exception):
    """Somebody pressed Ctrl-C."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, summary, progress texts of the second call) of a demo that was stopped while the attacks
    ran."""
    out = tmp_path_factory.mktemp("demo")

    def stop(done: int, total: int, text: str) -> None:
        if text == "undefended: hag" and done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run_demo(out, stop, seed=3, sets=SMALL)
    assert not (out / "summary.json").exists()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("model.json", "0.npz")}
    assert (
        len(first) == 3
    )  # the undefended model, mainstay's first block and the first one of the attack it stopped in
    texts: list[str] = []
    summary = run_demo(out, lambda done, total, text: texts.append(text), seed=3, sets=SMALL)
    assert all(path.stat().st_mtime_ns == when for path, when in first.items()), (
        "something done was done again"
    )
    return out, summary, texts


def test_a_second_call_goes_on_where_the_first_was_stopped(
    demo: tuple[Path, dict[str, Any], list[str]],
) -> None:
    texts = demo[2]
    assert "undefended: training" not in texts
    assert "saat: training" in texts
    assert texts.index("undefended: guided-apgd") < texts.index("saat: training")


def test_the_summary_holds_every_number_under_plain_names(
    demo: tuple[Path, dict[str, Any], list[str]],
) -> None:
    out, returned, _ = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    for model in ("undefended", "saat"):
        for name in ("clean", *ATTACKS, "worst"):
            value = summary[f"{model}.{name}.map"]
            assert 0 <= value <= 1
            assert value == summary[model][name]["map"]
            low, high = summary[model][name]["map-interval"]
            assert low - 1e-9 <= value <= high + 1e-9
        assert "t-map" in summary[model]["mainstay-targeted"]
        untargeted = [summary[f"{model}.{name}.map"] for name in ("clean", *ATTACKS[:4])]
        assert summary[f"{model}.worst.map"] <= min(untargeted) + 1e-9
        curve = summary["curve"][model]["map"]
        assert len(curve) == len(EPS)
        assert curve == sorted(curve, reverse=True)
        assert curve[0] == pytest.approx(
            summary[f"{model}.clean.map"]
        )  # the curve's 40 queries are all there are
    assert summary["seeds"] == {"training": 3, "evaluation": 3}
    assert summary["data"]["name"] == "photos"
    assert summary["data"]["sizes"] == {"train": 160, "query": 40, "database": 200}
    assert {"robusthash", "torch", "numpy", "python"} <= set(summary["versions"])
    assert summary["checks"]["undefended worst / clean"] == pytest.approx(
        summary["undefended.worst.map"] / summary["undefended.clean.map"]
    )


def test_the_report_shows_four_searches_and_the_numbers(demo: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, summary, _ = demo
    page = check_self_contained((out / "report.html").read_text(encoding="utf-8"))
    images = [attributes for name, attributes in page.tags if name == "img"]
    assert len(images) == 5 + 4 * (1 + 8)  # query, two attacked, two changes; four searches of eight results
    assert all(image["alt"] for image in images)
    hits = [attributes["class"] for name, attributes in page.tags if name == "li" and "class" in attributes]
    assert len(hits) == 32
    assert set(hits) <= {"yes", "no"}
    for model in ("undefended", "saat"):
        for name in ("clean", "mainstay", "worst"):
            assert f"{summary[f'{model}.{name}.map']:.3f}" in page.words
    assert summary["example"]["rule"] in page.words
    assert all(line in page.words for line in summary["commands"])
    assert sum(name == "svg" and attributes.get("role") == "img" for name, attributes in page.tags) == 3


def test_the_pictures_are_what_the_index_answers(demo: tuple[Path, dict[str, Any], list[str]]) -> None:
    summary = demo[1]
    for model in ("undefended", "saat"):
        run = load_run(summary["runs"][model])
        with open_index(f"file:{run.path / 'index'}", create=False) as index:
            assert index.count() == 200
            assert index.info()["origin"] == run.card()["digest"]
            assert index.payload([0]) == [{"photograph": "astronaut"}]
        ap = summary["example"]["ap"]
        assert ap[f"{model}.attacked"] <= 1
        clean = json.loads((run.path / "curve.json").read_text())
        assert set(clean["ap"]) == {str(eps) for eps in EPS if eps not in (0, 8)}


def test_the_written_recipes_name_the_same_runs(demo: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, summary, _ = demo
    for model in ("undefended", "saat"):
        recipe = out / "recipes" / f"demo-{model}.yaml"
        run, _ = training_stages.prepare(load_config(recipe), out / "runs", base=recipe.parent)
        assert run.path == Path(summary["runs"][model])
        assert run.trained


def test_the_short_table_has_a_row_for_each_attack(demo: tuple[Path, dict[str, Any], list[str]]) -> None:
    columns, rows = summary_rows(demo[1])
    assert columns == ["", "undefended", "SAAT"]
    assert [row[0] for row in rows] == [
        *("clean", "mainstay", "hag", "cgat", "guided-apgd"),
        *(
            "mainstay-targeted, own labels",
            "mainstay-targeted, target labels",
            "worst case per query",
            "chance",
        ),
    ]
    assert all(math.isfinite(value) for row in rows for value in row[1:])
