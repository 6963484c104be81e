"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fastapi.responses import Response
from starlette.exceptions import HTTPException

from trimtab.errors import AdapterError
from trimtab.serve.engine import BadRequest, QueueFull, QueueTimeout, StepFailed, Unavailable
from trimtab.serve.registry import NameTaken, UnknownAdapter

_CODES = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        code: what programs tell errors apart by.
        param: the field that is wrong.
        retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.code, self.param = code or _CODES.get(status), param
        if retry_after is not None:
            self.headers = {"Retry-After": str(math.ceil(retry_after))}

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        message = self.detail[:2000]  # it may quote what was sent
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        text = json.dumps(self.body())  # as ASCII: what was sent, and is quoted, need not be Unicode
        return Response(text, self.status_code, self.headers, "application/json")


def of_http(error: HTTPException) -> ApiError:
    """What routing itself raises: no such route, or not by this method."""
    if isinstance(error, ApiError):
        return error
    made = ApiError(error.status_code, str(error.detail))
    made.headers = error.headers
    return made


def of_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, of what pydantic found."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}.", "invalid_json")
    if len(first["loc"]) < 2 and "ctx" not in first:
        return ApiError(400, "the body must be a JSON object, sent as application/json.", "invalid_json")
    alike = [error for error in errors if error["loc"][:2] == first["loc"][:2]]  # several where types are alternatives
    place = [str(parts[0]) for parts in zip(*(e["loc"][1:] for e in alike), strict=False) if len(set(parts)) == 1]
    param = ".".join([*place, *filter(None, [first.get("ctx", {}).get("param")])]).removesuffix(".[key]")
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    codes["unsupported_parameter"] = "unsupported_parameter"
    said = "; or ".join(dict.fromkeys(error["msg"] for error in alike))
    said += "" if said.endswith("?") else "."
    return ApiError(400, f"{param[:200]}: {said}", codes.get(first["type"], "invalid_value"), param[:200])


def of_engine(error: Exception, named: str = "model", found: str = "model") -> ApiError:
    """What the engine or the registry raises, or says at the end of a request.

    Args:
        named, found: the fields that an adapter's name and where it is came from.
    """
    said = str(error)
    match error:
        case BadRequest():
            return ApiError(400, said, "invalid_value", error.field)
        case QueueTimeout():
            return ApiError(503, said, "queue_timeout", retry_after=error.retry_after)
        case QueueFull():
            return ApiError(429, said, "queue_full", retry_after=error.retry_after)
        case Unavailable():
            return ApiError(503, said, "unavailable", retry_after=5)
        case StepFailed():
            return ApiError(500, said, "step_failed")
        case UnknownAdapter():
            return ApiError(404, f"there is no model {said!r}.", "model_not_found", named)
        case NameTaken():
            return ApiError(400, said, "name_taken", named)
        case AdapterError():
            return ApiError(400, said, "invalid_adapter", found)
        case _:
            return ApiError(500, "internal error", "internal_error")
