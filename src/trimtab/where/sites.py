"""Sites: the modules whose output is edited, or of heads the input, found on any architecture rather than tabled.

The blocks of a model are its outermost `nn.ModuleList` of layers. Where a model has several (a vision tower beside a
language model, say) the transformers config says which is meant; an encoder-decoder has two, and its blocks are
numbered through, the encoder's first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import regex
from torch import nn

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
PATTERN_SECONDS = 1.0
"""For one module name; a pattern that backtracks for ever must not hang who loads an adapter."""
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|layerff|DenseReluDense", re.IGNORECASE)


_PROJECTION = re.compile(r"(o|out|c|output)_?(proj|lin)|dense|w?o|out", re.IGNORECASE)
"""What the linear layer is called that attention's heads go through last."""


class Site(NamedTuple):
    """A module whose output is edited, or its input."""

    name: str
    module: nn.Module
    width: int
    """Size of the last dimension of what is edited."""
    of_input: bool = False
    """Whether that is what the module is given: of attention's projection, the outputs of all heads side by side."""


def find_sites(model: nn.Module, site: str, layers: str | list[int], r: int | None = None) -> list[Site]:
    """The modules that a config's `site` and `layers` mean on this model, in the order of the forward pass.

    Raises:
        ValueError: there is no such module; says what there is. Or one is narrower than the rank `r`.
    """
    parts = {"block": _whole, "attention": _attention, "mlp": _mlp, "heads": _projection}
    if site in parts:
        modules = [parts[site](name, block) for name, block in find_blocks(model)]
    else:
        modules = _matching(model, site)
    chosen = modules if layers == "all" else [modules[i] for i in _checked_indices(layers, len(modules))]  # type: ignore[arg-type]
    for name, module in chosen:
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"site={site!r}: {name} only lists modules and never runs itself. Name what it holds with a regular "
                f"expression, for example site=r'{re.escape(name)}\\.\\d+'."
            )
        _check_batch_first(model, name, module)
    if site == "heads":
        sites = [Site(name, module, _input_size(module), of_input=True) for name, module in chosen]
    else:
        sites = [Site(name, module, _width(model, name, module)) for name, module in chosen]
    for one in sites:
        if r is not None and r > one.width:
            raise ValueError(f"r={r}: larger than the width {one.width} of {one.name}; use a rank well below it.")
    return sites


TIME_FIRST = ("xlnet", "fsmt")
"""transformers' own models, by their configs' `model_type`, that do so too."""


