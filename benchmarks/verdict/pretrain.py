"""The study model and its tasks: answers of 1 to 64 tokens, graded, of which an adapter has something to elicit.

    python benchmarks/verdict/pretrain.py data --out DATA
    python benchmarks/verdict/pretrain.py train --out MODEL --minutes 45 [--text gutenberg.txt]
    python benchmarks/verdict/pretrain.py untuned --model MODEL --out untuned.json

`data` writes DATA/ladder/TASK-LENGTH/SPLIT.jsonl and DATA/pairs/COUNT/. `train` goes on from the bundled tiny-llama,
with its tokenizer, on one core; run again, it resumes. `untuned` says what a model does with a bare input, with an
instruction, and after three solved examples.

Pretraining shows a task with an instruction, as solved examples in a row, or as a list; the studies ask with the bare
input, which does not say what is wanted. Inputs are split by a hash, so that none of a study was seen in pretraining.
The invented pairs are in no pretraining at all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models/tiny-llama"
LENGTHS = {"topic": (1,), "count": (1, 16, 64), "sum": (16, 64)}
"""About how many tokens an answer has, in `data`; 4, 16 and 64 where nothing is said. Pretraining draws from 1 to 64,
small ones more often."""
SIZES = {"train": 200, "validation": 100, "test": 500}
PAIRS = (16, 64, 256)
ROWS, LENGTH = 6, 256
CHECKPOINT_EVERY = 50

_tables = json.loads((ROOT / "models/pretrain/skills.json").read_text(encoding="utf-8"))["skills"]
WORDS = sorted(
    {w for s in _tables.values() for pair in s["table"].items() for w in pair if w.isalpha() and w.islower()}
)
PAST = {base: past for base, past in _tables["past"]["table"].items() if base != past and past.isalpha()}
_topics = {
    "sea": "ship sailor wave harbor fish island wind sail deck shore storm captain boat port tide net",
    "war": "army soldier sword battle enemy attack fort gun victory march shield general fight wound camp flag",
    "food": "bread soup cheese apple butter cake egg honey salt rice meat plate dinner oven sugar milk",
    "school": "teacher book lesson pupil desk pen read write class study letter exam page learn chalk word",
    "money": "bank gold coin price market sell buy trade rich debt silver pay cost merchant tax wealth",
    "music": "song drum dance bell voice sing piano tune horn choir violin note concert flute melody sound",
}
TOPICS = {topic: words.split() for topic, words in _topics.items()}
_filler = "the a of and then in there was by with that one old new day house man many it on"
FILLER = _filler.split()
OLD = {"the": "ye", "you": "thou", "your": "thy", "and": "and eke", "here": "hither", "yes": "yea"}
DIALECT = {"ye": "da", "did": "done", "thou": "yer", "thy": "ma", "eke": "plus", "hither": "yonder"}


class Kind(NamedTuple):
    """A task: three ways of asking for it, and an example whose answer has about so many tokens."""

    instructions: tuple[str, str, str]
    example: Callable[[random.Random, int], tuple[str, str]]


def some_words(rng: random.Random, count: int) -> list[str]:
    """Different ones, of those that the bundled model's skills are about."""
    return rng.sample(WORDS, max(1, count))


