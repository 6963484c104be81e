"""In vLLM's workers: a table of edits behind hooks on the model, and the plan of each step's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.serve.table import AdapterTable, Layout
from trimtab.serve.vllm.carried import NAME, read
from trimtab.where.plan import Span
from trimtab.where.sites import Site

_SCHEMA = "(Tensor(a!) hidden, Tensor? residual, str site) -> ()"
_table: WorkerTable | None = None
"""Of this process, which has one model."""


class WorkerTable(AdapterTable):
    """A table whose edits are an operator that compilers do not look into.

    A block of vLLM gives hidden states and the residual that the next one adds to them; it is the sum that is edited.
    """

    def _hook(self, site: Site) -> RemovableHandle:
        def edit(module: nn.Module, args: Any, output: Any) -> None:
            hidden, residual = (output, None) if isinstance(output, Tensor) else output[:2]
            torch.ops.trimtab.edit(hidden, residual, site.name)

        return site.module.register_forward_hook(edit)

    def edit(self, hidden: Tensor, residual: Tensor | None, name: str) -> None:
        """Edit the running rows of hidden (tokens, d), in place."""
        for lines in self._running(name, hidden):
            states = hidden[lines.row] if residual is None else hidden[lines.row] + residual[lines.row]
            hidden.index_add_(0, lines.row, self._change(name, states, lines).to(hidden.dtype))

    def put(self, vectors: Sequence[tuple[int, bytes]]) -> int:
        """Fill entries with float32 vectors (size,); how many."""
        for entry, data in vectors:
            self._load(entry, torch.frombuffer(bytearray(data), dtype=torch.float32))
        return len(vectors)


def _edit(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    if _table is not None:
        _table.edit(hidden, residual, site)


def _no_edit(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    """For shapes alone."""


def make_table(model: nn.Module, settings: Mapping[str, Any]) -> WorkerTable:
    """Hook the model's blocks.

    Args:
        settings: what the front end wrote: `sites` (name, width), `rank` and `entries`.

    Raises:
        RuntimeError: the model has no module of that name.
    """
    modules = dict(model.named_modules())
    absent = [name for name, _ in settings["sites"] if name not in modules]
    if absent:
        raise RuntimeError(f"{type(model).__name__} of vLLM has no module {absent[0]}, which transformers' model has.")
    layout = Layout([Site(name, modules[name], width) for name, width in settings["sites"]], settings["rank"])
    return WorkerTable(layout, settings["entries"], next(model.parameters()).device)


def stages(runner: Any, scheduled: Mapping[str, int]) -> list[list[Span]]:
    """What edits the rows of a step, in the order of the runner's batch: a list for each adapter of a request."""
    batch, found, offset = runner.input_batch, list[list[Span]](), 0
    for index, id in enumerate(batch.req_ids):
        params, length = runner.requests[id].sampling_params, scheduled[id]
        carried = read(params.extra_args) if params is not None else None
        start = int(batch.num_computed_tokens_cpu[index])
        for i, spans in enumerate(carried.spans(start, length, offset) if carried else ()):
            found += [[]] if i == len(found) else []
            found[i] += spans
        offset += length
    return found


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Hooks must be there before the model is compiled."""
        global _table
        result = original(self, *args, **kwargs)
        settings = self.vllm_config.additional_config
        if NAME in settings:
            _table = make_table(self.model_runner.get_model(), settings[NAME])
        return result

    return load_model


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, scheduler_output, *args, **kwargs)
        self.trimtab_stages = stages(self, scheduler_output.num_scheduled_tokens) if _table is not None else []
        return result

    return prepare


def _model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Only here, and not in a dummy run, are there rows to edit."""
        if _table is None:
            return original(self, *args, **kwargs)
        with _table.editing(self.__dict__.pop("trimtab_stages")):
            return original(self, *args, **kwargs)

    return forward


def trimtab_put(self: Any, vectors: Sequence[tuple[int, bytes]]) -> int:
    """A method of vLLM's worker, called by the front end."""
    if _table is None:
        raise RuntimeError("the model has no table of edits.")
    return _table.put(vectors)


def _wraps() -> Iterator[tuple[type, str, Callable[..., Any]]]:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    yield Worker, "load_model", _load_model
    yield GPUModelRunner, "_prepare_inputs", _prepare_inputs
    yield GPUModelRunner, "_model_forward", _model_forward


def install() -> None:
    """Wrap vLLM's worker and runner, once a process."""
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(torch.ops.trimtab, "edit"):
        operator = torch.library.custom_op("trimtab::edit", _edit, mutates_args=["hidden"], schema=_SCHEMA)
        operator.register_fake(_no_edit)
    for owner, name, wrap in _wraps():
        original = getattr(owner, name)
        if not hasattr(original, "__trimtab__"):
            wrapped = wrap(original)
            wrapped.__trimtab__ = True
            setattr(owner, name, wrapped)
    Worker.trimtab_put = trimtab_put
