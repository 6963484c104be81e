"""Forwards that run: which call belongs to which model, thread and `generate`, and the `Pass` it has.

Nothing of it is kept on the model: a call is found through the thread that runs it, so that calls in other threads,
calls within calls and calls that were interrupted leave each other alone. A call of `generate` hands its `Generation`
to each forward it makes as an argument, through `prepare_inputs_for_generation`; a forward without one is somebody
else's, such as a logits processor's. Gradient checkpointing runs parts of the model again during the backward pass,
long after the forward has ended and in autograd's own threads, so each checkpointed call carries its pass along.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, update_wrapper
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from peft.utils import TaskType
from torch import Tensor, nn

from trimtab.adapter.cache import cache_in, cache_of, is_paged, keys_of, past_length, rows_among
from trimtab.adapter.forward import MISCOUNTED, PAGED, WATCHED, Edits, Filled, Made, Pass
from trimtab.adapter.sharding import keep_in_float32, refuse_parts
from trimtab.edits.orthonormal import restore
from trimtab.where.positions import Positions
from trimtab.where.prompts import (
    Prompt,
    as_lengths,
    as_real,
    find_packed,
    first_supervised,
    has_several_turns,
    packed_otherwise,
    positions_in,
    repeated,
)

GENERATION = "reft_generation"
"""The argument by which `generate` hands its forwards what it knows."""
_PAST = (
    "generate was called past the model's own, as by GenerationMixin.generate(model, ...), and without a cache, so "
    "where the prompt ends is not known. Call model.generate(...)."
)
_CUSTOM = (
    "within custom_generate the model was called with other text than generate was given, so where its prompt ends is "
    "not known. Pass prompt_lengths (one number of real prompt tokens a row) to that call."
)
_FIRST_OF_SEVERAL = " The first chunk of a longer prompt takes use_cache=True."
Role = Literal["model", "inner", "pair", "encoder", "decoder", "recomputed"]


class Generation:
    """One call of `generate`: its prompt, and how much of it the model has been given.

    Not a dataclass, which FSDP would copy on its way to the forward.
    """

    def __init__(
        self, prompt: Prompt, awaits_mask: bool = False, earlier: Prompt | None = None, compared: int = 0
    ) -> None:
        self.prompt, self.awaits_mask = prompt, awaits_mask
        self.earlier, self.compared = earlier, compared
        self.decoder = Prompt()
        self.source: Tensor | None = None
        """(B, N) or (B, N, d) what `generate` was given, if a decoding loop of the caller's (`custom_generate`) goes on
        from it, which need not ask for the inputs of its forwards."""
        self.negative: Tensor | None = None
        """(B, N) what guidance steers away from, whose forwards without a cache grow by what is generated."""
        self.negative_mask: Tensor | None = None
        self.started = False
        self.given = 0
        self.complete = False
        """The prompt is in the cache, so that what is given from now on follows it."""

    def begin(self) -> None:
        """A decoding loop starts; Whisper's `generate` has one for each segment, each with a prompt of its own."""
        self.decoder, self.started, self.given, self.complete = Prompt(), True, 0, False

    def begins(self, given: Any) -> bool:
        """Whether the input of a custom loop's forward is the prompt, as far as both go."""
        source = self.source
        if source is None or not isinstance(given, Tensor) or given.dim() != source.dim() or len(given) % len(source):
            return False
        columns = min(given.shape[1], source.shape[1])
        return torch.equal(given[:, :columns], repeated(source, len(given))[:, :columns].to(given))

    def negative_lengths(self, ids: Any) -> Tensor | None:
        """The prompts' lengths, should a forward that is not the generation's own continue the negative prompt."""
        if self.negative is None or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        start = ids[:, : self.negative.shape[1]]
        if start.shape != self.negative.shape or not torch.equal(start, self.negative.to(ids.device)):
            return None
        mask = self.negative_mask if self.negative_mask is not None else torch.ones_like(self.negative)
        return mask.sum(1)

    def receive_mask(self, columns: int, real: Tensor | None) -> None:
        """Take, from the first forward, the mask that `generate` made.

        Raises:
            ValueError: the forward is of a chunk of the prompt, and its mask does not cover the rest.
        """
        prompt = self.prompt
        if prompt.width is not None and columns < prompt.width:
            raise ValueError("prefill_chunk_size: pass attention_mask too, without which padding is seen too late.")
        prompt.width, prompt.real, self.awaits_mask = columns, real, False


