"""Answers to errors: one line of JSON each, none with a path or a trace."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from robusthash.apps.service.guard import Refused
from robusthash.apps.service.search_service import OWN_FILE, NoItem, RefusedFormat
from robusthash.core.limited_files import shortened
from robusthash.data.image_files import ImageTooLarge, UnreadableImage
from robusthash.index.index_address import ServerRefused
from robusthash.index.payload_filter import UnknownKey
from robusthash.index.sqlite_file import DamagedIndex

logger = logging.getLogger("robusthash.service")
_RETRY = 5  # seconds after which a client may ask an index again that did not answer


def answer_errors(app: FastAPI) -> None:
    """Every expected error as one line of JSON; none names a path or a trace."""

    def answer(status: int) -> Callable[[Request, Any], Any]:
        async def handle(request: Request, error: Any) -> JSONResponse:
            return Refused(status, shortened(str(error), 1000)).response()

        return handle

    async def unanswered(request: Request, error: Any) -> JSONResponse:
        log_index(request, error)
        return Refused(503, "the index does not answer; try again later", _RETRY).response()

    async def failed(request: Request, error: Any) -> JSONResponse:
        request_id = log_index(request, error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return Refused(507, "the disk of the index is full; nothing was written").response()
        message = f"the index cannot be read or written; the log has request {request_id}"
        return Refused(503, message, _RETRY).response()

    async def unknown(request: Request, error: Any) -> JSONResponse:  # names no keys of others' items
        text = shortened(f"where: no item has the payload key {error.key!r}", 200)
        return Refused(422, f"{text}; {OWN_FILE}" if error.key == "file" else text).response()

    async def too_large(request: Request, error: Any) -> JSONResponse:  # its remedy is the operator's
        return Refused(413, f"{str(error).partition(';')[0]}; send a smaller one").response()

    async def missing(request: Request, error: Any) -> JSONResponse:
        number, *reason = error.args
        return Refused(404, *reason or [f"there is no item {number}"]).response()

    async def malformed(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return Refused(422, f"{where}: {first['msg'].removeprefix('Value error, ')}").response()

    async def http(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    for kind, status in (
        (RefusedFormat, 415),
        (UnreadableImage, 422),
        (ValueError, 422),
    ):
        app.add_exception_handler(kind, answer(status))
    for gone in (ConnectionError, TimeoutError, ServerRefused):  # the server of the index
        app.add_exception_handler(gone, unanswered)
    for fault in (OSError, DamagedIndex):
        app.add_exception_handler(fault, failed)
    app.add_exception_handler(UnknownKey, unknown)
    app.add_exception_handler(ImageTooLarge, too_large)
    app.add_exception_handler(NoItem, missing)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Refused, lambda request, error: error.response())


def log_index(request: Request, error: Exception) -> str:
    """Log a fault of the index; returns the id of the request."""
    request_id = str(request.state.request_id)
    text = shortened(f"{type(error).__name__}: {error}", 1000)
    logger.error(json.dumps({"request": request_id, "index": text}))
    return request_id
