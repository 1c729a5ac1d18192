"""The service's parts against attacked queries: the purifier, coarse answers, detection, code agreement."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from service_parts import CONFIG, index, listening, parts, picture

from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.index_run import build_index
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.service.api import create_app
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.serving import read_settings
from robusthash.apps.service.settings import ServiceSettings
from robusthash.apps.service.tokens import Token, TokenFile

__all__ = ["index", "parts"]  # fixtures
SCOPES_OF = {"shop": ["read"], "auditor": ["read", "audit"], "nothing": ["audit"]}


def client_of(run: Path, index: Path, tokens: tuple[Token, ...] = (), **settings: Any) -> TestClient:
    given = ServiceSettings(rate=0, max_wait=60_000, near_delay=0, **settings)
    service = SearchService(run, f"file:{index}", given, None, "cpu")
    return TestClient(create_app(service, tokens), raise_server_exceptions=False)


def search(client: TestClient, content: bytes, token: str = "") -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return client.post("/v1/search", files={"image": ("x", content)}, headers=headers)


def noisy(seed: int) -> bytes:
    """One photograph with small noise of its own."""
    with Image.open(io.BytesIO(picture(3))) as image:
        pixels = np.asarray(image.resize((32, 32))).astype(int)
    pixels = pixels + np.random.default_rng(seed).integers(-3, 4, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def white_noise(seed: int) -> bytes:
    """Pixels that a JPEG file does not hold."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_queries_pass_the_purifier_and_items_only_where_the_run_says_so(tmp_path, parts) -> None:
    hasher = {**CONFIG["hasher"], "purifiers": {"image": "spectral-gate"}, "sides": "query"}
    run = train(make_config({**CONFIG, "hasher": hasher}), tmp_path / "runs").path
    build_index(tmp_path / "index", run, parts[1])
    service = SearchService(run, f"file:{tmp_path / 'index'}", ServiceSettings(), None, "cpu")
    passed = []
    purifier = service.model.hasher.purifiers["image"]
    purifier.register_forward_hook(lambda *_: passed.append(1))
    with TestClient(create_app(service)) as client:
        assert client.get("/v1/info").json()["purified"] is True
        assert search(client, picture(3)).status_code == 200
        assert len(passed) == 1
        assert client.post("/v1/items", files=[("image", ("x", picture(30)))]).status_code == 201
        assert len(passed) == 1


def test_coarse_answers_are_not_ordered_within_a_step(parts, index) -> None:
    with client_of(parts[0], index, answer="coarse", step=8) as client:
        hits = search(client, picture(0)).json()["results"]
    pairs = [(hit["distance"], hit["id"]) for hit in hits]
    assert pairs == sorted(pairs)
    assert len({distance for distance, _ in pairs}) < len(pairs)


def test_a_client_with_many_near_duplicates_is_slowed_and_refused(parts, index) -> None:
    with client_of(parts[0], index, near_own=6) as client:
        answers = [search(client, noisy(seed)) for seed in range(8)]
        assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 2
        assert "nearly this image" in answers[-1].json()["error"]
        assert 3500 <= int(answers[-1].headers["Retry-After"]) <= 3600
        assert search(client, noisy(0)).status_code == 200, "pixels that were answered before"
        assert search(client, picture(5)).status_code == 200
        figures = client.get("/metrics").text
    assert "robusthash_slowed_total 3.0" in figures
    assert 'robusthash_refused_total{reason="near duplicates"} 2.0' in figures


