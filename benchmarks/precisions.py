"""What a ReFT adapter is on a base of less than float32: the table of docs/guides/quantised.md.

    pip install bitsandbytes torchao
    python benchmarks/precisions.py --out benchmarks/results/precisions.json      # quantized rows are slow on a CPU

The base is the bundled model, the task the plurals of its recipe. One adapter is trained in float32 and put on every
base; another is trained on each base, saved, and loaded onto that base anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import described_machine, write_json
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from trimtab import ReftConfig
from trimtab.adapter.tuner import ReftLayer
from trimtab.tasks.tokens import Collator, encode

ROOT = Path(__file__).parents[1]
MODEL, DATA = ROOT / "models/tiny-llama", ROOT / "recipes/data/plural"
STEPS, BATCH, ANSWER = 100, 16, 8


def torchao(name: str, **options: Any) -> TorchAoConfig:
    """One of torchao's configurations, which is imported only where it is asked for."""
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)(**options))


def four_bits() -> TorchAoConfig:
    """torchao's int4 for every processor; Int4WeightOnlyConfig asks for kernels of a GPU."""
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,  # without it the weights are spoilt when a model that has run is saved
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
BASES: dict[str, tuple[torch.dtype, Callable[[], Any] | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "bitsandbytes 8 bits": (torch.bfloat16, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4 bits": (torch.bfloat16, lambda: BitsAndBytesConfig(**NF4)),
    "torchao int8, weights": (torch.bfloat16, lambda: torchao("Int8WeightOnlyConfig")),
    "torchao int8, weights and activations": (torch.bfloat16, lambda: torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao int4, weights": (torch.bfloat16, four_bits),
}
"""Each base's dtype, and how it is quantized."""


def load(name: str) -> Any:
    """The bundled model as one of `BASES`."""
    dtype, quantized = BASES[name]
    more = {} if quantized is None else {"quantization_config": quantized()}
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, **more).eval()


def bytes_of_blocks(model: Any) -> int:
    """What the frozen blocks take, counted within tensors that are made of others."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        state = getattr(tensor, "quant_state", None)  # bitsandbytes' scales of blocks
        return tensor.numel() * tensor.element_size() + (0 if state is None else size(state.absmax))

    blocks = model.model.layers
    return sum(size(t.data if type(t) is nn.Parameter else t) for t in (*blocks.parameters(), *blocks.buffers()))


def rows(split: str) -> list[dict[str, str]]:
    """Words and their plurals."""
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def adapted(base: Any) -> Any:
    """The base with a fresh adapter."""
    torch.manual_seed(0)
    return get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=4, positions="f1+l2"))


def trained(base: Any, tokenizer: Any) -> Any:
    """The base with an adapter that was trained on it."""
    model = adapted(base)
    examples = [encode(tokenizer, row["input"], row["output"]) for row in rows("train_wide")]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    collate = Collator(tokenizer)
    for _ in range(STEPS):
        chosen = torch.randperm(len(examples))[:BATCH].tolist()
        model(**collate([examples[i] for i in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def prompts(tokenizer: Any) -> dict[str, Tensor]:
    """The prompts of the test words, as generation takes them: padded on the left."""
    found = [encode(tokenizer, row["input"]).input_ids for row in rows("test")]
    width = max(map(len, found))
    pad = Collator(tokenizer).pad_id
    ids = torch.tensor([[pad] * (width - len(one)) + one for one in found])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in found])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def next_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities (B, V) of what comes after each prompt."""
    lengths = {"prompt_lengths": batch["attention_mask"].sum(1)} if isinstance(model, PeftModel) else {}
    return model(**batch, **lengths).logits[:, -1].double().log_softmax(-1)


def apart(one: Tensor, other: Tensor) -> float:
    """The mean divergence of `other` from `one`, in nats."""
    return float((one.exp() * (one - other)).sum(-1).mean())


def score(model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> float:
    """The share of test words whose plural is generated."""
    out = model.generate(**batch, max_new_tokens=ANSWER, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    wanted = [row["output"] for row in rows("test")]
    return sum(map(str.__eq__, answers, wanted)) / len(wanted)


@torch.no_grad()
def edit_error(model: Any, batch: dict[str, Tensor]) -> float:
    """How far the edited states of any token and block are from the formula in float64, as a share of their norm."""
    worst = 0.0
    seen: list[Tensor] = []
    for layer in [m for m in model.modules() if isinstance(m, ReftLayer)]:
        block = layer.site.module
        # The first hook comes before the edit, the second behind it.
        hooks = [block.register_forward_hook(lambda m, i, out: seen.append(out), prepend=first) for first in (1, 0)]
        next_tokens(model, batch)
        for hook in hooks:
            hook.remove()
        before, after = (states.reshape(-1, states.shape[-1]).double() for states in seen)
        seen.clear()
        edited = (before != after).any(-1)
        edit = layer.edits("default")["edit"]
        rotation, weight, bias = edit.rotation().double(), edit.weight.double(), edit.bias.double()
        h = before[edited]
        exact = h + (h @ weight.T + bias - h @ rotation.T) @ rotation
        worst = max(worst, float(((after[edited] - exact).norm(dim=-1) / exact.norm(dim=-1)).max()))
    return worst


def measure(name: str, folder: Path, tokenizer: Any, exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """One row of the table; `exact` is what base and edited model say in float32."""
    batch = prompts(tokenizer)
    base = load(name)
    size, plain = bytes_of_blocks(base), next_tokens(base, batch)
    moved = PeftModel.from_pretrained(load(name), folder / "float32").eval()
    edits = {p.dtype for key, p in moved.named_parameters() if "reft_" in key}
    found = {
        "base": name,
        "megabytes_of_blocks": round(size / 1e6, 2),
        "edits_in": str(*edits).removeprefix("torch."),
        "edit_error": edit_error(moved, batch),
        "base_from_float32": apart(exact[0], plain),
        "edited_from_float32": apart(exact[1], next_tokens(moved, batch)),
        "score_of_the_float32_adapter": score(moved, tokenizer, batch),
    }
    own = trained(load(name), tokenizer)
    said = next_tokens(own, batch)
    found["score_trained_on_it"] = score(own, tokenizer, batch)
    own.save_pretrained(folder / name)
    again = PeftModel.from_pretrained(load(name), folder / name).eval()
    return {**found, "changed_by_a_reload": float((said - next_tokens(again, batch)).abs().max())}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch, lines = prompts(tokenizer), []
    with tempfile.TemporaryDirectory() as folder:
        plain = next_tokens(load("float32"), batch)
        model = trained(load("float32"), tokenizer)
        model.save_pretrained(Path(folder) / "float32")
        exact = plain, next_tokens(model, batch)
        for name in asked.bases:
            lines.append(measure(name, Path(folder), tokenizer, exact))
            print(json.dumps(lines[-1]), flush=True)
    if asked.out:
        write_json(asked.out, {**described_machine(), "lines": lines})


if __name__ == "__main__":
    main()
