"""vLLM as an engine: adapters are put into its workers' tables, and requests carry which entries edit what."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from torch import Tensor

from trimtab.serve.engine import (
    BadRequest,
    Emit,
    EngineError,
    Event,
    Health,
    Logprob,
    QueueFull,
    QueueTimeout,
    Request,
    Sampling,
    Stats,
    StepFailed,
    Unavailable,
)
from trimtab.serve.model import NotServed
from trimtab.serve.rows import Limits, check_request, wanted
from trimtab.serve.server import MakeEngine, Settings
from trimtab.serve.slots import end_tokens
from trimtab.serve.table import Entries, Key, Layout
from trimtab.serve.text import AnswerText
from trimtab.serve.vllm import probe
from trimtab.serve.vllm.carried import NAME, written
from trimtab.serve.vllm.plugin import FRONT_END

_BLOCK = 32
"""Tokens of a block of vLLM's cache; fewer do not run on a CPU."""


class _Remote(Entries):
    """The workers' tables, as the front end keeps the books of them."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.pending: dict[int, bytes] = {}
        """Vectors that the workers do not have yet."""

    def _load(self, entry: int, vector: Tensor) -> None:
        self.pending[entry] = vector.numpy().tobytes()


class _Answer:
    """A request and what was said of it."""

    def __init__(self, request: Request, emit: Emit, tokenizer: Any) -> None:
        self.request, self.emit = request, emit
        self.text = AnswerText(tokenizer, request.sampling.stop)
        self.completion = self.cached = 0

    def event(self, **news: Any) -> Event:
        return Event(
            prompt_tokens=len(self.request.tokens),
            completion_tokens=self.completion,
            cached_tokens=self.cached,
            **news,
        )


class VllmEngine:
    """An `Engine` over vLLM's `AsyncLLM`, whose processes it starts and ends.

    Args:
        model: a folder or a name on the Hub.
        layout: of an adapter; the names of its sites are those of vLLM's modules.
        entries: of the workers' tables.
        cases: what vLLM must answer before it is taken for ready; see `probe.cases`.
        ends: the tokens that end an answer; vLLM's own notion of them is not used.
        options: of vLLM's `AsyncEngineArgs`, by their names there.
        limits: sizes; without a prefix store nothing is shared.

    Raises:
        NotServed: this vLLM is not one that was tested.
    """

    tells_moves = False

    def __init__(
        self,
        model: str,
        layout: Layout,
        entries: int,
        cases: Sequence[probe.Case],
        tokenizer: Any = None,
        limits: Limits | None = None,
        ends: Collection[int] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        _check_installed()
        self.model, self.layout, self.limits, self.options = model, layout, limits or Limits(), dict(options or {})
        self._cases, self._tokenizer, self._table = cases, tokenizer, _Remote(entries)
        self._ends = tuple(ends)
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trimtab-vllm", daemon=True)
        self._lock = threading.Lock()
        self._ids: dict[str, asyncio.Task[Event] | None] = {}
        self._running, self._health, self._stats = 0, "starting", Stats()
        self._turn, self._changed, self._go_on = asyncio.Lock(), asyncio.Event(), asyncio.Event()

    # ---- for any thread ----------------------------------------------------------------------------------------

    @property
    def health(self) -> Health:
        if self._health == "ready" and self._llm is not None and self._llm.errored:
            return "dead"
        return self._health  # type: ignore[return-value]

    @property
    def max_len(self) -> int:
        return int(self._llm.model_config.max_model_len) if self._llm else self.limits.max_len

    def start(self) -> None:
        """Start vLLM's processes and hold them to what transformers answers.

        Raises:
            NotServed: they cannot serve adapters, or the answer is another one.
        """
        self._thread.start()
        try:
            self._call(self._open())
            self._call(self._probe())
        except BaseException:
            self.close()
            raise
        self._health = "ready"

    def submit(self, request: Request, emit: Emit) -> None:
        if request.moves:
            raise BadRequest("reft_moves", "reft_moves: not done by this engine; use --engine transformers.")
        if self._llm is None:
            raise Unavailable("the engine has not started and takes no requests.")
        check_request(request, self.max_len, self._llm.model_config.get_vocab_size(), len(self._table), least=1)
        with self._lock:
            if self.health in ("draining", "dead"):
                raise Unavailable(f"the engine is {self.health} and takes no requests.")
            if request.id in self._ids:
                raise BadRequest("id", f"id={request.id!r}: a request of this id is running.")
            if self.limits.full(len(self._ids)):
                raise QueueFull(f"{len(self._ids)} requests run or wait, as many as may; try again later.")
            self._ids[request.id] = None
        self._loop.call_soon_threadsafe(self._begin, _Answer(request, emit, self._tokenizer))

    def form(self, grammar: str, field: str) -> Any:
        raise BadRequest(field, f"{field}: answers are held to no form by this engine; use --engine transformers.")

    def cancel(self, id: str) -> None:
        def end() -> None:
            if (task := self._ids.get(id)) is not None:
                task.cancel()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(end)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._call(self._llm.pause_generation(mode="keep", clear_cache=False))
        try:
            yield
        finally:
            self._call(self._llm.resume_generation())

    def stats(self) -> Stats:
        self._stats.running, self._stats.waiting = self._running, len(self._ids) - self._running
        self._stats.resident_adapters, self._stats.pinned_adapters = self._table.resident, self._table.pinned
        self._stats.table_hits, self._stats.table_misses = self._table.hits, self._table.misses
        self._stats.table_evictions = self._table.evictions
        return self._stats

    def close(self, grace: float = 0.0) -> None:
        if self._loop.is_closed():
            return
        self._health = "draining"
        end = time.monotonic() + grace
        while self._ids and time.monotonic() < end:
            time.sleep(0.02)
        if self._thread.is_alive():
            self._call(self._abort_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._health = "dead"

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- on the loop -------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # torch has threads here already
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        os.environ[FRONT_END] = str(os.getpid())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {
            "sites": [[site.name, site.width] for site in self.layout.sites],
            "rank": self.layout.rank,
            "entries": len(self._table),
        }
        own = {
            "model": self.model,
            "skip_tokenizer_init": True,
            "max_num_seqs": self.limits.slots,
            "enable_prefix_caching": bool(self.limits.prefix_bytes),
            "max_logprobs": 100,
            "additional_config": {NAME: settings},
            "generation_config": "vllm",
            **({} if "compilation_config" in self.options else {"compilation_config": {"cudagraph_mode": "NONE"}}),
        }
        try:
            config = AsyncEngineArgs(**{**own, **self.options}).create_engine_config()
        except TypeError as error:
            raise NotServed(f"--vllm: {error}.") from None
        probe.refuse(config)
        self._llm = AsyncLLM.from_vllm_config(config)

    async def _probe(self) -> None:
        try:
            await self._llm.collective_rpc("trimtab_put", args=([],))
        except Exception as error:
            raise NotServed(f"--engine vllm: its workers have no table of edits ({error}).") from None
        dtype = self._llm.model_config.dtype
        for made in probe.rounds(self._cases):
            for case, logprobs in zip(made, await asyncio.gather(*map(self._asked, made)), strict=True):
                probe.check(case, logprobs, dtype)

    async def _asked(self, case: probe.Case) -> list[Logprob]:
        found: list[Event] = []
        last = await self._serve(_Answer(case.request, found.append, None))
        return [one for event in (*found, last) for one in event.logprobs]

    def _begin(self, answer: _Answer) -> None:
        task = self._loop.create_task(self._serve(answer))
        self._ids[answer.request.id] = task
        task.add_done_callback(lambda done: self._end(answer, done))

    def _end(self, answer: _Answer, task: asyncio.Task[Event]) -> None:
        """The one place where a last event is said."""
        self._ids.pop(answer.request.id, None)
        if task.cancelled():
            last = answer.event(finish_reason="abort", text=answer.text.end())
        elif (error := task.exception()) is None:
            last = task.result()
            self._stats.prompt_tokens += last.prompt_tokens - last.cached_tokens
        else:
            self._stats.last_error = f"{type(error).__name__}: {error}"
            told = error if isinstance(error, EngineError) else StepFailed(f"vLLM raised {self._stats.last_error}")
            last = answer.event(finish_reason="error", error=told)
        answer.emit(last)

    async def _serve(self, answer: _Answer) -> Event:
        request = answer.request
        entries = await self._admitted(request)
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.tokens)}
            if request.salt:
                prompt["cache_salt"] = request.salt.hex()
            outputs = self._llm.generate(prompt, _params(request, entries, self._ends), request.id)
            async with aclosing(outputs):  # vLLM has let go of the request before its entries are free
                async for output in outputs:
                    last = self._said(answer, output)
                    if last.finish_reason is not None:
                        return last
                    answer.emit(last)
            raise StepFailed("vLLM ended the answer without a reason.")
        finally:
            self._running -= 1
            self._table.release(entries)
            self._changed.set()

    async def _admitted(self, request: Request) -> dict[Key, int]:
        """Wait for a place among the running, and for entries that the workers have filled."""
        try:
            async with asyncio.timeout(self.limits.queue_seconds):
                await self._turn.acquire()
                try:
                    entries = await self._acquired(request)
                finally:
                    self._turn.release()
        except TimeoutError:
            raise QueueTimeout(
                f"waited {self.limits.queue_seconds:g} s for a place among the running requests; try again later."
            ) from None
        return entries

    async def _acquired(self, request: Request) -> dict[Key, int]:
        while True:
            self._changed.clear()
            entries = self._table.acquire(wanted(request)) if self._running < self.limits.slots else None
            if entries is not None:
                break
            await self._changed.wait()
        self._running += 1
        try:
            await self._fill()
        except BaseException:
            self._running -= 1
            self._table.release(entries)
            raise
        return entries

    async def _fill(self) -> None:
        """Give the workers what is pending. Once begun it is done, also when the request that asked for it is gone."""
        vectors, self._table.pending = self._table.pending, {}
        if vectors:
            sent = self._loop.create_task(self._llm.collective_rpc("trimtab_put", args=(list(vectors.items()),)))
            sent.add_done_callback(self._filled)
            await asyncio.shield(sent)

    def _filled(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:  # the books and the workers' tables differ
            self._health = "dead"

    def _said(self, answer: _Answer, output: Any) -> Event:
        """vLLM's news of a request as an event; its last one where a stop string is reached."""
        sampling, news = answer.request.sampling, output.outputs[0]
        if output.num_cached_tokens and not answer.cached:
            answer.cached = output.num_cached_tokens
            self._stats.cached_tokens += answer.cached
        prompt_logprobs = _prompt_logprobs(answer.request, output.prompt_logprobs)
        if sampling.max_tokens == 0:
            return answer.event(finish_reason="length", prompt_logprobs=prompt_logprobs)
        tokens, reason, stop, text = list(news.token_ids), news.finish_reason, news.stop_reason, ""
        ends = reason == "stop"
        for i, token in enumerate(tokens):
            if ends and i == len(tokens) - 1:
                stop = token
                break
            new, stop_string = answer.text.add(token)
            text += new
            if stop_string is not None:
                tokens, reason, stop = tokens[: i + 1], "stop", stop_string
                break
        answer.completion += len(tokens)
        self._stats.generated_tokens += len(tokens)
        if reason is not None and not isinstance(stop, str):
            text += answer.text.end()
        asked = sampling.logprobs or 0
        logprobs = tuple(_logprob(*pair, asked) for pair in zip(tokens, news.logprobs or (), strict=False))
        return answer.event(
            tokens=tuple(tokens),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop=stop,
        )

    async def _abort_all(self) -> None:
        tasks = [task for task in self._ids.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # their last events are said
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


def _params(request: Request, entries: Mapping[Key, int], ends: Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling: Sampling = request.sampling
    same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    return SamplingParams(
        **{name: getattr(sampling, name) for name in (*same, "seed", "logprobs", "prompt_logprobs")},
        ignore_eos=True,
        max_tokens=max(1, sampling.max_tokens),
        stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)],
        logit_bias=dict(sampling.logit_bias) or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=written(request, entries),
    )


