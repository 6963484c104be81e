"""Steering towards concepts of text, judged by a classifier trained on other text, and erasing them.

`folder` holds `text/gutenberg.txt` and `text/openstax.txt`, a paragraph on each line, and AxBench's `axbench/concept10`
(https://github.com/stanfordnlp/axbench). Positives and negatives of a concept are cut to as many tokens as the model is
asked for, and dealt out once: to the pairs that directions are read off, to the judge, and to prompts and probes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab
from trimtab.adapter.steering import Layer, steer
from trimtab.tasks.files import read_rows

TOKENS, OPENING = 24, 8
"""Of a text; of it, those that are a prompt."""
PAIRS, PROMPTS = 40, 64
FEATURES = 2**13
AXBENCH = "terms related to communist ideology and notable figures"


@dataclass(frozen=True)
class Concept:
    """Token ids (n, TOKENS) of texts that have it and that lack it, in the order in which they are dealt out."""

    name: str
    plus: Tensor
    minus: Tensor

    def pairs(self) -> list[list[Tensor]]:
        return [list(kind[:PAIRS]) for kind in (self.plus, self.minus)]

    def others(self) -> tuple[Tensor, Tensor]:
        """For the judge."""
        return self.plus[PAIRS:], self.minus[PAIRS:-PROMPTS]

    def prompts(self) -> Tensor:
        """Texts that lack it and were seen by nobody."""
        return self.minus[-PROMPTS:]


def concepts(folder: Path, tokenizer: Any) -> list[Concept]:
    """A register, a form and a subject."""
    novels, textbooks = (paragraphs(folder / "text" / f"{name}.txt") for name in ("gutenberg", "openstax"))
    spoken = [text for text in novels if text.startswith(('"', "“"))]
    told = [text for text in novels if not set(text) & set("\"“”'‘’")]
    files = (folder / "axbench/concept10/prod_2b_l10_v1" / name for name in _AXBENCH_FILES)
    rows = [row for file in files for row in read_rows(file)]
    about = [row["output"] for row in rows if row["output_concept"] == AXBENCH]
    rest = [row["output"] for row in rows if row["category"] == "negative"]
    given = {"novel": (novels, textbooks), "speech": (spoken, told), "communism": (about, rest)}
    return [Concept(name, *(cut(tokenizer, kind) for kind in kinds)) for name, kinds in given.items()]


_AXBENCH_FILES = ("generate/train_data.parquet", "inference/latent_eval_data.parquet")


def paragraphs(file: Path) -> list[str]:
    """2,000 of a file, drawn by a seed."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return random.Random(0).sample([line for line in lines if len(line) > 160], 2000)


def cut(tokenizer: Any, texts: Sequence[str], most: int = 400) -> Tensor:
    """(n, TOKENS) of those that have as many, shuffled by a seed."""
    ids = [tokenizer(t, add_special_tokens=False, truncation=True, max_length=TOKENS)["input_ids"] for t in texts]
    ids = [own for own in ids if len(own) == TOKENS]
    random.Random(0).shuffle(ids)
    return torch.tensor(ids[:most])


class Judge:
    """Logistic regression on hashed words and character trigrams."""

    def __init__(self, tokenizer: Any, plus: Tensor, minus: Tensor) -> None:
        self.tokenizer = tokenizer
        fifth = (len(plus) // 5, len(minus) // 5)
        self.weight = self._fitted(plus[fifth[0] :], minus[fifth[1] :])
        held = self(plus[: fifth[0]]), 1 - self(minus[: fifth[1]])
        self.accuracy = sum(held) / 2
        """On texts it was not trained on, of both kinds alike."""

    def features(self, texts: Tensor) -> Tensor:
        counts = torch.zeros(len(texts), FEATURES + 1)
        counts[:, -1] = 1
        for row, text in zip(counts, self.tokenizer.batch_decode(texts), strict=True):
            pieces = text.lower().split() + [text.lower()[i : i + 3] for i in range(len(text) - 2)]
            for piece in pieces:
                row[_number(piece)] += 1 / len(pieces) ** 0.5
        return counts

    def _fitted(self, plus: Tensor, minus: Tensor) -> Tensor:
        x, y = self.features(torch.cat([plus, minus])), torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))])
        each = torch.where(y > 0, 0.5 / len(plus), 0.5 / len(minus))
        weight = torch.zeros(FEATURES + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100)

        def loss() -> Tensor:
            optimizer.zero_grad()
            losses = nn.functional.binary_cross_entropy_with_logits(x @ weight, y, reduction="none")
            value = (losses * each).sum() + 1e-4 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weight.detach()

    def __call__(self, texts: Tensor) -> float:
        """The share of texts (n, T) that it says have the concept."""
        return float((self.features(texts) @ self.weight > 0).float().mean())


