"""What is compared: ways of fine-tuning one frozen model, each in its own library's words.

A new contender is a row of `CONTENDERS`; a variant of one is its class with other options. Libraries are imported where
they are used, since no one environment has all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from samples import Sample
from torch import Tensor, nn

IGNORED = -100
Batch = dict[str, Any]
Where = Literal["own", "peers", "both"]


@dataclass(frozen=True)
class Plan:
    """What the contenders have in common; `layers` None is all of them."""

    r: int = 8
    first: int = 7
    last: int = 7
    layers: list[int] | None = None
    learning_rate: float = 1e-4

    @property
    def positions(self) -> str:
        parts = (f"f{self.first}" if self.first else "", f"l{self.last}" if self.last else "")
        return "+".join(part for part in parts if part)

    def blocks(self, model: Any) -> list[int]:
        return self.layers if self.layers is not None else list(range(model.config.num_hidden_layers))


@dataclass(frozen=True)
class EditValues:
    """LoReFT's parameters for one block: rotation (r, d), orthonormal rows; weight (r, d); bias (r,)."""

    rotation: Tensor
    weight: Tensor
    bias: Tensor


def edit_values(blocks: int, r: int, width: int, *, identity: bool, seed: int = 0) -> list[EditValues]:
    """The same values for every library: random, or random rotations with W = R and b = 0, which edit nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(blocks):
        rotation = torch.linalg.qr(torch.randn(width, r, generator=generator))[0].T.contiguous()
        weight = rotation + (0 if identity else 0.3) * torch.randn(r, width, generator=generator)
        values.append(EditValues(rotation, weight, torch.full((r,), 0.0 if identity else 0.1)))
    return values


def collate(samples: list[Sample], device: str) -> Batch:
    """A batch padded on the right, with labels at the answers."""
    width = max(len(s.prompt) + len(s.answer) for s in samples)
    fill = [width - len(s.prompt) - len(s.answer) for s in samples]
    rows = list(zip(samples, fill, strict=True))
    columns = {
        "input_ids": [[*s.prompt, *s.answer, *[0] * n] for s, n in rows],
        "attention_mask": [[1] * (width - n) + [0] * n for _, n in rows],
        "labels": [[*[IGNORED] * len(s.prompt), *s.answer, *[IGNORED] * n] for s, n in rows],
        "prompt_lengths": [len(s.prompt) for s in samples],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def following(labels: Tensor) -> Tensor:
    """The label of the token after each (B, T)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Contender:
    """One way to train. Subclasses set `model`, the module to train, and give `loss`."""

    has_edits: ClassVar[bool] = False
    """Whether it is LoReFT, whose parameters `set_edits` sets."""

    def __init__(self, base: Any, plan: Plan, **options: Any) -> None:
        self.base, self.plan = base, plan
        self.model: Any = base
        self.attach(**options)
        self.model.train()
        parameters = self.trainable()
        self.optimizer = self.make_optimizer(parameters) if parameters else None

    def attach(self, *args: Any, **options: Any) -> None:
        """Put the adapter on `base`, freshly; the row's options arrive here."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Batch:
        """What the library's data loading does, which is no part of a step."""
        return batch

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        """AdamW without weight decay, of which some peers' rotation dies."""
        return torch.optim.AdamW(parameters, lr=self.plan.learning_rate, weight_decay=0.0)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batch: Batch) -> Tensor:
        """Forward, loss, backward, optimizer step, zero_grad."""
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def set_edits(self, values: list[EditValues]) -> None:
        raise NotImplementedError

    def start_at_identity(self) -> None:
        """A start that leaves the model unchanged; LoRA's own does."""
        if self.has_edits:
            blocks, width = len(self.plan.blocks(self.base)), self.base.config.hidden_size
            self.set_edits(edit_values(blocks, self.plan.r, width, identity=True))


class Floor(Contender):
    """The least that training anything at the first edited block costs: one vector added to its output.

    Forward and backward only, and only supervised positions reach the vocabulary.
    """

    def attach(self) -> None:
        first = self.base.model.layers[self.plan.blocks(self.base)[0]]
        like = self.base.lm_head.weight
        self.vector = nn.Parameter(like.new_zeros(self.base.config.hidden_size))
        first.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output + self.vector if isinstance(output, Tensor) else (output[0] + self.vector, *output[1:])

    def trainable(self) -> list[nn.Parameter]:
        return [self.vector]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> None:
        return None

    def loss(self, batch: Batch) -> Tensor:
        hidden = self.base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        labels = following(batch["labels"])
        kept = labels != IGNORED
        return F.cross_entropy(self.base.lm_head(hidden[0][kept]).float(), labels[kept])

    def step(self, batch: Batch) -> Tensor:
        self.vector.grad = None
        return super().step(batch)


