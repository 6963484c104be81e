"""Adapters on the Hub: fetched by name, pushed from a folder. No pickle is pushed, no code, nor what a run answered."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.weights import CONFIG, PICKLE, WEIGHTS
from trimtab.errors import AdapterError

NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`user/adapter`, perhaps of a revision: `user/adapter@v2`."""
FILES = (CONFIG, WEIGHTS, "README.md", "run.json", "metrics.json")
"""Predictions hold the user's data, and stay."""


def local(where: str | Path) -> Path:
    """The folder, fetched from the Hub where none is here and the name could be one there.

    Raises:
        AdapterError: the Hub cannot be asked, or has no such adapter.
    """
    name, path = str(where), Path(where)
    if path.exists() or not NAME.fullmatch(name) or Path(name.partition("/")[0]).exists():
        return path  # "runs/wrods", where there is a folder `runs`, is a slip and no name
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*FILES, PICKLE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        raise AdapterError(f"{name}: no such folder here, and not to be had from the Hub: {_reason(error)}") from None


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload an adapter's folder, its card and what was run; returns the page's address.

    Raises:
        AdapterError: the folder holds no whole adapter, or a pickle of it, or the Hub refuses.
    """
    inspect_adapter(folder)
    if not Path(folder, WEIGHTS).exists():
        raise AdapterError(f"{Path(folder, PICKLE)}: pickles are not pushed; save the adapter again, as safetensors.")
    if not NAME.fullmatch(repository):
        raise AdapterError(f"{repository!r} is no name on the Hub; give user/name.")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="A ReFT adapter, by trimtab",
        )
    except Exception as error:
        known = isinstance(error, HfHubHTTPError | OfflineModeIsEnabled | OSError)
        if not known and not type(error).__module__.startswith("httpx"):  # that speaks for the Hub's library
            raise
        raise AdapterError(f"{repository}: not pushed: {_reason(error)} {_remedy(error)}") from None
    return f"{hub.endpoint}/{repository}"


def _remedy(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE."
    if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403, 404):
        return "Is there a token (hf auth login) that may write there?"
    return "Is the network up? The same command tries again."


def _reason(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or a private one."
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    return said if said.endswith(".") else f"{said}."
