"""lm-evaluation-harness scores adapters: a model type, `trimtab`, in which a request's context is the prompt.

The harness's own type `hf` gives a model context and continuation as one text. A ReFT adapter takes all of it for the
prompt and edits the end of the answer that is being scored. Here every forward is told where its contexts end.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from trimtab.adapter.config import REFT
from trimtab.adapter.tuner import ReftModel

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as texts (None: a window of a rolling request) and as tokens."""
Answer = tuple[float, bool]
"""The log-probability of a continuation, and whether it is the greedy one."""

logger = logging.getLogger(__name__)


@register_model("trimtab")
class TrimtabLM(HFLM):  # type: ignore[misc]
    """HFLM for ReFT adapters; a model with another adapter, or none, is scored by HFLM itself.

    Args: as HFLM's, such as `pretrained="BASE", peft="ADAPTER"`, or a `PeftModel` and its tokenizer.
    """

    _model: Any

    @property
    def has_reft(self) -> bool:
        """Whether the model carries a ReFT adapter."""
        return isinstance(getattr(self.model, "base_model", None), ReftModel)

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        """HFLM cuts the vocabulary to the tokenizer's before it loads an adapter, which moves every score. A ReFT
        adapter goes onto the whole model, which then differs from the base by its edits alone."""
        revision = kwargs.get("revision")
        if not peft or kwargs.get("delta") or PeftConfig.from_pretrained(peft, revision=revision).peft_type != REFT:
            return super()._create_model(*args, peft=peft, **kwargs)  # type: ignore[no-any-return]
        super()._create_model(*args, **kwargs)
        if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
            self._model.resize_token_embeddings(len(self.tokenizer))
        self._model = PeftModel.from_pretrained(self._model, peft, revision=revision)

    def _model_call(
        self,
        inps: Tensor,
        attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: list[int] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of inputs (B, T), padded on the right, whose prompts are of these lengths."""
        if prompt_lengths is None:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            logits = self.model(input_ids=inps, prompt_lengths=prompt_lengths).logits
        return logits

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Score continuations after their contexts.

        Requests that differ in nothing but the last token of the continuation share a forward. Those whose contexts
        end elsewhere in the same text do not, since other tokens of it are edited.

        Raises:
            ValueError: a continuation is empty, or longer than the model takes.
        """
        if not self.has_reft or self.backend != "causal":  # an encoder's input is the context and nothing else
            answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        self._check_lengths(requests)
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_shared(request)].append(i)
        longest_first = sorted((requests[group[0]] for group in groups.values()), key=lambda r: -len(r[1]) - len(r[2]))
        found: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as progress:
            for batch in self._batches(longest_first, override_bs):
                for request, logits in zip(batch, self._continuation_logits(batch), strict=True):
                    log_probs = logits.log_softmax(-1, dtype=self.softmax_dtype)
                    for i in groups[_shared(request)]:
                        found[i] = _answer(log_probs, requests[i][2])
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                        progress.update()
        return [found[i] for i in range(len(requests))]

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        for _, _, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens: must be from 1 to {self.max_length}.")
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            logger.warning(
                "%d of %d requests lose the start of their context: the model takes %d tokens.",
                cut,
                len(requests),
                self.max_length,
            )

    def _batches(self, requests: list[Request], override_bs: int | None) -> Iterator[list[Request]]:
        auto = self.batch_size == "auto"
        self.batch_sizes: dict[int, int] = {}  # found for requests of another length
        size = (override_bs or 0) if auto else self.batch_size
        batches: Iterator[list[Request]] = Collator.get_chunks(
            requests, n=size, fn=self._batch_scheduler if auto and not override_bs else None
        )
        return batches

    def _continuation_logits(self, batch: Sequence[Request]) -> list[Tensor]:
        """For each request the logits (n, V) of its continuation's n tokens.

        What is too long loses tokens of the context from the left, and the prompt is what is left of it. A rolling
        request is the answer to an empty prompt, which is the token that the harness puts before a text; a window
        that starts later holds nothing of the prompt.
        """
        rows = [(context + continuation)[-self.max_length - 1 : -1] for _, context, continuation in batch]
        prompt_lengths = [
            0 if text is None and context != [self.prefix_token_id] else len(row) + 1 - len(continuation)
            for row, (text, context, continuation) in zip(rows, batch, strict=True)
        ]
        inputs = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
        logits = self._model_call(inputs, prompt_lengths=prompt_lengths)
        return [
            logits[i, len(row) - len(continuation) : len(row)]
            for i, (row, (_, _, continuation)) in enumerate(zip(rows, batch, strict=True))
        ]


def _shared(request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What requests have in common that one forward answers."""
    _, context, continuation = request
    return tuple(context), tuple(continuation[:-1])


def _answer(log_probs: Tensor, continuation: list[int]) -> Answer:
    """From log-probabilities (n, V) and n tokens."""
    target = torch.tensor(continuation, device=log_probs.device)
    return float(log_probs.gather(1, target[:, None]).sum()), bool((log_probs.argmax(-1) == target).all())


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, where the model type is `trimtab` unless `--model` says otherwise."""
    if arguments and arguments[0] in ("ls", "validate"):
        sys.argv[1:] = arguments
    else:
        sys.argv[1:] = ["run", "--model", "trimtab", *arguments[arguments[:1] == ["run"] :]]
    cli_evaluate()
