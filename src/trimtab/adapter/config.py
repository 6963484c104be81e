"""`ReftConfig`: what a ReFT adapter is, checked before any model is touched."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

from peft import PeftConfig, PeftType

from trimtab.adapter.card import complete_card
from trimtab.adapter.joint import as_lora
from trimtab.adapter.readout import POOLS
from trimtab.adapter.weights import PICKLE, WEIGHTS, check_kind, read_tensors, weights_in
from trimtab.edits import ACTIVATIONS, METHODS
from trimtab.where.plan import Part
from trimtab.where.positions import Positions, Turns, parse_positions

REQUIRES = "import trimtab, before PEFT opens this file"


def extend_peft_types(name: str) -> PeftType:
    """Add a method to PEFT's enum of them, which its registry demands before it takes one.

    Raises:
        ImportError: PEFT has one of that name by now.
    """
    if name in PeftType.__members__:
        raise ImportError(
            f"this version of peft already has a method called {name}, which trimtab would hide. "
            "Use peft's own, or install an older peft."
        )
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


REFT = extend_peft_types("REFT")
LORA_AT = extend_peft_types("LORA_AT")


class OwnFiles(PeftConfig):
    """A config whose folder is checked before PEFT opens it, and says on its card what is needed to open it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config in an adapter's folder, whose weights are looked at first if they are here.

        Raises:
            AdapterError: the weights beside it are no file, or a pickle of more than tensors. PEFT, which opens them
                next, would say less, with the edits on the model already.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        path = weights_in(folder)
        check_kind(path)
        if path.name == PICKLE:
            read_tensors(path)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the model card beside it what is needed to open the adapter.

        Raises:
            AdapterError: PEFT has just written a pickle without the whole tensors, as from one process of several.
        """
        folder = Path(save_directory)
        weights, pickle = folder / WEIGHTS, folder / PICKLE
        if weights_in(folder) == pickle:
            read_tensors(pickle)
        elif pickle.exists() and weights.stat().st_mtime_ns < pickle.stat().st_mtime_ns:
            warnings.warn(f"{weights}: of an earlier save, and read before {PICKLE}. Remove one of them.", stacklevel=3)
        super().save_pretrained(save_directory, **kwargs)
        complete_card(folder)


@dataclass
class ReftConfig(OwnFiles):
    """Configuration of a ReFT adapter (Wu et al. 2024, arXiv:2404.03592).

    Examples:
        >>> ReftConfig(task_type="CAUSAL_LM", method="loreft", r=4, positions="f7+l7", layers="all")

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    method: str = field(default="loreft", metadata={"help": f"The edit: {', '.join(METHODS)}."})
    r: int | None = field(
        default=4, metadata={"help": "Rank of the edit, at most the width of the model; null for a method without one."}
    )
    positions: str = field(
        default="f7+l7",
        metadata={
            "help": "Edited tokens: fN, lN, fN+lM (first N and last M of the prompt), prompt, generated or all; "
            "randomN, a control."
        },
    )
    edit_turns: Turns = field(
        default="each",
        metadata={
            "help": "What the prompt is in a conversation: of each answer all that comes before it, or for all of them "
            "what comes before the 'first' answer."
        },
    )
    layers: Literal["all"] | list[int] = field(
        default="all", metadata={"help": "Edited blocks: 'all' or a list of indices, negative from the end."}
    )
    site: str = field(
        default="block",
        metadata={
            "help": "Whose output is edited: block, attention, mlp, heads (attention's, before their projection), or a "
            "regular expression that matches module names whole, as target_modules does elsewhere in PEFT."
        },
    )
    tied: bool = field(
        default=True, metadata={"help": "One edit for prefix and suffix, or (False) one each; False needs fN+lM."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edit, never on the hidden state."})
    activation: str | None = field(
        default=None, metadata={"help": f"Applied to W h + b: null or {', '.join(ACTIVATIONS)}."}
    )
    init_weights: bool | Literal["paper"] = field(
        default=True,
        metadata={
            "help": "True: a fresh adapter changes nothing. 'paper' (or False): random values, as pyreft starts."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the edits, such as a classifier."}
    )

    lora: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "A LoRA trained with the edits and saved with them: fields of peft.LoraConfig, or null."},
    )

    pool: str | None = field(
        default=None,
        metadata={"help": "What `trimtab.set_pool` was told of the classifier, which must be told it again; or null."},
    )

    base_digest: str | None = field(
        default=None,
        metadata={"help": "Of the base model's blocks, as saving found them, which loading compares; or null."},
    )

    requires: str = field(
        default=REQUIRES, metadata={"help": "For people who open the file; what it says there does not count."}
    )

    # Read by PEFT of every tuner's config; a ReFT adapter is placed by `layers` and `site` instead.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type, self.requires = REFT, REQUIRES
        self._check_choice("method", METHODS)
        takes = METHODS[self.method].takes
        if "r" not in takes:
            self.r = None
        else:
            self._check(
                isinstance(self.r, int) and _is_int(self.r) and self.r >= 1, "r", "a whole number of at least 1"
            )
        positions = parse_positions(self.positions)
        self._check_choice("edit_turns", get_args(Turns))
        if isinstance(self.layers, tuple | set | range):
            self.layers = list(cast(Any, self.layers))
        if isinstance(self.modules_to_save, tuple | set):
            self.modules_to_save = list(cast(Any, self.modules_to_save))
        self._check(
            self.layers == "all"
            or (isinstance(self.layers, list) and len(self.layers) > 0 and all(map(_is_int, self.layers))),
            "layers",
            "'all' or a list of block indices such as [0, 3, -1]",
        )
        if isinstance(self.layers, list):
            self._check(len(set(self.layers)) == len(self.layers), "layers", "each block once")
        allowed = "block, attention, mlp, heads or a module pattern"
        self._check(isinstance(self.site, str) and self.site != "", "site", allowed)
        self._check(isinstance(self.tied, bool), "tied", "true or false")
        if not self.tied and not (positions.first and positions.last):
            raise ValueError(
                f"tied=False: needs a prefix and a suffix to edit apart, but positions={self.positions!r}. "
                "Give positions like 'f7+l7', or leave tied=True."
            )
        self._check(
            isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool) and 0 <= self.dropout < 1,
            "dropout",
            "a number from 0 up to, not including, 1",
        )
        if self.activation is not None:
            self._check_choice("activation", ACTIVATIONS)
        if self.activation and "activation" not in takes:
            raise ValueError(f"activation={self.activation!r}: method {self.method!r} has no W h + b to apply it to.")
        self._check(
            isinstance(self.init_weights, bool) or self.init_weights == "paper",
            "init_weights",
            "True, False or 'paper'",
        )
        self._check(
            self.modules_to_save is None
            or (isinstance(self.modules_to_save, list) and all(isinstance(name, str) for name in self.modules_to_save)),
            "modules_to_save",
            "null or a list of module names such as ['classifier']",
        )
        self._check(self.pool is None or self.pool in POOLS, "pool", f"null or one of {', '.join(POOLS)}")
        if self.lora is not None:
            as_lora(self.lora)
        self._check(self.base_digest is None or isinstance(self.base_digest, str), "base_digest", "null or a digest")
        self._check(
            self.base_model_name_or_path is None or isinstance(self.base_model_name_or_path, str | PathLike),
            "base_model_name_or_path",
            "null, a folder or a Hub name",
        )

    @property
    def parsed_positions(self) -> Positions:
        return replace(parse_positions(self.positions), turns=self.edit_turns)

    @property
    def method_text(self) -> str:
        """The method and its rank, if it has one, for people."""
        text = self.method if self.r is None else f"{self.method}, rank {self.r}"
        return text if self.lora is None else f"{text}, with a LoRA of rank {as_lora(self.lora).r}"

    def edit_names(self) -> tuple[Part, ...]:
        """The edits of one block: `edit` where prefix and suffix share one, else `prefix` and `suffix`."""
        return ("edit",) if self.tied else ("prefix", "suffix")

    def _check(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}.")

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            close = difflib.get_close_matches(str(value).lower(), choices, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}.{hint}")


