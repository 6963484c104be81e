"""The HTTP server: OpenAI's routes over an engine and a registry of adapters.

service = Service(engine, registry, tokenizer, base="models/tiny-llama")
app = create_app(service, Access(keys=["..."]))
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from trimtab.errors import AdapterError
from trimtab.serve import schemas
from trimtab.serve.answers import Chat, Form, Text, Tokens, usage_of
from trimtab.serve.engine import EngineError, Event, Unavailable
from trimtab.serve.engine import Request as EngineRequest
from trimtab.serve.errors import ApiError, of_engine, of_http, of_validation
from trimtab.serve.guard import ADMIN, Access, Guard, route_of
from trimtab.serve.registry import UnknownAdapter
from trimtab.serve.service import ClientGone, Events, Service

_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""A proxy passes parts on as they come."""


async def _answer(service: Service, http: Request, form: Callable[[Any, Tokens], Form], body: Any) -> Response:
    """Whole or as a stream. What goes wrong before the first token is told by the status in both."""

    def prepared() -> tuple[Form, list[EngineRequest]]:
        made = form(body, service.tokens)
        return made, service.requests(made, http.state.tenant)

    made, requests = await run_in_threadpool(prepared)
    events = await _begun(service.events(requests, http, parts=body.stream))
    if body.stream:
        return StreamingResponse(_parts(made, events), media_type="text/event-stream", headers=_UNBUFFERED)
    found = dict([item async for item in events])
    ends = [found[i] for i in range(len(requests))]
    _check_ends(ends)
    return _json(made.whole(ends, usage_of(ends, body.n)))


async def _begun(events: Events) -> Events:
    """The same events once the first is there, so that what goes wrong before it is raised here."""
    first = await anext(events)

    async def whole() -> Events:
        async with aclosing(events):
            yield first
            async for item in events:
                yield item

    return whole()


async def _parts(form: Form, events: Events) -> AsyncGenerator[str, None]:
    """An answer as server-sent events; an error, too, is one."""
    begun, ends = set(), {}
    try:
        async with aclosing(events):
            async for index, event in events:
                yield _sse(form.part(index, event, first=index not in begun))
                begun.add(index)
                if event.finish_reason is not None:
                    ends[index] = event
        _check_ends(ends.values())
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    except ClientGone:
        return
    if form.body.stream_options.include_usage:
        yield _sse(form.end(usage_of([ends[i] for i in sorted(ends)], form.body.n)))
    yield "data: [DONE]\n\n"


def _check_ends(ends: Iterable[Event]) -> None:
    """An answer that was cut off is no answer. Raises ApiError."""
    if any(event.finish_reason == "abort" for event in ends):
        raise of_engine(Unavailable("the server is shutting down."))


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


def _sse(model: BaseModel) -> str:
    return f"data: {model.model_dump_json(exclude_unset=True)}\n\n"


# Routes.


def _service(http: Request) -> Service:
    return cast(Service, http.app.state.service)


Shared = Annotated[Service, Depends(_service)]
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
routes, admin = APIRouter(), APIRouter()


@routes.post("/v1/chat/completions", response_model=schemas.ChatCompletion, responses=_STREAM)
async def chat_completions(body: schemas.ChatRequest, http: Request, service: Shared) -> Response:
    """Answer a conversation, or continue its last message where that is the assistant's."""
    return await _answer(service, http, Chat, body)


@routes.post("/v1/completions", response_model=schemas.Completion, responses=_STREAM)
async def completions(body: schemas.CompletionRequest, http: Request, service: Shared) -> Response:
    """Continue texts, or token ids."""
    return await _answer(service, http, Text, body)


@routes.get("/v1/models")
def models(service: Shared) -> schemas.ModelList:
    """The base model, then every adapter."""
    return schemas.ModelList(data=[service.card(name) for name in (service.base, *service.registry.names())])


@routes.get("/v1/models/{name:path}")
def model(name: str, service: Shared) -> schemas.ModelCard:
    """One of them."""
    service.applied(name, 1.0)
    return service.card(name)


@routes.post("/tokenize")
def tokenize(body: schemas.TokenizeRequest, service: Shared) -> schemas.Tokenized:
    """The tokens that a completion would have as its prompt."""
    if body.model is not None:
        service.applied(body.model, 1.0)
    tokens = service.tokens.of_messages(body.messages) if body.messages else service.tokens.of_text(body.prompt or "")
    return schemas.Tokenized(count=len(tokens), max_model_len=service.engine.max_len, tokens=tokens)


@admin.post("/v1/load_reft_adapter")
@admin.post("/v1/load_lora_adapter")
def load_adapter(body: schemas.LoadAdapter, service: Shared) -> schemas.ModelCard:
    """Give a folder, or an adapter that comes along, a name; requests may use it once this returns."""
    service.load(body)
    return service.card(body.lora_name)


@admin.post("/v1/unload_reft_adapter")
@admin.post("/v1/unload_lora_adapter")
def unload_adapter(body: schemas.UnloadAdapter, service: Shared) -> schemas.Deleted:
    """Forget a name; requests that have it go on."""
    service.registry.unload(body.lora_name)
    return schemas.Deleted(id=body.lora_name)


@routes.head("/health", include_in_schema=False)
@routes.get("/health")
async def health(service: Shared) -> schemas.Health:
    """Whether the server lives; if not, start it anew."""
    if service.engine.health == "dead":
        raise ApiError(503, "the engine is dead; start the server again.", "dead")
    return schemas.Health(status=service.engine.health)


@routes.head("/ready", include_in_schema=False)
@routes.get("/ready")
async def ready(service: Shared) -> schemas.Health:
    """Whether requests are taken."""
    if service.engine.health != "ready":
        raise ApiError(503, f"the engine is {service.engine.health}.", service.engine.health, retry_after=5)
    return schemas.Health(status="ready")


@routes.get("/metrics", response_class=PlainTextResponse)
def metrics(service: Shared) -> Response:
    """Counts, in Prometheus' format."""
    return Response(service.metrics.text(), media_type="text/plain; version=1.0.0")


@routes.head("/", include_in_schema=False)
@routes.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """A page to try the model and its adapters on."""
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """The page, and a policy that lets just its own script and style run."""
    text = files("trimtab.serve").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (
        base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", text, re.S)[1].encode()).digest()).decode()  # type: ignore[index]
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def create_app(service: Service, access: Access, body_bytes: int = 4 << 20) -> FastAPI:
    """The ASGI application.

    Args:
        body_bytes: of a request at most.
    """
    app = FastAPI(
        title="trimtab",
        version=version("trimtab"),
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": schemas.ErrorBody}, "5XX": {"model": schemas.ErrorBody}},
    )
    app.state.service = service
    app.include_router(routes)
    if access.admin_routes:
        app.include_router(admin)
    app.add_middleware(Guard, access=access, metrics=service.metrics, body_bytes=body_bytes)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return of_http(error).response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(EngineError)
    @app.exception_handler(AdapterError)
    @app.exception_handler(UnknownAdapter)
    async def _engine(http: Request, error: Exception) -> Response:
        fields = ("lora_name", "lora_path") if route_of(http.scope) in ADMIN else ()
        return of_engine(error, *fields).response()

    @app.exception_handler(ClientGone)
    async def _gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the metrics do

    return app
