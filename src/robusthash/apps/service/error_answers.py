"""Answers to errors: one line of JSON each, none with a path or a trace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from robusthash.apps.service.guard import Refused
from robusthash.apps.service.search_service import NoItem, UnwantedFormat
from robusthash.core.damaged_files import shortened
from robusthash.data.image_files import ImageTooLarge, UnreadableImage
from robusthash.index.index_address import ServerRefused

logger = logging.getLogger("robusthash.service")
_RETRY = 5  # seconds after which a client may ask an index again that did not answer


def answer_errors(app: FastAPI) -> None:
    """Every expected error as one line of JSON; none names a path or a trace."""

    def answer(status: int) -> Callable[[Request, Any], Any]:
        async def handle(request: Request, error: Any) -> JSONResponse:
            message = error.args[0] if error.args else "not found"
            return Refused(status, shortened(str(message), 1000)).response()

        return handle

    async def unanswered(request: Request, error: Any) -> JSONResponse:
        logger.error("the index: %s", shortened(str(error), 1000))
        return Refused(503, "the index does not answer; try again later", _RETRY).response()

    async def missing(request: Request, error: Any) -> JSONResponse:
        number, *reason = error.args
        return Refused(404, *reason or [f"there is no item {number}"]).response()

    async def malformed(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return Refused(422, f"{where}: {first['msg']}").response()

    async def http(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    for kind, status in (
        (UnwantedFormat, 415),
        (ImageTooLarge, 413),
        (UnreadableImage, 422),
        (ValueError, 422),
    ):
        app.add_exception_handler(kind, answer(status))
    for gone in (ConnectionError, TimeoutError, ServerRefused):  # the server of the index
        app.add_exception_handler(gone, unanswered)
    app.add_exception_handler(NoItem, missing)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Refused, lambda request, error: error.response())