_ELSEWHERE = {
    "rank": "r",
    "low_rank_dimension": "r",
    "lora_r": "r",
    "target_modules": "site (block, attention, mlp, heads or a pattern of module names) and layers",
    "component": "site",
    "layer": "layers",
    "layers_to_transform": "layers",
    "intervention_type": "method",
    "intervention": "method and r, as in method='loreft', r=4",
    "interventions": "method and r, as in method='loreft', r=4",
    "representations": "layers, site, method and r, as in layers=[15], site='block', method='loreft', r=4",
    "intervene_layers": "layers",
    "position": "positions",
    "prefix_positions": "positions, such as 'f7+l7'",
    "suffix_positions": "positions, such as 'f7+l7'",
    "tied_weights": "tied",
    "share_weights": "tied",
    "act_fn": "activation",
    "lora_dropout": "dropout",
    "lora_alpha": "left out: an edit has no alpha, and trimtab.set_scale makes one weaker or stronger",
    "init_lora_weights": "init_weights",
}
"""What fields are called in PEFT's LoRA, pyreft and AdapterHub, and here."""


def _named_as_here(config: type[ReftConfig]) -> None:
    """Let the config's constructor say what a field of another library is called here, and `help` show the fields."""
    original = config.__init__
    known = [one.name for one in fields(config)]

    @wraps(original)
    def init(self: ReftConfig, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - set(known):
            close = difflib.get_close_matches(name, known, n=1)
            there = _ELSEWHERE.get(name) or (close[0] if close else None)
            hint = f" Here it is {there}." if there else f" There are {', '.join(known)}."
            raise TypeError(f"ReftConfig() got an unexpected keyword argument {name!r}.{hint}")  # PEFT reads the words
        original(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[method-assign]
    helped = [one for one in fields(config) if one.metadata]
    told = [f"        {one.name} (default {one.default!r}): {one.metadata['help']}" for one in helped]
    config.__doc__ = "\n".join([f"{config.__doc__}", "    Fields:", *told])


_named_as_here(ReftConfig)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
