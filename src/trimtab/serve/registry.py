"""Names of adapters, and the adapters they stand for.

An `Adapter` never changes. A request resolves its name once and holds the object; what is loaded, replaced, unloaded or
evicted meanwhile changes what the name stands for and nothing else.

    registry = Registry(layout, Path("adapters"))       # every folder below it, found when first asked for
    registry.get("emoji"); registry.load("haiku", "haiku-v2", replace=True); registry.unload("emoji")
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adapter.config import ReftConfig
from trimtab.adapter.folder import SavedAdapter, as_edit, read_adapter, why_not_asked
from trimtab.adapter.identity import differ
from trimtab.adapter.weights import CONFIG, weights_in
from trimtab.edits import Term
from trimtab.errors import AdapterError
from trimtab.serve.table import Layout
from trimtab.where.plan import Part
from trimtab.where.positions import Positions
from trimtab.where.sites import find_sites

_NAME = re.compile(r"[^/\\\0.][^/\\\0]{0,255}")  # a plain name of a folder, none that is hidden or leads up


class UnknownAdapter(LookupError):
    """No adapter of this name."""


class NameTaken(AdapterError):
    """The name stands for an adapter already, and nobody asked to replace it."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in host memory, ready for the table."""

    name: str
    digest: bytes
    """SHA-256 of the tensors and of all else that changes the edit; never of the name."""
    positions: Positions
    parts: Mapping[Part, Tensor]
    """Vectors (size,) of the table's layout: `edit`, or `prefix` and `suffix`."""

    @property
    def nbytes(self) -> int:
        return sum(vector.nbytes for vector in self.parts.values())


@lru_cache(maxsize=1 << 16)
def _is_asked(folder: Path, changed: int) -> bool:
    """Whether prompts may be put to a folder's adapter, as its config said when it last changed."""
    return why_not_asked(folder) is None


class _Known(NamedTuple):
    digest: bytes
    folder: Path