class Call:
    """A call of an entrance that runs in this thread."""

    def __init__(self, forwards: Forwards, role: Role, frame: FrameType | None, running: Pass | None = None) -> None:
        self.forwards, self.role, self.frame, self.running = forwards, role, frame, running
        self.generation: Generation | None = None
        self.labels: Tensor | None = None
        self.lengths: Tensor | None = None
        self.decoder_lengths: Tensor | None = None
        self.opened: tuple[Role, ...] = ()
        """The entrances within that have had their call: another one is not the model's own."""

    def alive(self) -> bool:
        """Whether the call still runs. An interrupt (KeyboardInterrupt) ends it without the hook that closes it."""
        if self.frame is None or torch.compiler.is_compiling():
            return True
        try:
            self.frame.clear()  # refused for a frame that is still executing
        except RuntimeError:
            return True
        return False


class _Here(threading.local):
    def __init__(self) -> None:  # in each thread, whose first forward a compiler may guard: not defaults of the class
        self.calls: tuple[Call, ...] = ()
        self.generations: tuple[tuple[Forwards, Generation], ...] = ()
        self.names: tuple[tuple[Forwards, list[str] | None], ...] = ()


_here = _Here()
_told: ContextVar[tuple[tuple[Forwards, Any, Any], ...]] = ContextVar("prompts", default=())
_upkeep = threading.Lock()
_telling = [0]
"""How many `prompts` blocks are open anywhere: where there is none, a compiled forward need not look."""


@contextmanager
def prompts(model: nn.Module, lengths: Any = None, decoder_lengths: Any = None) -> Iterator[None]:
    """Say where the prompts end for every forward of `model` within, for losses that call the model by themselves.

    Args:
        model: a PEFT model, or what it wraps.
        lengths: (B,) real tokens of each row's prompt, as `prompt_lengths`; in an encoder-decoder the encoder's.
        decoder_lengths: (B,) the same of the decoder, its start token included.

    Examples:
        >>> with trimtab.prompts(model, batch["prompt_lengths"]):
        ...     loss = distillation_loss(model, batch)

    Raises:
        ValueError: the model has no ReFT adapter, or the lengths are not one whole number a row.
    """
    records = _records(model)
    if not records:
        raise ValueError("prompts: the model has no ReFT adapter.")
    told = as_lengths(lengths), as_lengths(decoder_lengths)
    token = _told.set((*_told.get(), *((f, *told) for f in records.values())))
    _telling[0] += 1
    try:
        yield
    finally:
        _telling[0] -= 1
        _told.reset(token)


def takes_prompts(model: nn.Module) -> bool:
    """Whether `forward` and `generate` of the model take `prompt_lengths`: those of one with a ReFT adapter do."""
    return bool(_records(model))


def _records(model: nn.Module) -> dict[int, Forwards]:
    return {id(f): f for m in model.modules() if (f := vars(m).get("_reft_forwards")) is not None}