class BaseForward(Contender):
    """The frozen model's forward pass with its loss over the whole vocabulary, nothing trained."""

    def attach(self) -> None:
        pass

    def loss(self, batch: Batch) -> Tensor:
        return _language_model_loss(self.model, batch)

    @torch.no_grad()
    def step(self, batch: Batch) -> Tensor:
        return self.loss(batch)


class Trimtab(Contender):
    """LoReFT of this repository.

    Options:
        supervised: project only supervised positions onto the vocabulary, as `trimtab train` does.
        reuse: leave out what the frozen model repeats, where the positions and layers allow it.
        positions, layers: other than the plan's; "upper" is the upper half of the blocks.
    """

    has_edits = True

    def attach(
        self,
        supervised: bool = False,
        reuse: bool = False,
        positions: str | None = None,
        layers: Literal["upper"] | None = None,
    ) -> None:
        from peft import get_peft_model

        from trimtab import ReftConfig

        blocks = self.plan.blocks(self.base)
        self.blocks = blocks[len(blocks) // 2 :] if layers == "upper" else blocks
        every = len(self.blocks) == self.base.config.num_hidden_layers
        config = ReftConfig(
            task_type="CAUSAL_LM",
            r=self.plan.r,
            positions=positions or self.plan.positions,
            layers="all" if every else self.blocks,
        )
        self.model = get_peft_model(self.base, config)
        self.supervised = supervised
        self.reuse = self._reuse(config) if reuse else None

    def _reuse(self, config: Any) -> Any:
        from trimtab.runs.reuse import Store, choose_reuse

        found = choose_reuse(self.model, config, Store(int(4e9)), False)
        if isinstance(found, str):
            raise ValueError(f"nothing to reuse: {found}")
        return found

    def prepare(self, batch: Batch) -> Batch:
        if self.reuse is not None:  # so that the step measured is one from the second epoch on
            with self.reuse.applied(self._plain(batch)):
                pass
        return batch

    def loss(self, batch: Batch) -> Tensor:
        if self.reuse is None:
            return self._loss(self._plain(batch))
        with self.reuse.applied(self._plain(batch)) as lighter:
            return self._loss(lighter)

    def _loss(self, batch: Batch) -> Tensor:
        from trimtab.runs.trainer import with_supervised

        loss: Tensor = self.model(**(with_supervised(batch) if self.supervised else batch)).loss
        return loss

    def _plain(self, batch: Batch) -> Batch:
        return {k: v for k, v in batch.items() if isinstance(v, Tensor)}

    def set_edits(self, values: list[EditValues]) -> None:
        from peft import set_peft_model_state_dict

        state: dict[str, Tensor] = {}
        for block, each in zip(self.blocks, values[-len(self.blocks) :], strict=True):
            key = f"base_model.model.model.layers.{block}.reft.reft_edit."
            state |= {f"{key}rotation": each.rotation, f"{key}weight": each.weight, f"{key}bias": each.bias}
        set_peft_model_state_dict(self.model, state)


class Lora(Contender):
    """PEFT's LoRA, alpha 2 r, no dropout; `supervised` as for trimtab, which any causal language model can do."""

    def attach(self, targets: list[str], supervised: bool = False) -> None:
        from peft import LoraConfig, get_peft_model

        r = self.plan.r
        config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=targets)
        self.model = get_peft_model(self.base, config)
        self.supervised = supervised

    def loss(self, batch: Batch) -> Tensor:
        if not self.supervised:
            return _language_model_loss(self.model, batch)
        from trimtab.runs.trainer import with_supervised

        kept = with_supervised({k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")})
        loss: Tensor = self.model(**kept).loss
        return loss


class Pyreft(Contender):
    """LoReFT of pyreft: its model, its locations and its trainer's loss."""

    has_edits = True

    def attach(self) -> None:
        self.model = pyreft_model(self.base, self.plan)

    def trainable(self) -> list[nn.Parameter]:
        return list(self.model.get_trainable_parameters())

    def prepare(self, batch: Batch) -> Batch:
        import pyreft

        count = len(self.plan.blocks(self.base))
        locations = [
            pyreft.get_intervention_locations(
                last_position=length, positions=self.plan.positions, num_interventions=count, share_weights=True
            )
            for length in batch["prompt_lengths"].tolist()
        ]
        return {**batch, "intervention_locations": torch.tensor(locations)}

    def loss(self, batch: Batch) -> Tensor:
        return pyreft_loss(self.model, batch)

    def set_edits(self, values: list[EditValues]) -> None:
        for edit, each in zip(pyreft_edits(self.model), values, strict=True):
            with torch.no_grad():
                edit.rotate_layer.weight = each.rotation.T.to(edit.rotate_layer.weight)
                edit.learned_source.weight.copy_(each.weight)
                edit.learned_source.bias.copy_(each.bias)


def pyreft_model(base: Any, plan: Plan) -> Any:
    """pyreft's model for the plan: one edit a block, shared by prefix and suffix."""
    import pyreft

    width = base.config.hidden_size
    representations = [
        {
            "layer": block,
            "component": "block_output",
            "low_rank_dimension": plan.r,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=width, low_rank_dimension=plan.r, dtype=base.lm_head.weight.dtype
            ),
        }
        for block in plan.blocks(base)
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations), set_device=False)
    model.set_device(base.lm_head.weight.device)
    return model