class Registry:
    """Adapters by name. Every method may be called from any thread; those that read files take milliseconds.

    Args:
        layout: of the table that the adapters go to.
        folder: adapters may be loaded only from below it. Each folder in it that holds an adapter is known by its name.
            None: nothing can be loaded by path.
        reserved: names that no adapter may have, such as the base model's.
        memory: bytes of adapters in host memory at most; beyond it the least recently used are read again when needed.
        base: digest of the model's weights, which an adapter's must be if it has one. None: any will do.
    """

    def __init__(
        self,
        layout: Layout,
        folder: str | Path | None = None,
        reserved: Collection[str] = (),
        memory: int = 4 << 30,
        meant: Callable[[ReftConfig], Collection[str]] | None = None,
        base: str | None = None,
    ) -> None:
        self.layout, self._meant, self._base = layout, meant, base
        self.folder = Path(folder).resolve(strict=True) if folder is not None else None
        self.reserved, self.memory = frozenset(reserved), memory
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._gone: set[str] = set()  # unloaded, though their folders are there
        self._uploads: TemporaryDirectory[str] | None = None
        self._held: OrderedDict[str, Adapter] = OrderedDict()  # the least recently used first
        self._held_bytes = 0

    def names(self) -> list[str]:
        """Of all adapters loaded or to be found, sorted; not of those whose config says that they answer no prompts."""
        with self._lock:
            known, gone = set(self._known), set(self._gone)
        found = set()
        for config in self.folder.glob(f"*/{CONFIG}") if self.folder else ():
            with suppress(FileNotFoundError):  # taken away meanwhile
                if _is_asked(config.parent, config.stat().st_mtime_ns):
                    found.add(config.parent.name)
        return sorted(known | {name for name in found - gone if self._may_be_named(name)})

    def get(self, name: str) -> Adapter:
        """The adapter that `name` stands for now, read from its folder where it is not in memory.

        Raises:
            UnknownAdapter: there is none. AdapterError: its folder is damaged, or holds another adapter than it did.
        """
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            known = self._known.get(name)
        if known is not None:
            return self._again(name, known)
        if not self._is_found(name):
            raise UnknownAdapter(name)
        try:
            return self._add(name, self._below(name), found=True)
        except NameTaken:  # by another thread, which asked for it too
            return self.get(name)

    def load(self, name: str, path: str | Path, replace: bool = False) -> Adapter:
        """Read a folder below the allowed one and give it a name; requests that have what the name stood for keep it.

        Raises:
            NameTaken: the name is in use and `replace` is not set, or is reserved.
            AdapterError: the path is not below the allowed folder, or no adapter for this model and table is there.
        """
        return self.add(name, self._below(path), replace)

    def add(self, name: str, folder: str | Path, replace: bool = False) -> Adapter:
        """`load` from anywhere, at the operator's own word."""
        return self._add(name, folder, replace)

    def _add(self, name: str, folder: str | Path, replace: bool = False, found: bool = False) -> Adapter:
        """Args: found: nobody loads it, so that one that is unloaded while it is read stays so."""
        if not self._may_be_named(name):
            raise NameTaken(f"adapter name {name!r}: is reserved, or no plain name; choose another.")
        with self._lock:
            self._check_free(name, replace)
        adapter = self.read(folder, name)
        with self._lock:
            if found and name in self._gone:
                raise UnknownAdapter(name)
            self._check_free(name, replace)
            self._drop(self._known.get(name))
            self._known[name] = _Known(adapter.digest, Path(folder))
            self._gone.discard(name)
            self._hold(name, adapter)
        return adapter

    def room(self) -> Path:
        """A new folder for an adapter that has none: it goes when its name stands for it no more."""
        with self._lock:
            if self._uploads is None:
                self._uploads = TemporaryDirectory(prefix="trimtab-adapters-")
            return Path(mkdtemp(dir=self._uploads.name))

    def _drop(self, known: _Known | None) -> None:
        if known is not None and self._uploads is not None and known.folder.is_relative_to(self._uploads.name):
            shutil.rmtree(known.folder, ignore_errors=True)

    def unload(self, name: str) -> None:
        """Forget a name, until it is loaded again.

        Raises:
            UnknownAdapter: there is none.
        """
        found = self._is_found(name)
        with self._lock:
            known = self._known.pop(name, None)
            if known is None and not found:
                raise UnknownAdapter(name)
            self._drop(known)
            self._let_go(name)
            self._gone.add(name)

    def read(self, folder: str | Path, name: str = "") -> Adapter:
        """An adapter of no name in the registry.

        Raises:
            AdapterError: as `load`.
        """
        saved = read_adapter(folder)
        if differ(saved.config.base_digest, self._base):
            raise AdapterError(
                f"{folder}: was made on other weights ({saved.config.base_model_name_or_path}) than the model's here. "
                "Serve it on its own base, or start the server with --any-base."
            )
        if saved.config.modules_to_save or saved.extras:
            raise AdapterError(
                f"{folder}: holds {next(iter(saved.extras), 'modules_to_save')} beside its edits, which would change "
                "the model for every request; serve it on a model of its own."
            )
        try:
            self._check_places(saved)
            return Adapter(name, _digest(saved), saved.config.parsed_positions, _vectors(self.layout, saved))
        except (ValueError, NotImplementedError) as error:
            raise AdapterError(f"{folder}: {error}") from None

    def _check_places(self, saved: SavedAdapter) -> None:
        edited = {module for module, _ in saved.edits}
        meant = edited if self._meant is None else set(self._meant(saved.config))
        if edited != meant:
            raise ValueError(
                f"{min(edited ^ meant)} is edited by one of its two files and not by the other (the config says site "
                f"{saved.config.site}, layers {saved.config.layers}): they do not belong together. Copy both from one "
                "save."
            )

    def _again(self, name: str, known: _Known) -> Adapter:
        """What was dropped from memory."""
        adapter = self.read(known.folder, name)
        if adapter.digest != known.digest:
            raise AdapterError(
                f"{known.folder}: is another adapter than when {name!r} was loaded; load it again to replace it."
            )
        with self._lock:
            if self._known.get(name) == known:
                self._hold(name, adapter)
        return adapter

    def _hold(self, name: str, adapter: Adapter) -> None:
        self._let_go(name)
        self._held[name] = adapter
        self._held_bytes += adapter.nbytes
        while self._held_bytes > self.memory and len(self._held) > 1:
            self._let_go(next(iter(self._held)))

    def _let_go(self, name: str) -> None:
        """Of host memory, if it is there."""
        if name in self._held:
            self._held_bytes -= self._held.pop(name).nbytes

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._known and not replace:
            raise NameTaken(f"adapter {name!r} is loaded already; unload it first, or ask for it to be replaced.")

    def _may_be_named(self, name: str) -> bool:
        return bool(_NAME.fullmatch(name)) and name not in self.reserved

    def _is_found(self, name: str) -> bool:
        if self.folder is None or not self._may_be_named(name) or name in self._gone:
            return False
        return isfile(self.folder / name / CONFIG)  # unlike Path's, also of names too long for any file

    def _below(self, path: str | Path) -> Path:
        """The folder, and both its files, without a way out by `..` or a link."""
        if self.folder is None:
            raise AdapterError(f"{path}: the server was started without a folder to load adapters from.")
        try:
            folder = (self.folder / path).resolve(strict=True)
            places = [folder, *(file.resolve() for file in (folder / CONFIG, weights_in(folder)))]
        except (OSError, ValueError, RuntimeError):
            raise AdapterError(f"{path}: no such folder below the server's folder of adapters.") from None
        if not all(place.is_relative_to(self.folder) for place in places):
            raise AdapterError(f"{path}: no such folder below the server's folder of adapters.")
        return folder


def places_in(model: Any, layout: Layout) -> Callable[[ReftConfig], frozenset[str]]:
    """For `Registry.meant`: the modules of a model that a config means."""
    served = {site.name: site for site in layout.sites}

    @lru_cache(maxsize=64)  # a config may come from a client
    def found(site: str, layers: str | tuple[int, ...]) -> frozenset[str]:
        sites = find_sites(model, site, layers if isinstance(layers, str) else list(layers))
        for one in sites:
            if served.get(one.name, one) != one:
                raise ValueError(f"site={site!r}: {one.name} is served for edits of its other side.")
        return frozenset(one.name for one in sites)

    return lambda config: found(config.site, config.layers if config.layers == "all" else tuple(config.layers))


def _vectors(layout: Layout, saved: SavedAdapter) -> dict[Part, Tensor]:
    edits: dict[Part, dict[str, tuple[Term, ...]]] = {part: {} for part in saved.config.edit_names()}
    for (module, part), tensors in saved.edits.items():
        with torch.no_grad():
            edits[part][module] = as_edit(saved.config, tensors).terms()
    return {part: layout.vector(own) for part, own in edits.items()}


def _digest(saved: SavedAdapter) -> bytes:
    config = saved.config
    said = (config.method, config.r, config.activation, config.positions, config.edit_turns, config.tied)
    whole = hashlib.sha256(repr(said).encode())
    for (module, part), tensors in sorted(saved.edits.items()):
        for name, tensor in sorted(tensors.items()):
            whole.update(repr((module, part, name, tensor.dtype, tuple(tensor.shape))).encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return whole.digest()