def _check_batch_first(model: nn.Module, name: str, module: nn.Module) -> None:
    """torch's own transformer layers put time first unless told; rows and tokens would be mistaken for each other."""
    if (kind := getattr(getattr(model, "config", None), "model_type", "")) in TIME_FIRST:
        raise ValueError(
            f"{kind} puts time before the batch in its blocks; tokens are counted in (batch, time, width)."
        )
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:n])) for n in range(1, len(path))]
    layers = [m for m in around if isinstance(m, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)]
    attentions = [m for layer in (module, *layers) for m in layer.modules() if isinstance(m, nn.MultiheadAttention)]
    if any(not attention.batch_first for attention in attentions):
        raise ValueError(
            f"site: {name} ({type(module).__name__}) takes (time, batch, width), as torch's attention does by default, "
            "but edits count tokens in (batch, time, width). Build it with batch_first=True."
        )


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named blocks of the model, first to last; of an encoder-decoder, the encoder's and then the decoder's.

    Raises:
        ValueError: the model has no list of blocks, or several and nothing says which is meant.
    """
    stacks = list(_outermost_lists(model))
    if not stacks:
        raise ValueError(
            f"site='block': {type(model).__name__} has no nn.ModuleList of blocks. "
            "Give site as a regular expression over module names, for example site=r'encoder\\.\\d+'."
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        stacks = _encoder_and_decoder(model, stacks)
    elif len(stacks) > 1:
        stacks = [_main_stack(model, stacks)]
    return [(f"{name}.{i}", block) for name, blocks in stacks for i, block in enumerate(blocks)]


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child[0].parameters()):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _encoder_and_decoder(model: nn.Module, stacks: list[Any]) -> list[Any]:
    """The largest list inside each half, in the order of the forward pass."""
    halves = [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    return [max((s for s in stacks if _contains(half, s[1])), key=lambda s: _size(s[1])) for half in halves]


def _main_stack(model: nn.Module, stacks: list[Any]) -> Any:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    fitting = [stack for stack in stacks if len(stack[1]) == depth] or stacks
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if len(fitting) > 1 and get_decoder else None
    if isinstance(decoder, nn.Module):
        fitting = [stack for stack in fitting if _contains(decoder, stack[1])] or fitting
    sizes = sorted((_size(stack[1]) for stack in fitting), reverse=True)
    if len(fitting) > 1 and sizes[0] < 4 * sizes[1]:
        names = ", ".join(f"{name} ({len(blocks)})" for name, blocks in fitting)
        raise ValueError(
            f"site='block': {type(model).__name__} has several lists of blocks, {names}. "
            f"Say which with a regular expression, for example site=r'{re.escape(fitting[0][0])}\\.\\d+'."
        )
    return max(fitting, key=lambda stack: _size(stack[1]))


def _contains(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _whole(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    return name, block


def _attention(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    return _part_of(name, block, "attention", _ATTENTION, _MLP)


def _mlp(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    return _part_of(name, block, "mlp", _MLP, _ATTENTION)


def _part_of(
    name: str, block: nn.Module, part: str, wanted: re.Pattern[str], other: re.Pattern[str]
) -> tuple[str, nn.Module]:
    """The first attention or MLP module of a block, by its name or else by its class."""
    parts = [(n, m) for n, m in block.named_modules() if any(True for _ in m.children()) and not _ours(n)]
    for words in ([n.rpartition(".")[2] for n, _ in parts], [type(m).__name__ for _, m in parts]):
        for word, (child_name, child) in zip(words, parts, strict=True):
            if child_name and wanted.search(word) and not other.search(word):
                return f"{name}.{child_name}", child
    raise ValueError(
        f"site={part!r}: found no {part} module in {name} ({type(block).__name__}, with "
        f"{', '.join(n for n, _ in block.named_children())}). Give site as a regular expression over module names."
    )


def _projection(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    """The linear layer that the heads of a block's attention go through, by its name."""
    at, attention = _attention(name, block)
    linear = {n: m for n, m in attention.named_modules() if _input_size(m) and not _ours(n) and not _wrapped(n)}
    found = [n for n in linear if _PROJECTION.fullmatch(n.rpartition(".")[2])]
    if len(found) != 1 or isinstance(attention.get_submodule(found[0].rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(
            f"site='heads': found no one output projection that runs as a module of its own in {at} "
            f"({type(attention).__name__}, with the linear layers {', '.join(linear) or 'none'}). Use "
            "site='attention', or a regular expression over module names, which are edited at their output."
        )
    return f"{at}.{found[0]}", linear[found[0]]


def _wrapped(name: str) -> bool:
    """Whether a layer is inside another that PEFT put in its place."""
    return "base_layer" in name.split(".") or ".lora_" in f".{name}"


def _input_size(layer: nn.Module) -> int:
    """Of a linear layer, one that is packed by quantization too; 0 of anything else."""
    size = getattr(layer, "in_features", None) or (getattr(layer, "nx", None) if hasattr(layer, "nf") else None)
    return size if isinstance(size, int) else 0


def _matching(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    names = [(n, m) for n, m in model.named_modules() if n and not _ours(n)]
    try:
        compiled = regex.compile(pattern)
        found = [(n, m) for n, m in names if compiled.fullmatch(n, timeout=PATTERN_SECONDS)]
    except TimeoutError:
        raise ValueError(
            f"site={pattern!r}: takes too long to match one module name; write it without nested repetition."
        ) from None
    except regex.error as error:
        raise ValueError(
            f"site={pattern!r}: not a regular expression ({error}), nor block, attention, mlp or heads."
        ) from None
    if not found:
        some = ", ".join([n for n, _ in names][:12])
        raise ValueError(
            f"site={pattern!r}: matches no module name as a whole; it is block, attention, mlp, or a pattern such as "
            f"'.*q_proj'. The model's modules begin: {some}, ..."
        )
    return found


def _ours(name: str) -> bool:
    return "reft" in name.split(".")


def _checked_indices(layers: list[int], count: int) -> list[int]:
    outside = [i for i in layers if not -count <= i < count]
    if outside:
        raise ValueError(
            f"layers={layers}: {outside} not there; the model has blocks 0 to {count - 1} (or -{count} to -1)."
        )
    indices = sorted(i % count for i in layers)
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers={layers}: names a block twice, once from each end.")
    return indices


def _width(model: nn.Module, name: str, module: nn.Module) -> int:
    """Of a linear layer, or a module with no matrix but that of one, its output size; else the config's hidden size
    where the module has a weight of that size; else the output size of its last layer."""
    linear = [size for size in map(_output_size, module.modules()) if size is not None]
    if len(linear) == 1 and sum(parameter.dim() > 1 for parameter in module.parameters()) <= 1:
        return linear[0]
    hidden = _hidden_size(model, name)
    if hidden is not None and any(hidden in parameter.shape for parameter in module.parameters()):
        return hidden
    sizes = {getattr(m, k, None) for m in module.modules() for k in ("in_features", "out_features")}
    if hidden in sizes - {None}:  # weights packed by quantization keep no such shape
        return cast(int, hidden)
    for layer in reversed(list(module.modules())):
        size = _output_size(layer)
        if size is not None:
            return size
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            return weight.shape[0]
    raise ValueError(
        f"site: cannot tell the width of {name} ({type(module).__name__}): it holds no linear layer or norm."
    )


def _output_size(layer: nn.Module) -> int | None:
    sizes = (getattr(layer, attribute, None) for attribute in ("out_features", "nf"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _hidden_size(model: nn.Module, name: str) -> int | None:
    """By the config nearest to the module: a vision tower has one of its own. A pyramid's stages differ, so None."""
    path = name.split(".")
    ancestors = [model, *(model.get_submodule(".".join(path[:n])) for n in range(1, len(path) + 1))]
    for ancestor in reversed(ancestors):
        config: Any = getattr(ancestor, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        hidden = getattr(text, "hidden_size", None)
        if isinstance(hidden, int):
            return None if isinstance(getattr(text, "depths", None), list | tuple) else hidden
    return None


def host(module: nn.Module) -> nn.Module:
    """Where the edit's parameters are kept: the module itself, or, as a Sequential runs all it holds, its first layer
    with parameters (one without, such as a ReLU, may serve several blocks)."""
    while isinstance(module, nn.Sequential):
        module = next((layer for layer in module if any(True for _ in layer.parameters())), module[0])
    return module
