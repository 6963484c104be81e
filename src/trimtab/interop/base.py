"""The base model of a conversion: its skeleton without weights, where modules are looked up, and the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import transformers
from peft import TaskType
from torch import Tensor, nn

from trimtab.adapter.hooks import first_of, with_first
from trimtab.errors import ConversionError
from trimtab.runs.models import device, loading
from trimtab.where.plan import Part, edited
from trimtab.where.positions import Positions
from trimtab.where.sites import Site, find_sites

TASKS: dict[str, Any] = {
    TaskType.CAUSAL_LM.value: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM.value: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS.value: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS.value: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS.value: transformers.AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: transformers.AutoModel,
}
_CLASSES = {
    "ForCausalLM": TaskType.CAUSAL_LM.value,
    "LMHeadModel": TaskType.CAUSAL_LM.value,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM.value,
    "ForSequenceClassification": TaskType.SEQ_CLS.value,
    "ForTokenClassification": TaskType.TOKEN_CLS.value,
    "ForQuestionAnswering": TaskType.QUESTION_ANS.value,
    "Model": TaskType.FEATURE_EXTRACTION.value,
}

Runner = Callable[[Tensor, int], Tensor]
"""What a model says: token ids (1, T) and how many of them are the prompt -> logits (1, T, V), or (1, C) of a class."""


def task_of(model_class: str) -> str | None:
    """PEFT's task type of a transformers class, by how its name ends."""
    return next((task for end, task in _CLASSES.items() if model_class.endswith(end)), None)


@dataclass(frozen=True)
class Base:
    """A base model by local folder or Hub name, and the task whose head it carries."""

    name: str
    task: str | None = None
    """PEFT's task type as a plain string; None: as the model's own config says."""
    labels: int | None = None
    """Classes, where the task is to classify; None: as the model's own config says."""
    config: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with loading(self.name):
            config = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False)
        object.__setattr__(self, "config", config)
        if self.task is not None and self.task not in TASKS:
            raise ConversionError(f"--task {self.task}: must be one of {', '.join(TASKS)}.")
        if self.task is None:
            own = (config.architectures or ["Model"])[0]
            object.__setattr__(self, "task", task_of(own) or TaskType.FEATURE_EXTRACTION.value)
        if self.labels not in (None, config.num_labels) and self.task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            config.num_labels = self.labels

    @property
    def _auto(self) -> Any:
        """The Auto class of the task; a model that reads images too answers as a causal one."""
        pair = TASKS[TaskType.SEQ_2_SEQ_LM.value]
        auto = TASKS[str(self.task)]
        return transformers.AutoModelForImageTextToText if auto is pair and not self.config.is_encoder_decoder else auto

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device, where it takes no memory."""
        with loading(self.name), torch.device("meta"):
            model: nn.Module = self._auto.from_config(self.config, trust_remote_code=False)
        return model

    def load(self, dtype: str | torch.dtype = torch.float32) -> Any:
        """The model itself, whole and in eval mode, a head without weights the same every time.

        Raises:
            ModelError: its weights are not at hand.
        """
        with loading(self.name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._auto.from_pretrained(self.name, config=self.config, dtype=dtype, trust_remote_code=False)
        return model.eval().to(device())

    def sites(self, site: str, layers: str | list[int] = "all") -> list[Site]:
        """As a config's `site` and `layers` mean it, by `find_sites`."""
        return find_sites(self.skeleton, site, layers)

    def module_of(self, site: str, index: int) -> str:
        """The name of a block, or of its attention or MLP.

        Raises:
            ConversionError: the model has fewer.
        """
        sites = self.sites(site)
        if not 0 <= index < len(sites):
            raise ConversionError(f"layer {index}: {self.name} has blocks 0 to {len(sites) - 1}: another base model.")
        return sites[index].name

    def place_of(self, modules: Iterable[str]) -> tuple[str, str | list[int]]:
        """The `site` and `layers` of a config that edits exactly these modules.

        Raises:
            ConversionError: the model has no such module.
        """
        wanted = set(modules)
        missing = sorted(wanted - {name for name, _ in self.skeleton.named_modules()})
        if missing:
            raise ConversionError(f"{self.name} has no module {missing[0]!r}: give --base the model it was trained on.")
        for site in ("block", "attention", "mlp"):
            try:
                names = [found.name for found in self.sites(site)]
            except ValueError:
                continue
            if wanted <= set(names):
                return site, "all" if wanted == set(names) else [i for i, n in enumerate(names) if n in wanted]
        return "|".join(re.escape(name) for name in sorted(wanted)), "all"

    def whole_modules(self, parameters: Iterable[str]) -> list[str]:
        """The modules, such as a classifier, that these parameters make up wholly.

        Raises:
            ConversionError: they are only part of one: PEFT saves modules whole.
        """
        given = set(parameters)
        names = sorted({_head_of(name) for name in given})
        for name in names:
            own = {n for n, _ in self.skeleton.named_parameters() if n.startswith(f"{name}.")}
            if own != {n for n in given if n.startswith(f"{name}.")}:
                raise ConversionError(
                    f"{name}: holds trained parameters ({', '.join(sorted(given)[:3])}) that are no whole module of "
                    f"{type(self.skeleton).__name__}; only whole ones, such as a classifier, can be kept. Is --task "
                    "the task it was trained for?"
                )
        return names


def _head_of(parameter: str) -> str:
    return parameter.partition(".")[0]


def by_hand(
    base: Base,
    functions: Mapping[tuple[str, str], Callable[[Tensor], Tensor]],
    positions: Positions,
    modules: Mapping[str, Tensor] | None = None,
) -> Runner:
    """Run the base with h (n, d) replaced by function(h) at the outputs of modules: what a file says, without PEFT.

    Args:
        functions: by module and part (`edit`, `prefix`, `suffix`).
        modules: parameters to put in place of the base's own, such as a classifier's.
    """
    model = base.load()
    model.load_state_dict(dict(modules or {}), strict=False)

    def hook(name: str, ids: Tensor, prompt: int) -> Any:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = first_of(output).clone()
            for (own, part), function in functions.items():
                if own == name:
                    rows = list(edited(positions, prompt, 0, ids.shape[1], cast(Part, part)))
                    hidden[0, rows] = function(hidden[0, rows].cpu()).to(hidden)
            return hidden if isinstance(output, Tensor) else with_first(output, hidden)

        return model.get_submodule(name).register_forward_hook(edit)

    def run(ids: Tensor, prompt: int) -> Tensor:
        handles = [hook(name, ids, prompt) for name in dict.fromkeys(name for name, _ in functions)]
        try:
            return logits_of(model, ids)
        finally:
            for handle in handles:
                handle.remove()

    return run


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head, in float32 on the CPU."""
    ids = ids.to(model.device)
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids
    output = model(input_ids=ids, **kwargs)
    found = output.logits if hasattr(output, "logits") else output[0]
    return found.float().cpu()  # type: ignore[no-any-return]


def samples(base: Base, longest: int, count: int = 3) -> list[tuple[Tensor, int]]:
    """Rows of tokens drawn from the vocabulary (the model needs no tokenizer for it), and how many are the prompt.

    Args:
        longest: tokens that an adapter edits at most; prompts are longer, as far as the model allows.
    """
    random = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**30
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    tail = 4 if base.task == TaskType.CAUSAL_LM else 0
    rows = []
    for i in range(count):
        total = min(max(12, longest + 1) + 3 * i + tail, limit - 8)
        ids = torch.randint(vocabulary, (1, total), generator=random)
        rows.append((ids if pad is None else ids.masked_fill(ids == pad, vocabulary - 1), total - tail))
    return rows