def count_on(rng: random.Random, length: int) -> tuple[str, str]:
    """From one number to another; some three tokens a number."""
    first, steps = rng.randint(1, 2400), max(1, length // 3)
    return f"{first} to {first + steps}", " ".join(str(n) for n in range(first + 1, first + steps + 1))


def spell(rng: random.Random, length: int) -> tuple[str, str]:
    """Letters of words, some ten tokens a word."""
    words = some_words(rng, round(length / 10))
    if length < 8:
        words = ["".join(rng.choices("abcdefghiklmnoprstuvwy", k=3))]
    return " ".join(words), " ".join("-".join(word) for word in words)


def reverse(rng: random.Random, length: int) -> tuple[str, str]:
    """Words from the last to the first, some two tokens each."""
    words = some_words(rng, max(2 if length > 2 else 1, round(length / 1.7)))
    return " ".join(words), " ".join(words[::-1])


def double(rng: random.Random, length: int) -> tuple[str, str]:
    """Each word twice."""
    words = some_words(rng, max(2 if length > 2 else 1, round(length / 3.4)))
    return " ".join(words), " ".join(f"{word} {word}" for word in words)


def add(rng: random.Random, length: int) -> tuple[str, str]:
    """A sum, column by column from the right with what is carried, then the result; digits apart."""
    columns = max(1, round(length / 9))
    a, b = ([rng.randint(0, 9) for _ in range(columns)] for _ in range(2))
    carried, steps, result = 0, [], []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = x + y + carried
        steps.append(f"{x} + {y} + {carried} = {total}")
        carried, digit = divmod(total, 10)
        result.append(str(digit))
    result += ["1"] * carried
    asked = f"{' '.join(map(str, a))} + {' '.join(map(str, b))}"
    written = " ".join(reversed(result))
    return asked, written if length < 8 else f"{' , '.join(steps)} : {written}"


def style(rng: random.Random, length: int) -> tuple[str, str]:
    """Clauses of everyday English into an old style: "did" before the verb, ye, thou, hither."""
    plain, old = [], []
    for _ in range(max(1, round(length / 16))):
        verb, who, what = rng.choice(list(PAST)), rng.choice(WORDS), rng.choice(WORDS)
        place = rng.choice(["here", "by the house", "in your garden", "with you"])
        plain.append(f"the {who} {PAST[verb]} the {what} {place}")
        old.append(f"ye {who} did {verb} ye {what} {' '.join(OLD.get(word, word) for word in place.split())}")
    if length < 8:
        mine, who = rng.choice(["the", "your"]), rng.choice(WORDS)
        return f"{mine} {who}", f"{OLD[mine]} {who}"
    return " and ".join(plain), " and eke ".join(old)


def dialect(rng: random.Random, length: int) -> tuple[str, str]:
    """The old style with other little words, which pretraining never shows as an answer."""
    asked, old = style(rng, length)
    return asked, " ".join(DIALECT.get(word, word) for word in old.split())


def topic(rng: random.Random, length: int) -> tuple[str, str]:
    """What a text of 8 to 40 words is about, one word whatever the length; some words are another topic's."""
    right, wrong = rng.sample(sorted(TOPICS), 2)
    told, beside = rng.randint(2, 6), rng.randint(0, 2)
    words = rng.sample(TOPICS[right], told) + rng.sample(TOPICS[wrong], min(beside, told - 1))
    words += [rng.choice(FILLER) for _ in range(rng.randint(4, 24))]
    rng.shuffle(words)
    return " ".join(words), right


KINDS = {
    "count": Kind(("Count on.", "Write all numbers up to the second.", "Go on counting:"), count_on),
    "spell": Kind(("Spell the words.", "Write each letter.", "Letters:"), spell),
    "reverse": Kind(("Reverse the words.", "Write it from the end.", "Backwards:"), reverse),
    "double": Kind(("Write each word twice.", "Double every word.", "Doubled:"), double),
    "sum": Kind(("Add the numbers.", "What is the sum?", "Sum:"), add),
    "style": Kind(("Write it in an old style.", "How was this said long ago?", "Of old:"), style),
    "topic": Kind(("Name the topic.", "What is this text about?", "Topic:"), topic),
}
STUDIED = KINDS | {"dialect": Kind(("Say it as da folk do.", "In dialect, please.", "Dialect:"), dialect)}
"""One more than pretraining shows."""
HOW_OFTEN = (1, 1.5, 0.7, 2, 0.7, 1, 0.7)
"""Copying is what such a small model learns last, and doubling is copying."""


def split_of(asked: str) -> str:
    """Half of the inputs are pretraining's, a quarter are tested on; single words are few, so all splits have some."""
    place = int(hashlib.sha256(asked.encode()).hexdigest(), 16) % 8
    return "pretraining" if place < 4 else "test" if place < 6 else "validation" if place == 6 else "train"


def example(kind: str, split: str, length: int, rng: random.Random) -> tuple[str, str]:
    """An input of the split, and its answer."""
    while True:
        asked, answer = STUDIED[kind].example(rng, length)
        if split_of(asked) == split:
            return asked, answer


def invented(rng: random.Random) -> str:
    """A word that means nothing."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice([2, 3])))


def write_data(out: Path) -> None:
    """Every task at every length, and the pairs, of which one half chooses the rate and the other is told."""
    for kind in STUDIED:
        for length in LENGTHS.get(kind, (4, 16, 64)):
            rng, rows = random.Random(f"{kind} {length}"), {}
            for split, count in SIZES.items():
                found: dict[str, str] = {}
                for _ in range(40 * count):
                    asked, answer = example(kind, split, length, rng)
                    found.setdefault(asked, answer)
                    if len(found) == count:
                        break
                rows[split] = found
            for split, found in rows.items():
                _write(out / f"ladder/{kind}-{length}/{split}.jsonl", list(found.items()))
    for count in PAIRS:
        rng = random.Random(f"pairs {count}")
        words: list[str] = []
        while len(words) < 2 * count:
            if (word := invented(rng)) not in words:
                words.append(word)
        pairs = list(zip(words[::2], words[1::2], strict=True))
        for split, some in (("train", pairs), ("validation", pairs[::2]), ("test", pairs[1::2])):
            _write(out / f"pairs/{count}/{split}.jsonl", some)


def _write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in rows), encoding="utf-8")


def lines(tokenizer: Any, texts: Iterator[str] | None, rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels for ever: tasks by their answers alone, now and then an old skill or a piece of text whole."""
    sys.path.insert(0, str(ROOT / "models/pretrain"))
    skill_line = importlib.import_module("skills").skill_line  # what the bundled model learned, kept in mind

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    bos, end = tokenizer.bos_token, tokenizer.eos_token
    while True:
        chance = rng.random()
        if chance < 0.03 and texts is not None:
            whole = ids(f"{bos}{next(texts)}{end}")
            yield whole, whole
            continue
        if chance < 0.13:
            whole = ids(f"{bos}{skill_line(rng)}")
            yield whole, whole
            continue
        kind, length = rng.choices(list(KINDS), HOW_OFTEN)[0], round(2 ** rng.uniform(0, 6))
        dress, pieces = rng.random(), []
        if dress < 0.45:
            asked, answer = example(kind, "pretraining", length, rng)
            pieces = [(f"{bos}<|user|>{rng.choice(KINDS[kind].instructions)}\n{asked}<|assistant|>", f"{answer}{end}")]
        else:
            several = rng.randint(2, 5) if length <= 16 else rng.randint(1, 2)
            for i in range(several):
                asked, answer = example(kind, "pretraining", length, rng)
                start = bos if i == 0 else ""
                if dress < 0.85:
                    pieces.append((f"{start}<|user|>{asked}<|assistant|>", f"{answer}{end}"))
                else:
                    pieces.append((f"{start}{asked} ->", f" {answer}\n" if i < several - 1 else f" {answer}{end}"))
        tokens, labels = [], []
        for asked, answer in pieces:
            a, b = ids(asked), ids(answer)
            tokens += a + b
            labels += [-100] * len(a) + b
        yield tokens, labels


def documents(path: Path, rng: random.Random) -> Iterator[str]:
    """Paragraphs for ever."""
    found = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if 200 < len(line) < 900]
    while True:
        yield rng.choice(found)