def _prompt_logprobs(request: Request, found: Sequence[Any] | None) -> tuple[Logprob | None, ...]:
    asked = request.sampling.prompt_logprobs or 0
    return tuple(one and _logprob(token, one, asked) for token, one in zip(request.tokens, found or (), strict=False))


def _logprob(token: int, found: Mapping[int, Any], asked: int) -> Logprob:
    """vLLM's log-probabilities at a place: of the token, and of the likeliest, by rank."""
    top = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank <= asked)
    return Logprob(token, found[token].logprob, tuple((other, value) for _, other, value in top[:asked]))


def _check_installed() -> None:
    if wrong := probe.wrong():
        raise NotServed(f"--engine vllm: {'; '.join(wrong)}.")


def make_engine(options: Mapping[str, Any]) -> MakeEngine:
    """For `open_service`, with options of vLLM's `AsyncEngineArgs`. Raises NotServed as `VllmEngine`."""
    _check_installed()

    def make(settings: Settings, model: Any, layout: Layout, tokenizer: Any) -> VllmEngine:
        if set(settings.sites) != {"block"}:
            raise NotServed(f"--engine vllm: edits the outputs of blocks only; --site {', '.join(settings.sites)}.")
        cases = probe.cases(model, layout, _BLOCK)
        dtype = str(model.dtype).removeprefix("torch.")
        model.to("meta")  # its structure is still read; its weights were for the probe
        limits = settings.limits
        reach = getattr(model.config.get_text_config(), "max_position_embeddings", limits.max_len)
        own = {"dtype": dtype, "max_model_len": min(limits.max_len, reach), "block_size": _BLOCK}
        own["max_num_batched_tokens"] = max(limits.chunk, limits.slots)
        ends = end_tokens(model, tokenizer)
        return VllmEngine(settings.model, layout, settings.resident, cases, tokenizer, limits, ends, {**own, **options})

    return make
