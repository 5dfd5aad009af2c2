"""Every failure as an answer: the status of `python_backends.errors`, the body in OpenAI's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from python_backends.errors import OverloadedError, RateLimitedError, ServerUnavailableError, WiCoreError

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client went away."""
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    431: "headers_too_large",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


def body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An `ErrorBody` as JSON."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: WiCoreError) -> dict[str, Any]:
    """An error of the tree as JSON."""
    return body(error.http_status, error.message, error.code)


def response(error: WiCoreError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for an error of the tree; with ``Retry-After`` where trying again may help."""
    found = dict(headers or {})
    if isinstance(error, RateLimitedError):
        found["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, OverloadedError | ServerUnavailableError):
        found["Retry-After"] = "1"
    if error.http_status == 401:
        found["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), error.http_status, found)


def plain_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for what HTTP itself has a status for."""
    code = _CODES.get(status, "server_error" if status >= 500 else "invalid_request")
    return JSONResponse(body(status, message, code), status, dict(headers or {}))


async def on_wicore_error(_: Request, error: Exception) -> JSONResponse:
    """Handler for `WiCoreError`."""
    assert isinstance(error, WiCoreError)
    return response(error)


async def on_http_exception(_: Request, error: Exception) -> JSONResponse:
    """Handler for the framework's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    return plain_response(error.status_code, str(error.detail), error.headers)


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Handler for bodies that are no JSON (400) or not of the documented shape (422)."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON at character {first['loc'][-1]}: {first['ctx']['error']}"
        return JSONResponse(body(400, message, "invalid_json"), 400)
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    if first["type"] == "extra_forbidden":
        return JSONResponse(body(422, f"{where} is not a parameter of this endpoint", "unknown_parameter", where), 422)
    return JSONResponse(body(422, f"{where}: {first['msg']}", "invalid_type", where), 422)
