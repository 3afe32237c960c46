"""JSON bodies: their size, their depth, their numbers. Knows no endpoint."""

import json
from typing import Any

from starlette.requests import Request

from .problems import ApiError

MAX_DEPTH = 64


async def read_body(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object a client sent. Raises ApiError 413 for more than `limit` bytes, 400 for anything else."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    data = bytearray()
    async for part in request.stream():
        if len(data) + len(part) > limit:
            raise _too_large(limit)
        data += part
    return parse_object(bytes(data))


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object of sane depth with finite numbers. Raises ApiError."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as err:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep") from err
    except ValueError as err:  # not JSON, not UTF-8, a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {err!s:.200}") from err
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(value).__name__}")
    if _deeper_than(value, MAX_DEPTH):
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep")
    return value


def _too_large(limit: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot go on.
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _deeper_than(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
