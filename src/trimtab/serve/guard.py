"""What stands before every route: hosts, keys and bodies are checked before anything is parsed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serve.errors import ApiError
from trimtab.serve.metrics import Metrics

OPEN = ("/", "/health", "/ready")
"""Paths that need no key."""
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_reft_adapter", "/v1/unload_reft_adapter")
LOOPBACK = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger(__name__)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class Access:
    """Who may do what.

    With keys, every request but those to `OPEN` needs one. Without, requests must name a loopback host, and come from
    no page of another origin: a page that a user happens to visit can reach a server on their own machine.
    """

    keys: Collection[str] = ()
    admin_key: str | None = None
    """Of the routes in `ADMIN`; it opens all others too."""
    one_tenant: bool = False
    """Whether callers of different keys share cached prefixes."""
    _known: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", tuple(map(_digest, self.keys)))

    @property
    def admin_routes(self) -> bool:
        """Whether there are any: with keys, only with an admin key too."""
        return self.admin_key is not None or not self.keys

    def check(self, path: str, headers: Headers) -> bytes:
        """The caller's tenant: requests of different tenants share no cached prefix.

        Raises:
            ApiError: the caller may not.
        """
        if not self.keys:
            _check_origin(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key if scheme.lower() == "bearer" else "")
        is_admin = self.admin_key is not None and hmac.compare_digest(given, _digest(self.admin_key))
        is_known = sum(hmac.compare_digest(given, key) for key in self._known) > 0  # each is compared
        is_admins = path in ADMIN and (self.admin_key is not None or not self.keys)
        if is_admins:
            allowed = is_admin or self.admin_key is None
        else:
            allowed = is_admin or is_known or not self.keys or path in OPEN
        if not allowed:
            which = "the admin key" if is_admins else "a key of this server"
            raise ApiError(401, f"give {which}: Authorization: Bearer KEY.", "invalid_api_key")
        return given if self.keys and not self.one_tenant else b""


def _check_origin(headers: Headers) -> None:
    host, origin = headers.get("host", ""), headers.get("origin")
    if _place(f"//{host}").hostname not in LOOPBACK:
        raise ApiError(403, f"host {host!r}: without a key this server answers to {', '.join(LOOPBACK)} only.", "host")
    if origin is not None and _place(origin).netloc != host:
        raise ApiError(403, f"origin {origin!r}: without a key other pages may not ask this server.", "origin")


def _place(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # as of "[", which is no address
        return urlsplit("")


def route_of(scope: Scope) -> str:
    """The path that routes are looked up by: below where the app is mounted, or a proxy puts it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/" if f"{path}/".startswith(f"{root}/") else path


class Guard:
    """ASGI middleware: refuses, counts, and reads the body whole.

    Args:
        body_bytes: of a request at most.
        body_seconds: that a client may take to send it.
    """

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, body_bytes: int, body_seconds: float = 30
    ) -> None:
        self.app, self.access, self.metrics = app, access, metrics
        self.body_bytes, self.body_seconds = body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = _Answer(send, headers.get("x-request-id", "")[:128] or uuid.uuid4().hex)
        try:
            scope.setdefault("state", {})["tenant"] = self.access.check(route_of(scope), headers)
            body = await self._body(receive, headers)
            await self.app(scope, _replayed(body, receive), answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if answer.status is None:
                await ApiError(500, "internal error", "internal_error").response()(scope, receive, answer)
        finally:
            self.metrics.requested(getattr(scope.get("route"), "path", "other"), answer.status)

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self.body_seconds)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.body_seconds} s.", "body_timeout") from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.body_bytes} bytes.", "body_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Says the body that was read already, then what else there is: that the client has gone."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _Answer:
    """`send` that notes the status and names the request."""

    def __init__(self, send: Send, name: str) -> None:
        self.send, self.name = send, name
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message["headers"])
            headers["x-request-id"] = self.name
            headers["x-content-type-options"] = "nosniff"
        await self.send(message)