def test_clients_are_told_apart_by_their_tokens(parts, index, tmp_path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    texts = [file.add(name, ["read"]) for name in ("a", "b")]
    with client_of(parts[0], index, tuple(file.tokens()), near_own=3, near_everyone=5) as client:
        first = [search(client, noisy(seed), texts[0]).status_code for seed in range(4)]
        second = [search(client, noisy(seed), texts[1]).status_code for seed in range(10, 13)]
    assert first == [200, 200, 200, 429]
    assert second == [200, 200, 429], "five of both together"


def test_detection_can_be_left_out(parts, index) -> None:
    with client_of(parts[0], index, detection=False, near_own=1) as client:
        assert {search(client, noisy(seed)).status_code for seed in range(5)} == {200}


def test_a_code_that_moves_under_harmless_changes_is_refused(parts, index) -> None:
    sent = [*(picture(seed) for seed in range(100, 105)), *map(white_noise, range(10))]
    with client_of(parts[0], index, agreement=16) as client:
        assert {search(client, each).status_code for each in sent} == {200}, "all bits may differ"
    with client_of(parts[0], index, agreement=0) as client:
        answers = [search(client, each) for each in sent]
        refused = [answer for answer in answers if answer.status_code == 422]
        figures = client.get("/metrics").text
    assert 0 < len(refused) < len(sent)
    assert "saved as JPEG" in refused[0].json()["error"]
    assert f'robusthash_refused_total{{reason="code agreement"}} {len(refused)}.0' in figures


def test_settings_of_the_guards_come_from_file_and_options(tmp_path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("near_own: 5\nagreement: 2\n")
    settings = read_settings(path, {"detection": False})
    assert (settings.near_own, settings.agreement, settings.detection) == (5, 2, False)
    assert ServiceSettings().detection
    assert ServiceSettings().agreement is None
    with pytest.raises(ValueError, match="near_own"):
        read_settings(None, {"near_own": 0})


def test_an_audit_with_its_scope_passes_the_guards(parts, index: Path, tmp_path: Path) -> None:
    held = TokenFile(tmp_path / "tokens.json")
    texts = {name: held.add(name, scopes) for name, scopes in SCOPES_OF.items()}
    with client_of(parts[0], index, tuple(held.tokens()), near_own=3, agreement=0) as client:
        assert [search(client, noisy(n), texts["auditor"]).status_code for n in range(12)] == [200] * 12
        assert 429 in [search(client, noisy(n), texts["shop"]).status_code for n in range(12, 24)]
        assert search(client, picture(5), texts["nothing"]).status_code == 403
        bare = {"Authorization": f"Bearer {texts['auditor']}", "Content-Type": "image/png"}
        alone = client.post("/v1/search", content=picture(3), headers=bare)
        assert alone.json() == search(client, picture(3), texts["auditor"]).json()
        assert alone.json()["results"][0]["distance"] == 0


@pytest.mark.parametrize("answer", ["ids", "codes"])
def test_a_running_service_is_audited(parts, index: Path, tmp_path: Path, call, answer: str) -> None:
    held = TokenFile(tmp_path / "tokens.json")
    texts = {name: held.add(name, scopes) for name, scopes in SCOPES_OF.items()}
    settings = ServiceSettings(rate=0, max_wait=60_000, answer=answer, near_own=3)
    service = SearchService(parts[0], f"file:{index}", settings, None, "cpu")
    with listening(create_app(service, held.tokens())) as (url, _):
        command = ["audit", f"{url}/v1/search", "--photos", parts[1], "--size", "32", "--tier", "smoke"]
        command += ["--attacked", "1", "--rate", "1000", "--out", tmp_path / "audit", "--json"]
        code, _, errors = call(*command, "--header", f"Authorization: Bearer {texts['shop']}")
        assert code == 1
        assert "token new auditor --scopes read,audit" in errors
        code, out, errors = call(*command, "--header", f"Authorization: Bearer {texts['auditor']}")
    assert code == 0, errors
    summary = json.loads(out)
    first = {row["name"]: row["first"] for row in summary["rows"]}
    if answer == "ids":
        assert first["unchanged"] == 1.0
    else:
        direct = ["audit", parts[0], *command[2:4], "--tier", "smoke", "--attacked", "1"]
        rows = json.loads(call(*direct, "--out", tmp_path / "direct", "--json")[1])["rows"]
        assert [first[row["name"]] for row in rows[:9]] == [row["first"] for row in rows[:9]]
    assert any(row["name"].startswith("square") for row in summary["rows"])
    assert (summary["bits"] == 16) == (answer == "codes")
