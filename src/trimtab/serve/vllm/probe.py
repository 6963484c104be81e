"""What must hold before an adapter is served on vLLM: its version, the functions that are replaced, and an answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.serve.engine import Applied, Request, Sampling
from trimtab.serve.model import NotServed
from trimtab.serve.registry import Adapter
from trimtab.serve.table import AdapterTable, Layout
from trimtab.serve.vllm.keys import FUNCTION, HOME, USERS
from trimtab.where.plan import Span
from trimtab.where.positions import parse_positions

TESTED = ("0.32",)
"""Versions of vLLM, by their first two numbers."""
TARGETS = {
    f"{HOME}:{FUNCTION}": "request start_token_idx end_token_idx start_mm_idx",
    **{f"{user}:{FUNCTION}": "request start_token_idx end_token_idx start_mm_idx" for user in USERS},
    "vllm.v1.worker.gpu_worker:Worker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": "self scheduler_output num_scheduled_tokens",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": (
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs"
    ),
}
"""What is replaced, and the names of its parameters."""


def wrong() -> list[str]:
    """What this vLLM lacks of what was tested."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return ["vllm is not installed"]
    if ".".join(found.split(".")[:2]) not in TESTED:
        return [f"vllm {found} is not among the versions that were tested: {', '.join(TESTED)}"]
    return [said for target, parameters in TARGETS.items() if (said := _differs(target, parameters))]


def _differs(target: str, parameters: str) -> str:
    module, _, path = target.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return f"{target} is not there"
    has = " ".join(inspect.signature(found).parameters)
    return "" if has == parameters else f"{target} takes ({has}), not ({parameters})"


_REFUSED: dict[str, Callable[[Any], Any]] = {
    "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": lambda config: config.use_v2_model_runner,
    "KV connectors (kv_transfer_config)": lambda config: config.kv_transfer_config,
    "KV cache events (kv_events_config)": lambda config: config.kv_events_config,
    "speculative decoding": lambda config: config.speculative_config,
    "pipeline parallelism": lambda config: config.parallel_config.pipeline_parallel_size > 1,
    "data parallelism within a server (start one for each, behind a proxy)": (
        lambda config: config.parallel_config.data_parallel_size > 1
    ),
    "context parallelism": lambda config: (
        config.parallel_config.decode_context_parallel_size > 1
        or config.parallel_config.prefill_context_parallel_size > 1
    ),
    "micro-batching (enable_dbo)": lambda config: config.parallel_config.use_ubatching,
    "sequence parallelism": lambda config: config.parallel_config.use_sequence_parallel_moe,
    "CUDA graphs (set compilation_config={cudagraph_mode: NONE})": (
        lambda config: config.compilation_config.cudagraph_mode.name != "NONE"
    ),
    "encoder-decoders": lambda config: config.model_config.is_encoder_decoder,
    "multimodal models": lambda config: config.model_config.is_multimodal_model,
    "pooling models": lambda config: config.model_config.runner_type != "generate",
    "logprobs_mode other than raw_logprobs": lambda config: config.model_config.logprobs_mode != "raw_logprobs",
}


def refuse(config: Any) -> None:
    """Raises NotServed for what was not tested, by its name."""
    refused = [name for name, asked in _REFUSED.items() if asked(config)]
    if refused:
        raise NotServed(f"--engine vllm: does not serve adapters with {'; '.join(refused)}.")


class Case(NamedTuple):
    """A request, and what must come of it."""

    request: Request
    logits: Tensor
    """(steps, V) of the steps of the answer."""


_STEPS = 3
_STRONG = 0.1
"""Of the largest logit: what an edit must change, so that a part of it that is wrong is no rounding either."""
_BLOCKS = 2
_PROBES = {"base": "", "ends": "f3+l3", "all": "all", "short": "f3+l3"}
_ORDER = (("short",), ("ends",), ("base",), ("ends", "base", "all", "short"), ("all", "ends"))
"""Of rounds: each cold, on blocks that another left in the cache, from the cache, and side by side. `short` has the
adapter and the first blocks of `ends`, with edited tokens in them that `ends` does not edit."""


