"""What the tests of trainers share: tiny models, short settings, what was learned, and which tokens were edited."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from helpers import tiny
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trimtab import ReftConfig
from trimtab.adapter.cache import cache_in
from trimtab.adapter.tuner import ReftLayer
from trimtab.edits.orthonormal import orthonormality_error

MODELS = Path(__file__).parents[2] / "models"


def base(tokenizer: PreTrainedTokenizerBase | None = None, name: str = "llama", **overrides: Any) -> nn.Module:
    if tokenizer is not None:
        overrides |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2}
    return tiny(name, **overrides)


def reft(**config: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l3", "init_weights": "paper", **config})


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    shown = {"output_dir": str(folder), "report_to": [], "logging_steps": 1, "disable_tqdm": True}
    return {**steps, **shown, "use_cpu": True, "bf16": False, "save_steps": 3, "weight_decay": 0.1, **more}


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "reft_" in n}


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@torch.no_grad()
def check_saved(trainer: Any, fresh_base: nn.Module, folder: Path, step: int = 3) -> None:
    """The checkpoint, loaded on a new base, is the very model that was trained."""
    trained = trainer.model.eval()
    loaded = PeftModel.from_pretrained(fresh_base, folder / f"checkpoint-{step}").eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
    for layer in (m for m in trained.modules() if isinstance(m, ReftLayer)):
        assert orthonormality_error(layer.edits("default")["edit"].rotation()) < 1e-6


class Probe:
    """Watches a Llama's first block: the tokens whose output changes between the block and what is read after it.

    It knows nothing of how edits are made. Each sequence must begin with one of `prompts`, and `f2+l3` of that prompt
    must be what changes: in the policy, not in the reference, not at padding, and not while decoding.
    """

    def __init__(self, model: PeftModel, prompts: list[list[int]] | None) -> None:
        self.prompts = prompts
        """Token ids; None where the whole sequence is the prompt, as for a classifier."""
        self.seen: Counter[str] = Counter()
        inner: Any = model.get_base_model().model
        block = inner.layers[0]
        self._layer: ReftLayer = block.reft
        self._hooks = [
            inner.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._keep_raw, prepend=True),
            block.register_forward_hook(self._compare),
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._ids = args[0] if args else kwargs["input_ids"]
        self._mask, self._places = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache = cache_in(kwargs)
        self._past = cache.get_seq_length() if cache is not None else 0

    def _keep_raw(self, module: nn.Module, args: Any, output: Any) -> None:
        self._raw = (output if isinstance(output, Tensor) else output[0]).detach()

    def _compare(self, module: nn.Module, args: Any, output: Any) -> None:
        states = (output if isinstance(output, Tensor) else output[0]).detach()
        changed = (states != self._raw).any(-1)
        if self._past:
            assert not changed.any()
            self.seen["decoded"] += len(changed)
            return
        for row in range(len(changed)):
            self._check_row(row, changed[row])

    def _check_row(self, row: int, changed: Tensor) -> None:
        real = torch.ones_like(changed) if self._mask is None else self._mask[row].bool()
        assert not changed[~real].any()
        ids, changed = self._ids[row][real].tolist(), changed[real]
        places = self._places[min(row, len(self._places) - 1)] if self._places is not None else torch.arange(len(real))
        starts = [i for i, place in enumerate(places[real].tolist() if len(real) == len(places) else []) if place == 0]
        for start, end in zip(starts or [0], [*starts[1:], len(ids)], strict=True):
            self._check_sequence(ids[start:end], changed[start:end].nonzero().flatten().tolist())

    def _check_sequence(self, ids: list[int], edited: list[int]) -> None:
        if self._layer.disable_adapters:
            assert edited == []
            self.seen["reference"] += 1
            return
        candidates = [len(p) for p in self.prompts if ids[: len(p)] == p] if self.prompts is not None else [len(ids)]
        assert candidates, f"no known prompt: {ids}"
        n = max(candidates)
        assert edited == sorted({*range(min(2, n)), *range(max(0, n - 3), n)}), (ids, n, edited)
        self.seen["edited"] += 1