def pyreft_edits(model: Any) -> list[Any]:
    """Its interventions, by block."""
    return [v[0] if isinstance(v, tuple | list) else v for v in model.interventions.values()]


def pyreft_loss(model: Any, batch: Batch) -> Tensor:
    """The loss as pyreft's trainer computes it; the trainer itself does not run on a current transformers."""
    from pyreft import ReftTrainer

    loss: Tensor = ReftTrainer.compute_loss(None, model, batch)
    return loss


class Adapters(Contender):
    """LoReFT of AdapterHub's adapters. In training its suffix ends the answer, not the prompt; it costs the same."""

    has_edits = True

    def attach(self) -> None:
        import adapters

        plan = self.plan
        adapters.init(self.base)
        config = adapters.LoReftConfig(
            r=plan.r,
            prefix_positions=plan.first,
            suffix_positions=plan.last,
            tied_weights=True,
            dropout=0.0,
            layers="all" if plan.layers is None else plan.layers,
        )
        self.base.add_adapter("reft", config=config)
        self.base.train_adapter("reft")
        self.base.to(self.base.lm_head.weight.device)

    def loss(self, batch: Batch) -> Tensor:
        return _language_model_loss(self.model, batch)

    def set_edits(self, values: list[EditValues]) -> None:
        units = [m for m in self.base.modules() if type(m).__name__ == "ReftUnit"]
        for unit, each in zip(units, values, strict=True):
            with torch.no_grad():
                unit.projection.weight = each.rotation.to(unit.projection.weight)
                unit.learned_source.weight.copy_(each.weight)
                unit.learned_source.bias.copy_(each.bias)


def _language_model_loss(model: Any, batch: Batch) -> Tensor:
    """The model's own loss: what a Trainer calls."""
    loss: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    return loss


@dataclass(frozen=True)
class Row:
    """A contender, the environment that it needs, its options, and a word on it for readers."""

    kind: Callable[..., Contender]
    where: Where
    options: dict[str, Any] = field(default_factory=dict)
    standard: bool = True
    """Whether it runs when no methods are named."""


ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS: dict[str, Row] = {
    "floor": Row(Floor, "both"),
    "base-forward": Row(BaseForward, "own"),
    "trimtab": Row(Trimtab, "own", {"supervised": True}),
    "trimtab-all-logits": Row(Trimtab, "own"),
    "peft-lora": Row(Lora, "own", {"targets": ATTENTION}),
    "peft-lora-all": Row(Lora, "own", {"targets": LINEAR}),
    "peft-lora-supervised": Row(Lora, "own", {"targets": ATTENTION, "supervised": True}),
    "pyreft": Row(Pyreft, "peers"),
    "adapters": Row(Adapters, "peers"),
    "trimtab-l4": Row(Trimtab, "own", {"supervised": True, "positions": "l4"}, standard=False),
    "trimtab-l4-reuse": Row(Trimtab, "own", {"supervised": True, "positions": "l4", "reuse": True}, standard=False),
    "trimtab-upper": Row(Trimtab, "own", {"supervised": True, "layers": "upper"}, standard=False),
    "trimtab-upper-reuse": Row(Trimtab, "own", {"supervised": True, "layers": "upper", "reuse": True}, standard=False),
}
STANDARD = [name for name, row in CONTENDERS.items() if row.standard]


def shared_copy(base: Any) -> Any:
    """A copy of the model that shares its weights, for a contender to change as it likes."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(t): t for t in tensors})


def build(name: str, base: Any, plan: Plan) -> Contender:
    """The contender on a copy of `base`, at a start that leaves the model unchanged."""
    row = CONTENDERS[name]
    contender = row.kind(shared_copy(base), plan, **row.options)
    contender.start_at_identity()
    return contender