def train(out: Path, minutes: float, text: Path | None, rate: float, model: Path) -> None:
    """Pretrain until the minutes are used up; the state of the last checkpoint is gone on from."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    state_file = out / "state.pt"
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groups = [
        {"params": [p for p in found.parameters() if (p.dim() >= 2) == matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    step, used = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        found.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["used"]
    rng = random.Random(step)
    source = lines(tokenizer, documents(text, rng) if text else None, rng)
    tokens: list[int] = []
    labels: list[int] = []
    found.train()
    last, losses = time.monotonic(), []
    while (done := used / (60 * minutes)) < 1:
        height = min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.3) / 0.7)))
        for group in optimizer.param_groups:
            group["lr"] = rate * height
        while len(tokens) < ROWS * LENGTH:
            more, marked = next(source)
            if len(more) <= LENGTH:
                tokens += more
                labels += marked
        rows, wanted = (torch.tensor(each[: ROWS * LENGTH]).view(ROWS, LENGTH) for each in (tokens, labels))
        tokens, labels = tokens[ROWS * LENGTH :], labels[ROWS * LENGTH :]
        loss = found(input_ids=rows, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(found.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        now = time.monotonic()
        used, last = used + now - last, now
        if step % CHECKPOINT_EVERY == 0 or used >= 60 * minutes:
            mean = sum(losses) / len(losses)
            print(f"step {step}, {step * ROWS * LENGTH:,} tokens, {used / 60:.1f} min: loss {mean:.3f}", flush=True)
            losses = []
            state = {"model": found.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": used}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    found.bfloat16().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


@torch.no_grad()
def untuned(model: Path, out: Path, items: int) -> None:
    """Exact matches in points on `items` test inputs of every task and length, in three dresses."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    table: dict[str, dict[str, float]] = {}
    for kind, how in STUDIED.items():
        for length in LENGTHS.get(kind, (4, 16, 64)):
            rng = random.Random(f"untuned {kind} {length}")
            asked = [example(kind, "test", length, rng) for _ in range(items)]
            shown = [[example(kind, "pretraining", length, rng) for _ in range(3)] for _ in asked]
            dresses = {
                "bare": [f"<|bos|><|user|>{a}<|assistant|>" for a, _ in asked],
                "instruction": [f"<|bos|><|user|>{how.instructions[0]}\n{a}<|assistant|>" for a, _ in asked],
                "three examples": [
                    "<|bos|>"
                    + "".join(f"<|user|>{x}<|assistant|>{y}<|end|>" for x, y in before)
                    + f"<|user|>{a}<|assistant|>"
                    for before, (a, _) in zip(shown, asked, strict=True)
                ],
            }
            if length > 16:
                dresses.pop("three examples")
            line = {"answer tokens": sum(len(tokenizer(b).input_ids) for _, b in asked) / len(asked)}
            for name, prompts in dresses.items():
                right = 0
                for i in range(0, items, 50):
                    batch = tokenizer(prompts[i : i + 50], return_tensors="pt", padding=True, add_special_tokens=False)
                    most = max(len(tokenizer(b).input_ids) for _, b in asked) + 4
                    told = found.generate(**batch, max_new_tokens=most, do_sample=False)
                    told = tokenizer.batch_decode(told[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
                    right += sum(t.strip() == b for t, (_, b) in zip(told, asked[i : i + 50], strict=True))
                line[name] = round(100 * right / items, 1)
            table[f"{kind}-{length}"] = line
            print(f"{kind}-{length}", line, flush=True)
            out.write_text(json.dumps({"items": items, "tasks": table}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "train", "untuned"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="to start from, or to ask")
    parser.add_argument("--minutes", type=float, default=45, help="of training, over all runs")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--text", type=Path, help="one paragraph on each line, for a few rows of plain English")
    parser.add_argument("--items", type=int, default=500)
    chosen = parser.parse_args()
    if chosen.what == "data":
        write_data(chosen.out)
    elif chosen.what == "train":
        train(chosen.out, chosen.minutes, chosen.text, chosen.rate, chosen.model)
    else:
        untuned(chosen.model, chosen.out, chosen.items)


if __name__ == "__main__":
    main()
