"""What the slots engine must know of a model: its cache, its masks, and whether it runs as it does by itself.

Shapes: rows B · queries Q · columns W of keys.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from trimtab.adapter.cache import CACHE, cache_of
from trimtab.serve.cache import RowCache, Shapes


class NotServed(ValueError):
    """A model that the slots engine cannot run. The message names it and says why."""


class ServedModel:
    """A causal language model run on rows of a `RowCache`, in eval mode and with attention that takes any mask.

    Raises:
        NotServed: its cache is not keys and values, or its positions depend on the longest row of a batch.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.device, self.dtype = model.device, model.dtype
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._before = (model.training, model.config._attn_implementation)
        self._refuse_by_config()
        if self._before[1] not in ("sdpa", "eager"):
            model.set_attn_implementation("sdpa")
        model.eval()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shapes = self._cache_shapes()
        unknown = sorted(set(self._kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise NotServed(f"{self.name}: has layers of kind {', '.join(unknown)}, which slots do not run.")

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def max_len(self) -> int | None:
        """Tokens that its positions reach, if it says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def _kinds(self) -> list[str]:
        """Of attention, where the model says so."""
        return sorted(set(getattr(self.config, "layer_types", None) or ()))

    def alone(self, tokens: list[int]) -> Tensor:
        """Logits (n, V) of the model's own forward of one sequence."""
        ids = torch.tensor([tokens], device=self.device)
        logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits[0].float()

    def close(self) -> None:
        """The model as it was."""
        training, attention = self._before
        self.model.train(training)
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)

    def _refuse_by_config(self) -> None:
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = {str(own.get("rope_type")) for own in (rope, *rope.values()) if isinstance(own, dict)}
        if kinds & {"dynamic", "longrope"}:
            raise NotServed(
                f"{self.name}: its rotary positions ({', '.join(sorted(kinds))}) depend on the longest row of a "
                "batch, so one request would change another's answer. Serve it with another engine."
            )
        if getattr(self.config, "is_encoder_decoder", False):
            raise NotServed(f"{self.name}: is an encoder-decoder; the server runs causal language models.")
        if getattr(self.config, "alibi", False) or self.config.model_type in ("bloom", "mpt"):
            raise NotServed(
                f"{self.name}: its positions (ALiBi) are read off a mask of tokens, which rows of a shared cache lack."
            )

    @torch.no_grad()
    def _cache_shapes(self) -> Shapes:
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        output = self.model(input_ids=one, attention_mask=one, use_cache=True)
        layers = getattr(cache_of(output), "layers", None)
        tensors = [getattr(layer, name, None) for layer in layers or [] for name in ("keys", "values")]
        held = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() == 4]
        if not held or len(held) < len(tensors):
            raise NotServed(f"{self.name}: slots hold keys and values, and its cache is not just those in every layer.")
        return [(tensor.shape[1], tensor.shape[3]) for tensor in held]

    def __call__(
        self, ids: Tensor, place: Tensor, positions: Tensor, width: int, cache: RowCache, everything: bool = False
    ) -> Tensor:
        """Logits (B, V) of the last query, or (B, Q, V) of every one, in float32.

        Args:
            ids: (B, Q) tokens.
            place: (B, Q) columns that their keys go to; they read those at or before it.
            positions: (B, Q) that the model is told.
            width: columns that are read at most.
        """
        last = {"logits_to_keep": 1} if self._keeps and not everything else {}
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(place, width),
            use_cache=True,
            **{CACHE: cache},
            **last,
        )
        logits: Tensor = output.logits.float()
        return logits if everything else logits[:, -1]

    def _masks(self, place: Tensor, width: int) -> Any:
        """One mask, or one for each kind of layer where a model has several."""
        kinds, window = self._kinds, getattr(self.config, "sliding_window", None)
        if len(kinds) < 2:
            return self._mask(place, width, window if kinds != ["full_attention"] else None)
        return {kind: self._mask(place, width, window if kind != "full_attention" else None) for kind in kinds}

    def _mask(self, place: Tensor, width: int, window: int | None) -> Tensor:
        """(B, 1, Q, W), to be added to scores; of a bool one attention would make such a one in every layer."""
        columns = torch.arange(width, device=self.device)
        hidden = columns > place.unsqueeze(-1)
        if window is not None and width > window:
            hidden |= columns <= place.unsqueeze(-1) - window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self.dtype).min).unsqueeze(1)
