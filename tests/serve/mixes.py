"""A model with adapters of every kind, served by slots, and the same by plain `generate`: the truth."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from trimtab import ReftConfig, set_scale
from trimtab.serve.engine import Applied, Event, Request, Sampling
from trimtab.serve.registry import Registry
from trimtab.serve.slots import Limits, SlotsEngine
from trimtab.serve.table import AdapterTable, Layout
from trimtab.where.sites import find_sites

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "suffix": {"positions": "l5"},
    "prefix": {"positions": "f4", "r": 2},
    "untied": {"positions": "f3+l2", "tied": False},
    "prompt": {"positions": "prompt", "method": "direft"},
    "generated": {"positions": "generated", "method": "noreft"},
    "all": {"positions": "all", "method": "lobireft"},
    "random": {"positions": "random6", "method": "direft_orthonormal"},
    "constant": {"method": "consreft", "layers": [0, -1]},
    "gelu": {"activation": "gelu", "positions": "f2+l3"},
    "tanh": {"activation": "tanh", "method": "direft", "positions": "prompt", "layers": [1]},
    "scaled": {"method": "red", "positions": "f2+l2", "r": None},
}
"""Adapters; each is made twice, with other values."""
RANK = 8
SMALL: dict[str, Any] = {"slots": 6, "max_len": 128, "block": 4, "queue_seconds": 1e9}


@dataclass(frozen=True)
class Asked:
    """A request by names, which `Served` can answer both ways."""

    prompt: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...] = ()
    new: int = 8


class Served:
    """A model with adapters of all kinds, two of each: in the table of a server, and under PEFT."""

    def __init__(
        self,
        model: Any,
        folder: Path,
        strength: float = 1.0,
        kinds: Mapping[str, dict[str, Any]] = KINDS,
        site: str = "block",
    ) -> None:
        self.model, self.folder, self.kinds, self.site = model, folder, kinds, site
        model.generation_config.eos_token_id = None
        self.sites = find_sites(model, site, "all")
        self.names = [f"{kind}{i}" for kind in kinds for i in (1, 2)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.peft = self._peft(copy.deepcopy(model))
            self._spread(strength)
        self.peft.save_pretrained(str(folder), selected_adapters=self.names)
        self._answers: dict[Asked, list[int]] = {}

    def _spread(self, strength: float) -> None:
        for name, parameter in self.peft.named_parameters():
            if "reft" in name and not name.endswith("halved"):
                parameter.data.mul_(strength).add_(torch.randn_like(parameter), alpha=0.1)  # some start at zero

    def _peft(self, model: Any) -> Any:
        configs = {
            name: ReftConfig(
                **{"task_type": "CAUSAL_LM", "init_weights": "paper", "site": self.site, **self.kinds[name[:-1]]}
            )
            for name in self.names
        }
        peft = get_peft_model(model, configs[self.names[0]], adapter_name=self.names[0])
        for name in self.names[1:]:
            peft.add_adapter(name, configs[name])
        return peft.eval()

    def truth(self, asked: Asked) -> list[int]:
        """The tokens of plain `generate`, alone."""
        if asked not in self._answers:
            for name, scale in asked.adapters:
                set_scale(self.peft, name, scale)
            if asked.adapters:
                self.peft.base_model.set_adapter([name for name, _ in asked.adapters])
                self._answers[asked] = self._generated(asked)
            else:
                with self.peft.disable_adapter():
                    self._answers[asked] = self._generated(asked)
        return self._answers[asked]

    def _generated(self, asked: Asked) -> list[int]:
        ids = torch.tensor([asked.prompt])
        out = self.peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.new,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(asked.prompt) :].tolist()
        return tokens

    def engine(self, entries: int = 12, tokenizer: Any = None, **limits: Any) -> SlotsEngine:
        table = AdapterTable(Layout(self.sites, RANK), entries)
        self.registry = Registry(table.layout, self.folder)
        return SlotsEngine(self.model, table, tokenizer, Limits(**{**SMALL, **limits}))

    def request(self, id: str, asked: Asked, **sampling: Any) -> Request:
        applied = tuple(Applied(self.registry.get(name), scale) for name, scale in asked.adapters)
        settings = Sampling(**{"max_tokens": asked.new, "temperature": 0, **sampling})
        return Request(id, asked.prompt, settings, applied)

    def mixes(
        self, count: int, seed: int, longest: int, vocabulary: int, names: Sequence[str] | None = None
    ) -> list[Asked]:
        """Requests that share beginnings of a few texts, cut at any length; of some adapters, or all."""
        rng = random.Random(seed)
        texts = [[rng.randrange(5, vocabulary) for _ in range(longest)] for _ in range(3)]
        made = []
        for _ in range(count):
            some = rng.sample(names or self.names, rng.choice([0, 1, 1, 1, 1, 2]))
            adapters = tuple((name, rng.choice([1.0, 1.0, 1.0, 0.5, -0.7, 0.0])) for name in some)
            made.append(Asked(tuple(rng.choice(texts)[: rng.randint(2, longest)]), adapters, rng.randint(1, 10)))
        return made


class Inbox:
    """What requests said."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}

    def of(self, id: str) -> Any:
        return self.events.setdefault(id, []).append

    def tokens(self, id: str) -> list[int]:
        return [token for event in self.events[id] for token in event.tokens]

    def text(self, id: str) -> str:
        return "".join(event.text for event in self.events[id])

    def last(self, id: str) -> Event:
        """Its last event, after making sure that it is the only last one."""
        *others, last = self.events[id]
        assert last.finish_reason is not None and all(event.finish_reason is None for event in others)
        return last


def drive(engine: SlotsEngine, requests: Iterable[Request], each: int = 2) -> Inbox:
    """Submit `each` requests a step, and run steps until all have ended."""
    waiting, inbox = list(requests), Inbox()
    while waiting or engine.stats().waiting or engine.stats().running:
        for request in waiting[:each]:
            engine.submit(request, inbox.of(request.id))
        del waiting[:each]
        engine.step()
    return inbox


def mismatches(served: Served, engine: SlotsEngine, asked: Sequence[Asked], each: int = 2) -> list[Asked]:
    """Those that the engine answers otherwise than `generate`."""
    ids = {f"r{i}": one for i, one in enumerate(asked)}
    inbox = drive(engine, [served.request(id, one) for id, one in ids.items()], each)
    return [one for id, one in ids.items() if inbox.tokens(id) != served.truth(one)]