class Forwards:
    """The entrances of one model, kept with it: every adapter on the model shares them, whoever put it there."""

    @classmethod
    def of(cls, model: nn.Module) -> Forwards:
        """The record of a model, made where there is none yet; under another PEFT method, that of the model below it,
        whose own `generate` and forwards it is to hear of."""
        while isinstance(model, PeftModel):
            model = model.get_base_model()
        there: Forwards | None = vars(model).get("_reft_forwards")
        return there if there is not None else cls(model)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[Any] = []
        self.base_digest: str | None = None
        """Of the model's weights before its first adapter."""
        self.notes: set[str] = set()
        self.looks = Counter[bool]()
        self.guests = 0
        """Edits of a `with` that is open somewhere."""
        self.editors: list[Callable[[], Edits]] = [self._own_edits]
        """Whoever edits what outlives a forward in a cache."""
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._handles = [
            handle
            for role, module in _entrances(model).items()
            for handle in (
                module.register_forward_pre_hook(partial(self._open, role), with_kwargs=True, prepend=True),
                module.register_forward_hook(partial(self._close, role), with_kwargs=True, always_call=True),
            )
        ]
        wraps = {
            "generate": self._generate,
            "prepare_inputs_for_generation": self._prepare,
            "init_continuous_batching": self._refuse_paged,
        }
        self._wrapped = {name: wrap for name, wrap in wraps.items() if callable(getattr(model, name, None))}
        for name, wrap in self._wrapped.items():
            original = getattr(model, name)
            # transformers reads the signature; annotations cannot be pickled
            setattr(model, name, update_wrapper(partial(wrap, original), original, ("__name__", "__doc__")))
        model._reft_forwards = self  # type: ignore[assignment]

    def release(self) -> None:
        """Leave the model as it was, if nobody is left who edits it."""
        if not self.layers and not self.guests:
            self.remove()

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for name in (*self._wrapped, "_reft_forwards"):
            vars(self.model).pop(name, None)
        for module in self._checkpointing:
            self._unbind(module)
        for module in self.model.modules():
            if isinstance(function := vars(module).get("checkpoint_fn"), _Bound):
                module.checkpoint_fn = function.function  # type: ignore[assignment]

    # ---- what runs -------------------------------------------------------------------------------------------------

    def current(self) -> Pass | None:
        """The forward of this model that runs in this thread; the innermost, if it runs within itself."""
        call = self._call()
        return call.running if call is not None else None

    @property
    def _running(self) -> list[Call]:
        return [call for call in _here.calls if call.forwards is self and call.alive()]

    def _call(self) -> Call | None:
        for call in reversed(_here.calls):
            if call.forwards is self and call.alive():
                return call
        return None

    def _generation(self) -> Generation | None:
        for forwards, generation in reversed(_here.generations):
            if forwards is self:
                return generation
        return None

    def adapter_names(self) -> list[str] | None:
        for forwards, names in reversed(_here.names):
            if forwards is self:
                return names
        return None

    def edits(self) -> Edits:
        """What a forward made now would edit: of all rows alike, or of each."""
        told = [editor() for editor in self.editors]
        rows = max(map(len, told))
        return [[made for own in told for made in own[row * len(own) // rows]] for row in range(rows)]

    def _own_edits(self) -> Edits:
        names = self.adapter_names()
        if names is None:
            return [self._made(None)]
        made = {name: self._made([name]) for name in set(names)}
        return [made[name] for name in names]

    def _edits_some(self) -> bool:
        """Whether some tokens are edited and others are not."""
        return any(made.positions.scope != "all" for row in self.edits() for made in row)

    def _made(self, names: list[str] | None) -> list[Made]:
        versions: dict[tuple[str, Positions, float], list[Any]] = {}
        for layer in self.layers:
            for made in layer.made(names):
                versions.setdefault(made, []).extend(edit.version for edit in layer.edits(made[0]).values())
        return [Made(*made, tuple(own)) for made, own in versions.items()]

    @contextmanager
    def named(self, names: list[str] | None) -> Iterator[None]:
        """Give each row of the forwards within an adapter of its own; None: all the active ones."""
        before = _here.names
        _here.names = (*before, (self, names))
        try:
            yield
        finally:
            _here.names = before

    @contextmanager
    def within(self, running: Pass) -> Iterator[None]:
        before = _here.calls
        _here.calls = (*before, Call(self, "recomputed", None, running))
        try:
            yield
        finally:
            _here.calls = before

    def _bind(self, module: nn.Module) -> None:
        """Make what `module` checkpoints run within the pass it first ran in, also when it is recomputed."""
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _Bound):
            module._gradient_checkpointing_func = _Bound(self, function)  # type: ignore[assignment]

    def _unbind(self, module: nn.Module) -> None:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _Bound):
            module._gradient_checkpointing_func = function.function  # type: ignore[assignment]

    # ---- a forward -------------------------------------------------------------------------------------------------

    def _open(self, role: Role, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = Call(self, role, None if torch.compiler.is_compiling() else sys._getframe(1))
        call.generation = kwargs.pop(GENERATION, None)
        lengths, decoder_lengths = kwargs.pop("prompt_lengths", None), kwargs.pop("decoder_prompt_lengths", None)
        outer = self._outer(role)
        if outer is None:
            if not torch.compiler.is_compiling():
                self._prepare_modules(call.generation)
            told, decoder_told = self._told()
            call.lengths = as_lengths(lengths) if lengths is not None else told
            call.decoder_lengths = as_lengths(decoder_lengths) if decoder_lengths is not None else decoder_told
        arguments = named_arguments(module, args, kwargs)
        call.labels = arguments.get("labels")
        if role == "inner" and outer is not None:
            call.running = outer.running
        elif role != "pair":  # whose encoder and decoder have passes of their own
            call.running = self._pass(role, arguments, outer or call)
        _here.calls = (*_here.calls, call)
        return args, kwargs

    def _outer(self, role: Role) -> Call | None:
        """The call of the whole model that makes this call of a part of it; None for a call from outside."""
        outer = self._call() if role in ("inner", "encoder", "decoder") else None
        if outer is None or outer.role not in ("model", "pair") or role in outer.opened:
            return None
        outer.opened = (*outer.opened, role)
        return outer

    def _close(self, role: Role, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
        call = self._take(role, None if torch.compiler.is_compiling() else sys._getframe(1))
        if call is None or call.running is None or role == "encoder":
            return
        if any(outer.running is call.running for outer in _here.calls):
            return  # which remembers for its parts
        past = cache_in(kwargs)
        past = past if past is not None else cache_of(output)
        if hasattr(past, "__dict__"):
            self._remember(past, call.running, call.generation)

    def _remember(self, past: Any, running: Pass, generation: Generation | None) -> None:
        """Have a cache know where its prompt ended, what edited it, and by the keys which row is which."""
        compiling = torch.compiler.is_compiling()
        if getattr(past, "_reft_prompt", None) is not running.prompt:
            past._reft_prompt, past._reft_edits = running.prompt, None if compiling else [(0, self.edits())]
        elif generation is None and not compiling and past._reft_edits is not None:
            before: Filled = [own for own in past._reft_edits if own[0] < running.start]
            now = self.edits()
            past._reft_edits = [*before, (running.start, now)] if not before or before[-1][1] != now else before
        if not compiling:
            past._reft_keys = keys_of(past)

    def _take(self, role: Role, frame: FrameType | None) -> Call | None:
        """The call that ends, off the stack, with those above it that were interrupted. None if it never began."""
        while _here.calls:
            call = _here.calls[-1]
            mine = call.forwards is self and call.role == role
            ends = mine and (frame is None or call.frame is None or call.frame is frame)
            if not ends and call.alive():
                return None
            _here.calls = _here.calls[:-1]
            if ends:
                return call
        return None

    def _prepare_modules(self, generation: Generation | None) -> None:
        if generation is None:  # which looked before its first step
            self.upkeep()
        for module in self._checkpointing:
            self._bind(module)
        wrapper = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
        if wrapper is not None and self.model.training and torch.is_grad_enabled():  # it may have been put on since
            for module in self.model.modules():
                if not isinstance(module, wrapper.CheckpointWrapper) or isinstance(module.checkpoint_fn, _Bound):
                    continue
                if module.checkpoint_impl is wrapper.CheckpointImpl.NO_REENTRANT:
                    module.checkpoint_fn = _Bound(self, module.checkpoint_fn)

    def upkeep(self) -> None:
        """Retract what an optimizer, or anyone, moved off the manifold since the last forward, in use now or later."""
        rotations = [rotation for layer in self.layers for rotation in layer.rotations()]
        refuse_parts(rotations)
        with _upkeep:
            for layer in self.layers:
                layer.widen()
            if any(hasattr(rotation.halved, "full_tensor") for rotation in rotations):
                keep_in_float32(self.model)
            # Those in training by value: writes through `.data` leave no trace in the version.
            restore([r for r in rotations if r.changed() or r.halved.requires_grad])

    def _told(self) -> tuple[Tensor | None, Tensor | None]:
        for forwards, *lengths in reversed(_told.get() if _telling[0] else ()):
            if forwards is self:
                return lengths[0], lengths[1]
        return None, None

    def _pass(self, role: Role, arguments: dict[str, Any], call: Call) -> Pass:
        """What is known of a forward; `call` is that of the whole model, where there is one."""
        past = cache_in(arguments) if role != "encoder" else None
        generation = call.generation if role != "encoder" else None
        ids = next((arguments[k] for k in ("input_ids", "inputs_embeds") if arguments.get(k) is not None), None)
        batch, length = ids.shape[:2] if isinstance(ids, Tensor) and ids.dim() >= 2 else (0, 0)
        mask = arguments.get("attention_mask")
        counts_tokens = ids is not None  # and not audio samples or frames, of which a hidden state covers several
        running = Pass(
            Prompt(),
            batch=batch,
            length=length,
            adapter_names=self.adapter_names(),
            repeats=self._generation() is not None,
            training=self.model.training and torch.is_grad_enabled(),
            notes=self.notes,
        )
        running.paged = is_paged(arguments.get("cache"))
        flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 and counts_tokens else None
        if generation is not None and generation.complete and past is not None:
            running.prompt, running.after_prompt = generation.prompt, True
            seen = past_length(past) if flat is not None else None
            running.mask = _first_columns(flat, seen + length if seen is not None else None)
            return running
        running.beside = any(value is not None and _OTHER.search(name) for name, value in arguments.items())
        start = past_length(past)
        if start is None and generation is not None:
            start = generation.given
        columns = start + length if start is not None and length else None
        if flat is not None and flat.shape[1] >= (columns or 0):
            running.mask = _first_columns(flat, columns)
        running.start = start or 0
        chunk = Chunk(role, start, columns, mask if counts_tokens else None, past)
        if generation is not None:
            self._place_generated(running, chunk, generation)
        else:
            self._place(running, chunk, call, arguments)
            if role == "model":
                self._look_at(running, call.labels)
            if role == "model" and not counts_tokens and isinstance(mask, Tensor) and running.prompt.lengths is None:
                running.prompt.blurred = not bool(mask.all())
        filled = getattr(past, "_reft_edits", None)
        if running.earlier is not None and filled is not None and not torch.compiler.is_compiling():
            running.check_filled(filled, self.edits())
        running.after_prompt = running.after_prompt or running.prompt.is_over(running.start, columns)
        return running

    def _place_generated(self, running: Pass, chunk: Chunk, generation: Generation) -> None:
        if chunk.role == "decoder":
            running.prompt = generation.decoder
            if running.prompt.real is None and not chunk.start:
                running.prompt.real = chunk.real()
        else:
            if generation.awaits_mask and chunk.columns is not None:
                generation.receive_mask(chunk.columns, chunk.real())
            running.prompt, running.earlier = generation.prompt, generation.earlier
            running.compared = generation.compared
        generation.given = chunk.columns or 0
        width = running.prompt.width if running.prompt.width is not None else chunk.columns
        generation.complete = chunk.past is not None and width is not None and generation.given >= width

    def _place(self, running: Pass, chunk: Chunk, call: Call, arguments: dict[str, Any]) -> None:
        """Where the prompt ends, for a forward that `generate` did not make."""
        kept = self._kept(chunk)
        lengths = call.decoder_lengths if chunk.role == "decoder" else call.lengths
        around = self._generation()
        if around is not None and chunk.start == 0:
            negative = around.negative_lengths(arguments.get("input_ids"))
            lengths = negative if negative is not None else lengths
        custom = around if around is not None and around.source is not None and lengths is None else None
        if custom is not None and self._place_custom(running, chunk, custom, kept, arguments):
            return
        if self._is_lm and chunk.start == 0 and not torch.compiler.is_compiling():
            running.unclear = packed_otherwise(chunk.mask, positions_in(arguments))
        if chunk.start is None:  # a recurrent state, which does not count what it has seen
            running.after_prompt = True
            running.prompt = Prompt(mid_sequence=running.length != 1)
        elif chunk.start and lengths is None:
            self._go_on(running, chunk, kept)
        else:
            if kept is not None and kept.fits(running.batch):
                running.earlier, running.compared = kept, chunk.start
            rows = running.batch if around is None else 0  # within generate rows are repeated, as for beams
            running.prompt, running.owner = self._prompt(chunk, call, lengths, arguments, rows or None)

    def _place_custom(
        self, running: Pass, chunk: Chunk, around: Generation, kept: Prompt | None, arguments: dict[str, Any]
    ) -> bool:
        """For a forward of a decoding loop of the caller's, if it goes on from the prompt or from a cache with it."""
        if chunk.role == "decoder":
            running.prompt = around.decoder
            return True
        if chunk.role == "encoder" or not (
            chunk.start == 0 or kept is around.prompt or (chunk.start is not None and chunk.start == around.compared)
        ):
            return False
        if chunk.start == 0 and not any(around.begins(arguments.get(name)) for name in ("inputs_embeds", "input_ids")):
            running.unclear = _CUSTOM
            return True
        if around.awaits_mask and chunk.columns is not None:
            around.receive_mask(chunk.columns, chunk.real())
        running.prompt = around.prompt
        if chunk.start:
            running.earlier, running.compared = around.earlier, around.compared
        return True

    def _look_at(self, running: Pass, labels: Any) -> None:
        """In training, at the labels: always on the CPU, else in the first steps only."""
        if torch.compiler.is_compiling() or not running.training or not isinstance(labels, Tensor):
            running.watched = not torch.compiler.is_compiling()
            return
        running.watched = self._may_look(labels)
        if running.watched and "turns" not in self.notes and labels.dim() == 2 and self._is_lm:
            running.several_turns = has_several_turns(labels, running.owner, running.prompt.real)

    def _kept(self, chunk: Chunk) -> Prompt | None:
        if chunk.start == 0:
            for name in ("_reft_prompt", "_reft_edits", "_reft_keys"):  # a cache that was emptied begins anew
                getattr(chunk.past, "__dict__", {}).pop(name, None)
        _follow_rows(chunk.past)
        return getattr(chunk.past, "_reft_prompt", None)

    def _go_on(self, running: Pass, chunk: Chunk, kept: Prompt | None) -> None:
        """Continue a cache without being told: a single token after its prompt is the answer's, and so is all that
        follows a prompt that was told. Otherwise the prompt is all there is by now, as it is for `generate`, if the
        cache does not hold other edits than that."""
        cut = kept is not None and (kept.width is None or running.start < kept.width)
        after = kept is not None and running.length <= 1 and (kept.fits(running.batch) if kept.told else not cut)
        if kept is not None and after:
            running.prompt = kept
            return
        if kept is None or not kept.fits(running.batch):
            running.prompt = Prompt(chunk.columns, chunk.real(), guessed=self._is_lm, foreign=True)
            return
        running.earlier, running.compared = kept, running.start if cut else chunk.columns or 0
        running.prompt = kept if kept.told else Prompt(chunk.columns, chunk.real(), guessed=self._is_lm)

    def _prompt(
        self, chunk: Chunk, call: Call, lengths: Tensor | None, arguments: dict[str, Any], rows: int | None
    ) -> tuple[Prompt, Tensor | None]:
        """Where the prompt ends, if no cache knows: said outright, by labels or by the mask; and packed rows'."""
        owner, real, width = None, chunk.real(), chunk.columns
        if chunk.role == "encoder":
            generation = self._generation()
            if lengths is None and generation is not None and not generation.started:
                lengths = generation.prompt.lengths
            elif lengths is not None and width is not None and self._may_look(lengths, real):
                as_lengths(lengths, rows, width if real is None else real.sum(1))
            return Prompt(width, real, lengths), None
        if chunk.start == 0 and not (isinstance(chunk.mask, Tensor) and chunk.mask.dim() == 2):
            owner, real = find_packed(positions_in(arguments)) or (None, real)
        if lengths is not None:
            if owner is not None and len(lengths) != len(owner):
                raise ValueError(
                    f"prompt_lengths: {len(lengths)} given, but {len(owner)} sequences are packed into this batch "
                    "(their position_ids start anew); give one a sequence."
                )
            most: int | Tensor | None = None
            if width is not None and self._may_look(lengths, real) and self._is_whole(chunk, lengths, arguments):
                most = width if real is None else real.sum(1)
            as_lengths(lengths, rows if owner is None else None, most, _FIRST_OF_SEVERAL)
            return Prompt(None, real, lengths, told=True), owner
        labels = call.labels
        if not (self._is_lm and isinstance(labels, Tensor) and labels.dim() == 2):
            return Prompt(width, real, guessed=self._is_lm), owner
        if chunk.role == "decoder":  # its input is a start token and then the labels
            return Prompt(width, real, first_supervised(labels, None) + 1), None
        labels = labels if owner is None else labels[owner.to(labels.device)]
        return Prompt(width, real, first_supervised(labels, real)), owner

    def _is_whole(self, chunk: Chunk, lengths: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether no more of the prompt can follow: nobody asked for a cache, or all lengths are the padded width."""
        if self.model.training:
            return True
        if torch.compiler.is_compiling():
            return False
        alone = chunk.past is None and (arguments.get("labels") is not None or not arguments.get("use_cache"))
        return alone or bool(lengths.eq(chunk.columns or 0).all())

    def _may_look(self, *tensors: Tensor | None) -> bool:
        """Whether the host may read these: always on the CPU, else in the first forwards only."""
        if not any(tensor is not None and tensor.is_cuda for tensor in tensors):
            return True
        if torch.compiler.is_compiling():
            return False
        self.looks[self.model.training] += 1  # evaluation uses up none of training's
        return self.looks[self.model.training] <= WATCHED

    @property
    def _is_lm(self) -> bool:
        """Whether labels and inputs run on from a prompt to an answer, unlike those of a classifier."""
        layer = self.layers[0] if self.layers else None
        tasks = [layer.tasks[name] for name in layer.active_adapters if name in layer.tasks] if layer else []
        if not tasks or tasks[0] is None:
            return bool(getattr(self.model, "can_generate", lambda: False)())
        return tasks[0] in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)

    # ---- generate --------------------------------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model, which also takes `prompt_lengths` (B,) and remembers where the prompt ends."""
        self.upkeep()
        lengths = kwargs.pop("prompt_lengths", None)
        kwargs.pop("decoder_prompt_lengths", None)  # a trainer's batch has them; here the decoder's input says it
        before, outer = _here.generations, self._generation()
        begun = None
        if getattr(kwargs.get("generation_config"), "is_assistant", False):  # for itself, or again for another model
            begun = outer.prompt if outer is not None else getattr(cache_in(kwargs), "_reft_prompt", None)
        if begun is not None:
            generation = Generation(begun)
        else:
            generation = self._start(args[0] if args else kwargs.get("inputs"), lengths, kwargs)
        _here.generations = (*before, (self, generation))
        token = _told.set(tuple(told for told in _told.get() if told[0] is not self))  # not of guidance's forwards
        try:
            return original(*args, **kwargs)
        finally:
            _told.reset(token)
            _here.generations = before

    def _start(self, inputs: Any, lengths: Any, kwargs: dict[str, Any]) -> Generation:
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        source = embeds if embeds is not None else inputs if inputs is not None else kwargs.get("input_ids")
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        widest = real if real is not None else source  # where a cache is continued the mask covers more than the input
        rows, width = widest.shape[:2] if isinstance(widest, Tensor) and widest.dim() >= 2 else (None, None)
        names = self.adapter_names() if self._generation() is None else None
        if names is not None and rows is not None and len(names) != rows:  # forwards allow for beams and take multiples
            raise ValueError(MISCOUNTED.format(len(names), rows))
        outer = self._generation()
        if lengths is None and outer is not None and outer.prompt.told and outer.begins(source):
            lengths = outer.prompt.lengths  # a custom_generate by its name calls generate again, with a function
        told = as_lengths(
            lengths if lengths is not None else self._told()[0], rows, real.sum(1) if real is not None else width
        )
        prompt = Prompt(width, real, told, told=told is not None)
        past = cache_in(kwargs)
        if past_length(past) is None and self._edits_some():
            raise ValueError(
                "generate: the cache holds a recurrent state, which does not say how many tokens it has seen, so which "
                "of those to come are edited is not known. Leave the cache out, and give the whole text."
            )
        start = past_length(past) or 0
        _follow_rows(past)
        earlier: Prompt | None = getattr(past, "_reft_prompt", None) if start else None
        earlier = earlier if earlier is None or earlier.fits(rows or 0) else None
        prompt.foreign = start > 0 and earlier is None and told is None
        generation = Generation(prompt, real is None, earlier, start)
        if kwargs.get("custom_generate") is not None and isinstance(source, Tensor):
            generation.source = source
        if (kwargs.get("guidance_scale") or 1) != 1:
            ids = kwargs.get("negative_prompt_ids")
            generation.negative = ids if ids is not None else source[:, -1:] if isinstance(source, Tensor) else None
            generation.negative_mask = kwargs.get("negative_prompt_attention_mask")
        return generation

    def _refuse_paged(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, before it starts: its worker would only log the error of a forward."""
        if self.guests or any(layer.active_adapters and not layer.disable_adapters for layer in self.layers):
            raise ValueError(PAGED)
        return original(*args, **kwargs)

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`prepare_inputs_for_generation`: its forward is this generation's own, which no other one is."""
        inputs, generation = original(*args, **kwargs), self._generation()
        alone = generation is None and "is_first_iteration" in kwargs  # which transformers' own loops say
        if alone and not kwargs.get("use_cache") and self._edits_some():
            raise ValueError(_PAST)
        if generation is not None:
            if kwargs.get("is_first_iteration"):
                generation.begin()
            inputs[GENERATION] = generation
        return inputs


_OTHER = re.compile("^pixel_values|_features$|^encoder_hidden_states$")
"""Arguments of a forward whose states some models put before those of the text."""


class _Bound:
    def __init__(self, forwards: Forwards, function: Callable[..., Any]) -> None:
        self.forwards, self.function = forwards, function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = self.forwards.current()
        return self.function(run if current is None else partial(self._rerun, current, run), *args, **kwargs)

    def _rerun(self, running: Pass, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.forwards.within(running):
            return run(*args, **kwargs)


class Chunk(NamedTuple):
    """What a forward was given."""

    role: Role
    start: int | None
    """Columns that the cache holds; None where it does not count."""
    columns: int | None
    """Those and the ones given now."""
    mask: Any
    past: Any

    def real(self) -> Tensor | None:
        return as_real(self.mask, self.columns)


def _follow_rows(past: Any) -> None:
    """Have what a cache remembers go with its rows, where they were reordered, repeated or taken out since."""
    record = getattr(past, "__dict__", {})
    if not {"_reft_prompt", "_reft_keys"} <= set(record) or torch.compiler.is_compiling():  # a graph leaves no keys
        return
    same = rows_among(past, record["_reft_keys"])
    if same is None:
        record["_reft_keys"] = keys_of(past)
        return
    prompt, filled = record.pop("_reft_prompt").of_rows(same), record.pop("_reft_edits")
    if prompt is None:
        return
    went: list[tuple[int, Edits]] = []
    for start, edits in filled or ():
        if len(edits) > 1:
            count = same.shape[1]
            may_be = [[edits[j * len(edits) // count] for j in row.nonzero().flatten().tolist()] for row in same]
            if any(made != own[0] for own in may_be for made in own):
                return
            edits = [own[0] for own in may_be]
        went.append((start, edits))
    record.update(_reft_prompt=prompt, _reft_edits=went or None, _reft_keys=keys_of(past))


def _first_columns(mask: Tensor | None, columns: int | None) -> Tensor | None:
    """A mask without what Bloom's has on the free places of a static cache."""
    return mask[:, :columns] if mask is not None and columns is not None and mask.shape[1] > columns else mask


def _entrances(model: nn.Module) -> dict[Role, nn.Module]:
    """The modules at which a forward may start: the model, what it wraps, and the halves of an encoder-decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"pair": model, "encoder": model.get_encoder(), "decoder": model.get_decoder()}  # type: ignore[operator]
    inner = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return {"model": model, "inner": inner} if isinstance(inner, nn.Module) and inner is not model else {"model": model}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    if not args:
        return kwargs
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}
