"""Prompts and answers of real data, so that batches have the lengths that training meets.

`folder` is a directory with `llm-adapters/dataset/*/train.json` (records with `instruction` and `output`, as in
https://github.com/AGI-Edgerunners/LLM-Adapters) and `gsm8k/train.jsonl` (records with `question` and `answer`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "tiny-llama" / "tokenizer.json"
EOS = "<|end|>"
SHORTEST_PROMPT = 16
"""In tokens. Below 14, f7+l7 edits fewer tokens, and libraries differ in which."""
LONG = (512, 1000)
"""Tokens of a long prompt."""
SHORT_ANSWER = (5, 60)
"""Tokens of its answer."""


class Pair(NamedTuple):
    """One example as text."""

    prompt: str
    answer: str


class Sample(NamedTuple):
    """One example as token ids; the answer ends with eos."""

    prompt: list[int]
    answer: list[int]


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """That of the repository's own model."""
    return Tokenizer.from_file(str(TOKENIZER))


def tokens(text: str) -> list[int]:
    """Token ids without bos or eos."""
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def encode(pair: Pair) -> Sample:
    """Text to token ids, prompt and answer apart."""
    return Sample(tokens(pair.prompt), [*tokens(pair.answer), *tokens(EOS)])


def commonsense(folder: Path) -> list[Pair]:
    """The paper's commonsense recipe trains on these questions."""
    files = sorted((folder / "llm-adapters" / "dataset").glob("*/train.json"))
    if not files:
        raise SystemExit(f"--data {folder}: no llm-adapters/dataset/*/train.json in it")
    records = [record for file in files for record in json.loads(file.read_text())]
    return [Pair(f"{r['instruction']}\n", r["output"]) for r in records]


def gsm8k(folder: Path) -> list[Pair]:
    """School mathematics with worked solutions."""
    file = folder / "gsm8k" / "train.jsonl"
    if not file.exists():
        raise SystemExit(f"--data {folder}: no gsm8k/train.jsonl in it")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [Pair(f"{r['question']}\n", r["answer"]) for r in records]


def long_prompts(folder: Path, count: int, seed: int) -> list[Pair]:
    """Few-shot prompts: solved questions up to a length drawn from LONG, then one to answer briefly.

    In turn of commonsense questions and of GSM8K problems with a short solution.
    """
    draw = random.Random(seed)
    sources = [commonsense(folder), gsm8k(folder)]
    made: list[Pair] = []
    while len(made) < count:
        pairs = sources[len(made) % 2]
        asked = draw.choice(pairs)
        if SHORT_ANSWER[0] <= len(encode(asked).answer) <= SHORT_ANSWER[1]:
            prompt = _with_shots(asked.prompt, pairs, draw.randint(*LONG), draw)
            if LONG[0] <= len(tokens(prompt)) <= LONG[1]:
                made.append(Pair(prompt, asked.answer))
    return made


def _with_shots(question: str, pairs: list[Pair], length: int, draw: random.Random) -> str:
    """The question after as many solved ones as come nearest to `length` tokens from below."""
    left, shots = length - len(tokens(question)), ""
    while True:
        shot = draw.choice(pairs)
        text = f"{shot.prompt}{shot.answer}\n\n"
        left -= len(tokens(text))
        if left < 0:
            return shots + question
        shots += text


def draw_pairs(lengths: str, folder: Path, count: int, seed: int) -> list[Pair]:
    """`count` examples of `commonsense`, `gsm8k` or `long`."""
    if lengths == "long":
        return long_prompts(folder, count, seed)
    pairs = {"commonsense": commonsense, "gsm8k": gsm8k}[lengths](folder)
    random.Random(seed).shuffle(pairs)
    enough = (pair for pair in pairs if len(tokens(pair.prompt)) >= SHORTEST_PROMPT)
    return [pair for pair, _ in zip(enough, range(count), strict=False)]


def draw_batches(lengths: str, folder: Path | None, batch: int, count: int, seed: int) -> list[list[Sample]]:
    """`count` batches of real examples, or of `fixed:N` random tokens, the last 16 of them supervised."""
    kind, _, size = lengths.partition(":")
    if kind == "fixed":
        samples = list(_random_samples(int(size), batch * count, seed))
    elif folder is None:
        raise SystemExit(f"--lengths {lengths} needs --data")
    else:
        samples = [encode(pair) for pair in draw_pairs(lengths, folder, batch * count, seed)]
    return [samples[i : i + batch] for i in range(0, batch * count, batch)]


def _random_samples(length: int, count: int, seed: int) -> Iterator[Sample]:
    draw, vocabulary = random.Random(seed), tokenizer().get_vocab_size()
    for _ in range(count):
        ids = [draw.randrange(5, vocabulary) for _ in range(length)]
        yield Sample(ids[:-16], ids[-16:])