def _number(piece: str) -> int:
    """The same in every process, unlike `hash`."""
    number = 0
    for letter in piece:
        number = (number * 131 + ord(letter)) % FEATURES
    return number


@torch.no_grad()
def loss(model: Any, texts: Tensor, start: int) -> float:
    """Nats per token from the start-th on."""
    whole = begun(model, texts)
    logits = model(input_ids=whole).logits[:, start:-1].log_softmax(-1)
    return -float(logits.gather(2, whole[:, start + 1 :, None]).mean())


def begun(model: Any, texts: Tensor) -> Tensor:
    """With the token that begins a text."""
    return torch.cat([torch.full_like(texts[:, :1], model.config.bos_token_id), texts], 1)


@torch.no_grad()
def continued(model: Any, texts: Tensor) -> Tensor:
    """Openings (n, OPENING + TOKENS) with what the model says next, drawn by a seed."""
    torch.manual_seed(0)
    ids = begun(model, texts[:, :OPENING])
    how = {"do_sample": True, "top_p": 0.95, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, 1:]  # type: ignore[no-any-return]


def swept(model: Any, judge: Judge, concept: Concept, layer: Layer, positions: str, times: float) -> dict[str, Any]:
    """What a strength comes to: how often the judge finds the concept, how likely the base finds the text."""
    with trimtab.edit(model, layer.change, layers=[layer.number], positions=positions, scale=times):
        texts = continued(model, concept.prompts())
    return {"times": times, "success": judge(texts[:, OPENING:]), "loss": loss(model, texts, OPENING)}


def steered(model: Any, tokenizer: Any, concept: Concept, positions: str, times: Sequence[float]) -> dict[str, Any]:
    """One line of the table."""
    judge = Judge(tokenizer, *concept.others())
    found = steer(model, *([begun(model, t[None])[0] for t in kind] for kind in concept.pairs()), positions=positions)
    layer = next(own for own in found.layers if own.number in found.chosen)
    return {
        "concept": concept.name,
        "positions": positions,
        "block": layer.number,
        "strength": layer.strength,
        "judge": judge.accuracy,
        "sweep": [swept(model, judge, concept, layer, positions, t) for t in times],
        "real": {"success": judge(concept.plus[:PAIRS]), "loss": loss(model, concept.plus[:PAIRS], OPENING)},
        "layers": [{"block": o.number, "accuracy": o.accuracy, "gap_closed": o.gap_closed} for o in found.layers],
    }


def erased(model: Any, concept: Concept) -> dict[str, Any]:
    """LEACE fitted to half of the texts, at one block and all tokens; a probe fitted and scored on the other half."""
    fit, rest = ([begun(model, kind[own]) for kind in (concept.plus, concept.minus)] for own in _halves(concept))
    block = len(model.model.layers) // 2
    found = steer(model, *([*kind] for kind in fit), action="erase", layers=[block])
    change = found.layers[0].change
    with trimtab.edit(model, change, layers=[block]):
        after = [states(model, kind, block) for kind in rest]
        loss_after = loss(model, concept.minus[-PROMPTS:], OPENING)
    before = [states(model, kind, block) for kind in rest]
    return {
        "concept": concept.name,
        "block": block,
        "probe": {"before": probed(before), "after": probed(after)},
        "loss": {"before": loss(model, concept.minus[-PROMPTS:], OPENING), "after": loss_after},
        "texts": len(fit[0]),
    }


def _halves(concept: Concept) -> tuple[slice, slice]:
    count = min(len(concept.plus), len(concept.minus) - PROMPTS)
    return slice(0, count // 2), slice(count // 2, count)


def states(model: Any, texts: Tensor, block: int) -> Tensor:
    """(n, T, d) that leave a block."""
    seen: list[Tensor] = []
    with torch.no_grad(), trimtab.edit(model, lambda h: seen.append(h) or h, layers=[block]):
        model(input_ids=texts)
    return seen[0].view(*texts.shape, -1)


def probed(kinds: list[Tensor]) -> float:
    """The share of tokens on their side of a ridge probe that was fitted to half of the texts."""
    half = min(len(kind) for kind in kinds) // 2
    fit, test = ([kind[part].flatten(0, 1) for kind in kinds] for part in (slice(half), slice(half, 2 * half)))
    x = torch.cat(fit).double()
    mean, y = x.mean(0), torch.cat([torch.ones(len(fit[0])), -torch.ones(len(fit[1]))]).double()
    gram = (x - mean).mT @ (x - mean)
    weight = torch.linalg.solve(gram + 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram)), (x - mean).mT @ y)
    sides = [(kind.double() - mean) @ weight * sign > 0 for kind, sign in zip(test, (1, -1), strict=True)]
    return float(torch.cat(sides).float().mean())
