"""A model with its adapters, opened and served on a port until a signal ends it.

service = open_service(Settings("models/tiny-llama", {"emoji": Path("runs/emoji")}))
run(create_app(service, Access()), service.engine, "127.0.0.1", 8000)
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from trimtab.adapter.identity import base_digest
from trimtab.runs.models import ModelSource, load_model, load_tokenizer
from trimtab.serve.engine import Engine
from trimtab.serve.guard import Access
from trimtab.serve.registry import Registry, places_in
from trimtab.serve.rows import Limits
from trimtab.serve.service import Service
from trimtab.serve.slots import SlotsEngine
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.sites import find_sites


@dataclass(frozen=True)
class Settings:
    """What is served."""

    model: str
    """A folder, or a name on the Hub."""
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    """Folders by name, from anywhere."""
    folder: Path | None = None
    """Of further adapters, each by its folder's name; what is loaded while the server runs is from below it too."""
    name: str | None = None
    """That clients call the base model; by default the last part of `model`'s path, or its name on the Hub."""
    dtype: str = "auto"
    sites: Sequence[str] = ("block",)
    """What adapters may edit, as `ReftConfig.site` says it."""
    max_rank: int = 16
    """Of an adapter's edit at most."""
    resident: int = 64
    """Adapters on the device at a time, one in use by requests each."""
    takes_adapters: bool = False
    """Whether a request may bring one."""
    limits: Limits = field(default_factory=Limits)
    any_base: bool = False
    """Whether adapters made on other weights are served."""


MakeEngine = Callable[[Settings, Any, Layout, Any], Engine]
"""Of the settings, transformers' model, the table's layout and the tokenizer; not started."""


def _slots(settings: Settings, model: Any, layout: Layout, tokenizer: Any) -> Engine:
    return SlotsEngine(model, AdapterTable(layout, settings.resident, model.device), tokenizer, settings.limits)


def open_service(settings: Settings, make_engine: MakeEngine = _slots) -> Service:
    """Load the model and the adapters named, and start the engine.

    Raises:
        ValueError: one of them cannot be loaded or served; says which and why.
    """
    base = settings.name or (Path(settings.model).resolve().name if Path(settings.model).is_dir() else settings.model)
    model, tokenizer = load_model(ModelSource(settings.model, settings.dtype)), load_tokenizer(settings.model)
    layout = Layout([found for site in settings.sites for found in find_sites(model, site, "all")], settings.max_rank)

    digest = None if settings.any_base else base_digest(model)
    registry = Registry(layout, settings.folder, reserved=[base], meant=places_in(model, layout), base=digest)
    for name, folder in settings.adapters.items():
        registry.add(name, folder)
    engine = make_engine(settings, model, layout, tokenizer)
    engine.start()
    return Service(engine, registry, tokenizer, base, settings.takes_adapters)


def check_exposure(host: str, access: Access) -> None:
    """Whether who may connect is limited by a key or to this machine.

    Raises:
        ValueError: by neither.
    """
    if not access.keys and not _is_loopback(host):
        raise ValueError(f"--host {host} lets other machines connect: give --api-key, or leave the host at 127.0.0.1.")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """Drains at the first signal: new requests get 503, those there have `grace` seconds. A second ends it at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self._draining: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            os._exit(128 + sig)
        self._draining = threading.Thread(target=self._drain, name="drain", daemon=True)
        self._draining.start()

    def _drain(self) -> None:
        self.engine.close(self.grace)
        self.should_exit = True


def run(app: Any, engine: Engine, host: str, port: int, grace: float = 30) -> None:
    """Serve until SIGTERM or SIGINT, and close the engine."""
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than clients and proxies keep idle connections, so that they close them
        timeout_graceful_shutdown=5,
    )
    try:
        Server(config, engine, grace).run()
    finally:
        engine.close()
