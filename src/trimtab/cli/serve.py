"""The command that serves: a model with many adapters behind OpenAI's API."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.cli.common import command, console, extra

_OURS = ("model", "dtype", "max_model_len", "max_num_seqs", "enable_prefix_caching", "block_size", "additional_config")
"""What `--vllm` may not set."""


@command()
def serve(
    model: Annotated[str, typer.Argument(help="The base model: a local folder or a Hub name.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME=FOLDER, or a folder that goes by its own name; may be repeated."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters, found and loaded as they are asked for.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; other machines need --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="transformers: in this process; vllm: over vLLM's processes (docs/serving-vllm.md)."),
    ] = "transformers",
    vllm: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of vLLM's engine, as tensor_parallel_size=2, value in YAML; may be repeated."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the weights are stored.")
    ] = "auto",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="TRIMTAB_API_KEY", help="A key that requests must carry; may be repeated."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of such keys, one a line.")] = None,
    admin_key: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_ADMIN_KEY", help="The key that may load and unload adapters.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the base model.")] = None,
    max_len: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt and its answer together.")] = 4096,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 1024,
    queue_seconds: Annotated[float, typer.Option(min=0, help="That one may wait before it gets 503.")] = 60,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one forward.")] = 512,
    prefix_mb: Annotated[
        int, typer.Option(min=0, help="Megabytes for prefixes that prompts share; 0 for none.")
    ] = 1024,
    share_prefix: Annotated[
        Literal["tenant", "all", "off"],
        typer.Option(help="Who shares prefixes: requests of one key (tenant), all, or none; timing tells of them."),
    ] = "tenant",
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank of an adapter.")] = 16,
    resident: Annotated[int, typer.Option(min=1, help="Adapters in use at a time; an untied one counts twice.")] = 64,
    site: Annotated[list[str] | None, typer.Option(help="What adapters may edit (block); may be repeated.")] = None,
    request_adapters: Annotated[bool, typer.Option(help="Let a request bring an adapter of its own.")] = False,
    any_base: Annotated[bool, typer.Option(help="Serve adapters made on other weights than the model's.")] = False,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 4 << 20,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running requests to end at SIGTERM.")] = 30,
) -> None:
    """Serve a model and its adapters by OpenAI's API, with a page to try them (docs/serving.md)."""
    with extra("serve"):
        from trimtab.serve.app import create_app
        from trimtab.serve.guard import Access
        from trimtab.serve.server import Settings, check_exposure, open_service, run
    from trimtab.serve.rows import Limits

    _give_memory_back()
    make = {}
    if engine == "vllm":
        from trimtab.serve.vllm.engine import make_engine

        make = {"make_engine": make_engine(_options(vllm or []))}
    elif vllm:
        raise ValueError(f"--vllm {vllm[0]}: goes with --engine vllm.")
    access = Access(_keys(api_key or [], api_key_file), admin_key or None, one_tenant=share_prefix == "all")
    check_exposure(host, access)
    prefix_bytes = 0 if share_prefix == "off" else prefix_mb << 20
    limits = Limits(slots, max_len, chunk, prefix_bytes=prefix_bytes, max_queue=max_queue, queue_seconds=queue_seconds)
    named, sites = _named(adapter or []), tuple(site or ["block"])
    service = open_service(
        Settings(
            model,
            named,
            adapters,
            served_model_name,
            dtype,
            sites,
            max_rank,
            resident,
            request_adapters,
            limits,
            any_base,
        ),
        **make,
    )
    count = len(service.registry.names())
    console.print(f"{service.base} with {count} adapters at http://{host}:{port}", soft_wrap=True, highlight=False)
    run(create_app(service, access, max_body), service.engine, host, port, grace)


def _options(given: list[str]) -> dict[str, Any]:
    """Of vLLM, by name. Raises ValueError: one has no value, or none that is YAML."""
    import yaml

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in _OURS:
            why = "is set by trimtab serve's own options" if equals else "must be NAME=VALUE"
            raise ValueError(f"--vllm {text}: {why}.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--vllm {text}: the value is not YAML.") from None
    return found


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    lines = file.read_text(encoding="utf-8").split() if file is not None else []
    if file is not None and not lines:
        raise ValueError(f"--api-key-file {file}: holds no key; write one a line.")
    return tuple(key for key in (*given, *lines) if key)


def _named(given: list[str]) -> dict[str, str | Path]:
    """The folders of -a by name.

    Raises:
        ValueError: two have one name. AdapterError: there is no adapter.
    """
    from trimtab.adapter.hub import local
    from trimtab.runs.generate import find_adapters, named_folder

    found: dict[str, str | Path] = {}
    for text in given:
        name, equals, folder = named_folder(text)
        new: dict[str, str | Path] = {name: local(folder)} if equals else dict(find_adapters([text]))
        taken = found.keys() & new.keys()
        if taken:
            raise ValueError(f"-a {text}: there are two adapters called {min(taken)!r}; give one as NAME=FOLDER.")
        found |= new
    return found


def _give_memory_back() -> None:
    """Have glibc return what is free: by default each thread takes memory from a place of its own, from which little
    comes back, and a server which loads and unloads adapters in many threads grows for as long as it runs."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 2)  # M_ARENA_MAX
        trim = libc.malloc_trim
    except (OSError, AttributeError):  # another C library
        return

    def now_and_then() -> None:
        while True:
            time.sleep(30)
            trim(0)

    threading.Thread(target=now_and_then, daemon=True, name="malloc_trim").start()
