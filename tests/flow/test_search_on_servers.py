"""From images to answers over HTTP with the index on a real server, by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from index_servers import PASSWORD, Server
from service_parts import parts
from typer.testing import CliRunner

from robusthash.apps.cli import app
from robusthash.apps.service.api import create_app
from robusthash.apps.service.serving import Serving
from robusthash.apps.service.settings import ServiceSettings

__all__ = ["parts"]  # fixtures


def printed(*command: object) -> Any:
    """What a command prints with --json."""
    done = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert done.exit_code == 0, done.output
    assert PASSWORD not in done.output
    return json.loads(done.stdout)


def pairs(hits: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(hit["id"], hit["distance"]) for hit in hits]


@pytest.mark.parametrize("kind", ["postgresql", "milvus"])
def test_build_search_encode_and_serve(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(kind)  # skips, before anything is trained
    run, photos = request.getfixturevalue("parts")
    url, query = server.url(), photos / "03.png"
    assert printed("index", "build", url, "--run", run, "--images", photos)["added"] == 12
    assert printed("index", "build", url, "--run", run, "--images", photos)["unchanged"] == 12
    assert printed("index", "info", url)["count"] == 12
    nearest = printed("search", url, query, "--k", 3)

    printed("encode", "--images", photos, "--run", run, "--out", tmp_path / "codes")
    of_codes = server.url()
    for name in ("added", "updated"):
        done = printed("index", "build", of_codes, "--run", run, "--codes", tmp_path / "codes")
        assert (done[name], done["count"]) == (12, 12)
    others = printed("search", of_codes, query, "--k", 3)
    assert [hit["distance"] for hit in others] == [hit["distance"] for hit in nearest]

    serving = Serving.of(url, None, photos, None, ServiceSettings(rate=0, max_wait=60_000))
    with TestClient(create_app(serving.service)) as client:
        files, described = {"image": ("x", query.read_bytes())}, [{"key": "new", "payload": {"n": 1}}]
        hits = client.post("/v1/search", files=files, data={"k": 3}).json()["results"]
        assert pairs(hits) == pairs(nearest)
        for replaced in (False, True):
            answer = client.post("/v1/items", files=files, data={"items": json.dumps(described)}).json()
            assert (answer["items"][0]["id"], answer["items"][0]["replaced"]) == (12, replaced)
        assert client.post("/v1/reload").json() == {"items": 13}
        assert client.get("/v1/items/12").json()["payload"] == {"n": 1}
        assert client.request("DELETE", "/v1/items", json={"keys": ["new"]}).json() == {"removed": 1}
