"""The routes of the search service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, FastAPI, File, Form, Header, Path, Query, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from torch import Tensor

from robusthash.apps.service.attacked_query import attacked_query
from robusthash.apps.service.batching import Batcher
from robusthash.apps.service.error_answers import answer_errors, log_index
from robusthash.apps.service.guard import Guard, Metrics, Refused
from robusthash.apps.service.idempotency import WriteRequest
from robusthash.apps.service.request_fields import (
    ItemId,
    described_items,
    item_key,
    mapping,
    names,
    once,
    refuse_unknown,
)
from robusthash.apps.service.search_service import NoItem, SearchService, ServedItem
from robusthash.apps.service.tokens import AcceptedTokens, Token
from robusthash.apps.service.working_parts import QueryGuards, Working
from robusthash.version import __version__

Value = TypeVar("Value")
logger = logging.getLogger("robusthash.service")
router = APIRouter(prefix="/v1", dependencies=[Depends(refuse_unknown)])

_CSP = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"


def create_app(
    service: SearchService, tokens: Sequence[Token] = (), compared: Sequence[SearchService] = ()
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        service: the search.
        tokens: that are accepted; without any, everything is open (to this machine alone).
        compared: other models over the same images, which the page's story shows next to this one.
    """
    settings, metrics = service.settings, Metrics()
    accepted = tokens if isinstance(tokens, AcceptedTokens) else AcceptedTokens(tokens)

    def encode(items: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        results: list[Tensor] = [item for _, item in items]
        for kind in dict.fromkeys(kind for kind, _ in items):
            places = [place for place, (other, _) in enumerate(items) if other == kind]
            modality = "image" if kind == "database" else kind
            codes = service.encode(modality, [items[place][1] for place in places], kind == "database")
            for place, code in zip(places, codes, strict=True):
                results[place] = code
        return results

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        wait = settings.batch_wait / 1e3
        batcher = Batcher(encode, settings.batch, wait, settings.queue, settings.max_wait / 1e3)
        threads, guards = ThreadPoolExecutor(settings.readers), QueryGuards(settings, metrics)
        working = Working(service, batcher, threads, metrics, guards, tuple(compared), accepted)
        app.state.working = working
        batcher.start()
        metrics.items.set((await working.run(service.info))["items"])
        working.ready = True
        yield
        working.ready = False
        await batcher.stop()
        working.threads.shutdown(cancel_futures=True)
        for each in (service, *compared):
            each.close()

    app = FastAPI(
        title="robusthash",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to a host that the client names
    )
    app.include_router(router)
    app.include_router(_pages)
    app.add_middleware(
        Guard,
        settings=settings,
        tokens=accepted,
        metrics=metrics,
        hasher=lambda: app.state.working.queries,
    )
    answer_errors(app)
    return app


async def _working(request: Request) -> Working:
    working: Working = request.app.state.working
    return working


Parts = Annotated[Working, Depends(_working)]

_K, _WHERE = "Number of results, 10 by default.", 'Filter as JSON, such as {"label": "cat"}.'
_FIELDS = "Payload fields to return, by commas; all by default, none where empty."


@router.post("/search")
async def search(
    request: Request,
    working: Parts,
    image: Annotated[UploadFile | None, File(description="JPEG, PNG or WEBP.")] = None,
    text: Annotated[str | None, Form(max_length=10_000, description="Instead of an image.")] = None,
    k: Annotated[int | None, Form(ge=1, description=_K)] = None,
    where: Annotated[str | None, Form(description=_WHERE)] = None,
    fields: Annotated[str | None, Form(description=_FIELDS)] = None,
    url_k: Annotated[int | None, Query(alias="k", ge=1, description=_K)] = None,
    url_where: Annotated[str | None, Query(alias="where", description=_WHERE)] = None,
    url_fields: Annotated[str | None, Query(alias="fields", description=_FIELDS)] = None,
) -> dict[str, Any]:
    """The nearest items of an image or a text; the body may be the image alone, with its type.

    ``k``, ``where`` and ``fields`` may come in the form or in the URL. Of a model that finds copies, each
    result says whether it is a ``copy``, and ``plain`` is true of an image that tells too little for that.
    """
    service = working.service
    most = once("k", k, url_k)
    k = 10 if most is None else most
    where, fields = once("where", where, url_where), once("fields", fields, url_fields)
    content = None if image is None else await image.read()
    if request.headers.get("content-type", "").lower().startswith("image/"):
        content = await request.body()
    if (content is None) == (text is None):
        raise ValueError("a search takes an image or a text: one of them")
    if k > service.settings.max_k:
        raise ValueError(f"k: at most {service.settings.max_k}, got {k}")
    allowed = mapping(where, "where")
    if fields is None and "fields" in await request.form():  # there and empty, which FastAPI takes for absent
        fields = ""
    plain = False
    if content is not None:
        audits = getattr(request.state, "audits", False)
        code, plain = await working.query_code(content, request.state.client, audits)
    else:
        code = await working.code("text", partial(service.text, str(text)))
    results = await working.run(partial(service.search, code, k, allowed, names(fields), plain))
    answer: dict[str, Any] = {"results": results}
    if service.model.radius is not None:
        answer["plain"] = plain
    if service.settings.answer == "codes":
        answer["code"] = bytes(code.tolist()).hex()
    return answer


@router.post("/items", status_code=201)
async def add_items(
    request: Request,
    working: Parts,
    image: Annotated[list[UploadFile], File(description="One or several images.")],
    items: Annotated[
        str | None, Form(description='For each image {"key": ..., "payload": {...}}, as a JSON list.')
    ] = None,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> dict[str, Any]:
    """Add images; an item of a key that is held is replaced. The answer comes when they are on disk.

    With an ``Idempotency-Key``, the same request sent twice is done once; another one of the same client
    under it is refused.
    """
    service = working.service
    if len(image) > service.settings.max_items:
        raise ValueError(f"at most {service.settings.max_items} images in a request, got {len(image)}")
    contents = [await one.read() for one in image]
    described = described_items(items, len(contents))
    write, name = None, None
    if idempotency_key is not None:
        write = WriteRequest.of(request.state.client, idempotency_key, contents, described)
        name = write.name
    keys = [item_key(one, place, name) for place, one in enumerate(described)]
    if len(set(keys)) < len(keys):
        raise ValueError("items: a key is given more than once")
    add = partial(_add, working, contents, keys, [one.get("payload", {}) for one in described])
    if write is None:
        return await add("")
    async with working.writes.alone(write):
        if (before := working.writes.answer(write)) is not None:
            return before
        held = await working.run(partial(service.held, keys))
        answer = write.answer_from(keys, held) or await add(write.stamp)
        working.writes.keep(write, answer)
        return answer


async def _add(
    working: Working, contents: list[bytes], keys: list[str], payloads: list[dict[str, Any]], stamp: str
) -> dict[str, Any]:
    """Encode images and write them."""
    service = working.service
    codes = await asyncio.gather(
        *(working.code("image", partial(service.decode, content), database=True) for content in contents)
    )
    new = [ServedItem(*one, stamp) for one in zip(codes, keys, payloads, strict=True)]
    added = await working.run(partial(service.add, new))
    await _count(working)
    return {"items": added}


@router.delete("/items")
async def remove_items(
    working: Parts,
    ids: Annotated[list[ItemId] | None, Body()] = None,
    keys: Annotated[list[str] | None, Body()] = None,
) -> dict[str, int]:
    """Remove items by their ids or keys; those that are not held are ignored."""
    if (ids is None) == (keys is None):
        raise ValueError("give ids or keys: one of them")
    removed = await working.run(partial(working.service.remove, ids, keys))
    await _count(working)
    return {"removed": removed}


@router.get("/items/{item}")
async def get_item(
    working: Parts, item: Annotated[ItemId, Path()], fields: Annotated[str | None, Query()] = None
) -> dict[str, Any]:
    """An item's payload."""
    return await working.run(partial(working.service.item, item, names(fields)))


@router.delete("/items/{item}")
async def remove_item(working: Parts, item: Annotated[ItemId, Path()]) -> dict[str, int]:
    """Remove an item."""
    if not (removed := await working.run(partial(working.service.remove, [item]))):
        raise NoItem(item)
    await _count(working)
    return {"removed": removed}


@router.get("/samples")
async def samples(working: Parts) -> dict[str, Any]:
    """Some indexed images to search with, where images are shown."""
    return {"items": await working.run(working.service.samples)}


@router.get("/items/{item}/image", response_class=FileResponse)
async def get_image(working: Parts, item: Annotated[ItemId, Path()]) -> FileResponse:
    """The image of an item, where it lies in the folder of images that the service shows.

    Its type is that of its content; a file that a browser does not show as an image is for download alone.
    """
    path, media_type = await working.run(partial(working.service.typed_picture, item))
    headers = {"Content-Security-Policy": "default-src 'none'; sandbox"}
    if media_type is None:
        headers["Content-Disposition"] = "attachment"
    return FileResponse(path, headers=headers, media_type=media_type or "application/octet-stream")


@router.post("/story")
async def story(
    working: Parts,
    image: Annotated[UploadFile | None, File()] = None,
    item: Annotated[ItemId | None, Form(description="Instead of an image, an indexed one.")] = None,
    eps: Annotated[int, Form(ge=1, le=16, description="Largest change of a pixel, of 255.")] = 8,
    k: Annotated[int, Form(ge=1, le=20)] = 8,
) -> dict[str, Any]:
    """A query, searched clean and attacked (HAG, 20 steps with the weights), in each of the models."""
    if not working.service.settings.attacks:
        raise Refused(403, "attacks are not allowed here; the operator may start the service with --attacks")
    if (image is None) == (item is None):
        raise ValueError("a story takes an image or an item: one of them")
    content = None if image is None else await image.read()
    models = (working.service, *working.compared)
    async with working.attacking:
        answers = [
            await working.run(partial(attacked_query, model, content, item, eps, k)) for model in models
        ]
    return {"eps": eps, "models": answers}


@router.get("/info")
async def info(working: Parts) -> dict[str, Any]:
    """Facts on the model and the index, and the limits of requests."""
    return {"version": __version__, **await working.run(working.service.info)}


@router.post("/reload")
async def reload(request: Request, working: Parts) -> dict[str, int]:
    """Read the token file and open the index at its address again; no request fails meanwhile.

    Where the token file cannot be read, or the index is missing or damaged, those before are served on.
    """
    try:
        await working.run(working.tokens.reload)
    except (OSError, ValueError) as error:
        logger.error("tokens not read again: %s", error)
        raise Refused(500, "the token file cannot be read; the log says why, all stays as it was") from None
    try:
        count = await working.run(working.service.reload)
    except (OSError, ValueError) as error:
        log_index(request, error)
        raise Refused(503, "the index was not opened again; the one before is still served") from None
    working.metrics.items.set(count)
    return {"items": count}


_pages = APIRouter(include_in_schema=False)


@_pages.get("/healthz", dependencies=[Depends(refuse_unknown)])
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@_pages.get("/readyz", dependencies=[Depends(refuse_unknown)])
async def readyz(request: Request) -> Response:
    """The model and the index are loaded."""
    working = getattr(request.app.state, "working", None)
    ready = working is not None and working.ready
    return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


@_pages.get("/metrics", dependencies=[Depends(refuse_unknown)])
async def metrics(working: Parts) -> Response:
    """Figures in the text form of Prometheus."""
    return Response(generate_latest(working.metrics.registry), media_type="text/plain; version=0.0.4")


@_pages.get("/")
async def page() -> Response:
    """The page."""
    return _static("index.html", "text/html; charset=utf-8")


@_pages.get("/page.{kind}")
async def part(kind: str) -> Response:
    """Script and style of the page."""
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
    if kind not in kinds:
        raise HTTPException(404, "Not Found")
    return _static(f"page.{kind}", kinds[kind])


def _static(name: str, media_type: str) -> Response:
    content = files("robusthash.apps.service").joinpath("page", name).read_bytes()
    return Response(content, media_type=media_type, headers={"Content-Security-Policy": _CSP})


async def _count(working: Working) -> None:
    working.metrics.items.set((await working.run(working.service.info))["items"])
