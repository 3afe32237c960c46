"""Errors as clients of the OpenAI API expect them: a status code and {"error": {message, type, param, code}}."""

from typing import Any

from ..errors import (
    CacheFull,
    ExlError,
    OutOfMemory,
    PromptTooLong,
    TemplateError,
    TokenizerError,
    UsageError,
)

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`param`: the field of the request that is wrong; `code`: a word for programs."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object to send."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def problem_of(err: Exception) -> ApiError:
    """The answer for any exception. What is not the client's fault and not a known shortage says no details."""
    if isinstance(err, ApiError):
        return err
    if not isinstance(err, ExlError):
        return ApiError(500, "the server failed; its log says more", code="internal_error")
    message = err.problem if err.hint is None else f"{err.problem} ({err.hint})"
    if isinstance(err, PromptTooLong):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(err, UsageError | TemplateError | TokenizerError):
        return ApiError(400, message)
    if isinstance(err, CacheFull | OutOfMemory):
        return ApiError(503, message, code="overloaded", headers={"retry-after": "5"})
    return ApiError(500, message)