@torch.inference_mode()
def cases(model: Any, layout: Layout, block: int) -> list[Case]:
    """A plain and edited prompts of one text, and the logits of transformers for them.

    The answer is forced, so that logits of the same tokens are compared. The edits are made so strong that leaving them
    out is no rounding.

    Args:
        block: tokens of a block of the prefix cache.

    Raises:
        NotServed: no strength of the edits changes the logits as it should.
    """
    random = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(5, vocabulary, (_BLOCKS * block + 9,), generator=random).tolist()
    vector = torch.randn(layout.size, generator=random)
    for place in layout.places.values():
        place.of(vector.unsqueeze(0)).code.zero_()
    for strength in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
        texts = {name: tokens[: _BLOCKS * block] if name == "short" else tokens for name in _PROBES}
        made = [_case(model, layout, name, text, vector * strength) for name, text in texts.items()]
        apart = min(_apart(case.logits, made[0].logits) for case in made[1:])
        if apart > max(_STRONG, 4 * allowed(model.dtype)):
            return made
    raise NotServed(f"{type(model).__name__}: edits of its blocks change its logits by {apart:.2g} only.")


def _case(model: Any, layout: Layout, name: str, tokens: list[int], vector: Tensor) -> Case:
    adapter = Adapter("", f"probe {_PROBES[name]}".encode(), parse_positions(_PROBES[name] or "all"), {"edit": vector})
    forced = tokens[0]
    sampling = Sampling(_STEPS, temperature=0, logit_bias={forced: 100.0}, ignore_eos=True, logprobs=20)
    request = Request(f"probe {name}", tokens, sampling, (Applied(adapter),) if _PROBES[name] else ())
    whole = torch.tensor([tokens + [forced] * (_STEPS - 1)], device=model.device)
    table = AdapterTable(layout, 1, model.device)
    try:
        table.acquire({(adapter.digest, "edit"): vector})
        span = Span(0, adapter.positions, len(tokens), 0, whole.shape[1], 0)
        with table.editing([[span]] if request.adapters else []):
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
    finally:
        table.close()
    return Case(request, logits[0, len(tokens) - 1 :].float().cpu())


def allowed(dtype: torch.dtype) -> float:
    """Of rounding, as a share of the largest logit."""
    return 1e-3 if dtype == torch.float32 else 3e-2


def _apart(logits: Tensor, other: Tensor) -> float:
    """The largest difference of log-probabilities of the twenty likeliest tokens, as a share of the largest logit."""
    top = logits.topk(20, -1).indices
    difference = logits.log_softmax(-1) - other.log_softmax(-1)
    return float(difference.gather(-1, top).abs().amax(-1).max() / logits.abs().max())


def rounds(made: Sequence[Case]) -> Iterator[list[Case]]:
    """What to ask at a time, and after what."""
    named = dict(zip(_PROBES, made, strict=True))
    return ([named[name] for name in names] for names in _ORDER)


def check(case: Case, logprobs: Sequence[Any], dtype: torch.dtype) -> None:
    """Compare what vLLM said with what transformers did.

    Args:
        logprobs: `Logprob` of each step.

    Raises:
        NotServed: they differ by more than rounding.
    """
    truth, largest = case.logits.log_softmax(-1), float(case.logits.abs().max())
    apart = max(
        abs(float(row[token]) - value) / largest
        for row, one in zip(truth, logprobs, strict=True)
        for token, value in one.top
    )
    if not apart <= allowed(dtype):
        raise NotServed(
            f"--engine vllm: the log-probabilities of a prompt ({case.request.id}) differ from those of transformers "
            f"by {apart:.2g} of the largest logit; {allowed(dtype):g} would be rounding."
        )
