"""The page of the search service in a real browser."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright
from service_parts import index, listening, parts, picture

from robusthash.apps.collection.collection_run import encode_collection
from robusthash.apps.experiment.index_run import Adding, build_index
from robusthash.apps.service.api import create_app
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.settings import ServiceSettings

__all__ = ["index", "parts"]  # fixtures
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium of the system")


@pytest.fixture
def server(parts: tuple[Path, Path], index: Path) -> Iterator[tuple[str, uvicorn.Server]]:
    with serving(parts, index) as running:
        yield running


@contextlib.contextmanager
def serving(parts: tuple[str | Path, Path], index: Path) -> Iterator[tuple[str, uvicorn.Server]]:
    settings = ServiceSettings(rate=0, max_wait=60_000, attacks=True, max_bytes=50_000)
    service = SearchService(parts[0], f"file:{index}", settings, parts[1], "cpu")
    with listening(create_app(service)) as running:
        yield running


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        yield page
        browser.close()


def test_a_visitor_searches_attacks_and_reads_the_state(server, page, tmp_path: Path) -> None:
    url, running = server
    page.goto(url)
    page.wait_for_selector("#found li")  # samples
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    file = tmp_path / "query.png"
    file.write_bytes(picture(4))
    page.set_input_files("#file", file)
    page.get_by_label("results").fill("12")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("12 results").wait_for()
    assert page.locator("#found li").count() == 12
    assert page.get_by_text("04.png, distance 0").count() == 1
    page.get_by_role("tab", name="Search").press("ArrowRight")
    page.get_by_role("button", name="Attack", exact=True).click()
    page.wait_for_selector(".model figure img")
    assert "of 16 bits flipped" in page.locator(".model").inner_text()
    page.get_by_role("tab", name="State").click()
    page.get_by_text("mean time").wait_for()
    assert page.locator("dd").first.inner_text() == "12"
    assert page.problems == []

    page.get_by_role("tab", name="Search").click()
    (tmp_path / "large.png").write_bytes(bytes(60_000))
    page.set_input_files("#file", tmp_path / "large.png")
    page.get_by_text("large.png has 60000 bytes; the service takes 50000.").wait_for()
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("the image is no JPEG, PNG, WEBP").wait_for()
    running.should_exit = True
    page.wait_for_timeout(1_500)
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("The service does not answer").wait_for()


def test_ids_of_62_bits_show_their_images(parts, index, page, tmp_path: Path) -> None:
    """Those of ``index build --codes``, which a browser's numbers do not hold."""
    run, photos = parts
    encode_collection(run, photos, tmp_path / "codes")
    adding = Adding(codes=tmp_path / "codes")
    built = build_index(tmp_path / "large", run, photos, adding=adding)
    assert built["count"] == 12
    with serving(parts, tmp_path / "large") as (url, _):
        ids = {int(one["id_text"]) for one in httpx.get(url + "/v1/samples").json()["items"]}
        assert max(ids) > 1 << 53
        page.goto(url)
        page.wait_for_selector("#found li img:not([hidden])")
        page.locator("#found li button").first.click()
        page.get_by_text("12 results").wait_for()
        page.locator("#found li img:not([hidden])").nth(11).wait_for()
        page.get_by_role("tab", name="Attack").click()
        page.get_by_role("button", name="Attack", exact=True).click()
        page.wait_for_selector(".model figure img")
        assert page.problems == []


def test_copies_are_marked(parts, page, tmp_path: Path) -> None:
    photos = parts[1]
    build_index(tmp_path / "copies", "copy-hash", photos)
    Image.open(photos / "04.png").resize((70, 52)).save(tmp_path / "copy.jpg", quality=60)
    Image.new("RGB", (90, 90), "navy").save(tmp_path / "plain.png")
    with serving(("copy-hash", photos), tmp_path / "copies") as (url, _):
        page.goto(url)
        page.get_by_text("copies differ in at most").wait_for()
        page.set_input_files("#file", tmp_path / "copy.jpg")
        page.get_by_role("button", name="Search", exact=True).click()
        page.get_by_text("12 results, 1 copy").wait_for()
        assert page.locator("#found li").first.inner_text().startswith("04.png, distance")
        assert page.locator("#found .mark").all_inner_texts() == ["✓ copy"]
        assert page.locator("#found li.relevant").count() == 1
        page.set_input_files("#file", tmp_path / "plain.png")
        page.get_by_role("button", name="Search", exact=True).click()
        page.get_by_text("one colour or one fine texture").wait_for()
        assert page.locator("#found .mark").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.problems == []
