"""Writes the word tasks of the demo: plural, french and kind, whose inputs overlap.

    python recipes/data/make_words.py

"cat" stands in three tables of the model's skills (cats, chat, animal), so the word alone does not say what is wanted;
only an adapter can. A shared word is one that stands in at least two of the tables. For each task:

- `train.jsonl`, `validation.jsonl`, `test.jsonl`: its shared words;
- `train_wide.jsonl`: those of `train.jsonl`, and the words that no other task knows.

A word is in the same split in every task, so no task trains on a word that any task is tested on.
"""

import json
import random
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).parent
SKILLS = HERE.parents[1] / "models" / "pretrain" / "skills.json"
TASKS = ("plural", "french", "kind")
SHARES = {"train": 0.5, "validation": 0.1, "test": 0.4}
SEED = 0

Tables = dict[str, dict[str, str]]


def read_tables() -> Tables:
    """The word table of each task."""
    skills = json.loads(SKILLS.read_text(encoding="utf-8"))["skills"]
    return {task: skills[task]["table"] for task in TASKS}


def split_words(words: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Deals the words out to the splits; each has its share, rounded, and the last has the rest."""
    words = rng.sample(words, len(words))
    sizes = [round(share * len(words)) for share in SHARES.values()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ends = [*starts[1:], len(words)]
    return {split: words[start:end] for split, start, end in zip(SHARES, starts, ends, strict=True)}


def split_shared(tables: Tables) -> dict[str, set[str]]:
    """The shared words in each split, words of the same tables being dealt out together."""
    words = sorted(set().union(*tables.values()))
    holders = {word: [task for task in TASKS if word in tables[task]] for word in words}
    splits: dict[str, set[str]] = {split: set() for split in SHARES}
    rng = random.Random(SEED)
    for group in [tasks for size in (2, 3) for tasks in map(list, combinations(TASKS, size))]:
        dealt = split_words([word for word in words if holders[word] == group], rng)
        for split, part in dealt.items():
            splits[split].update(part)
    return splits


def write(path: Path, table: dict[str, str], words: set[str]) -> None:
    """One JSON object on each line, in the order of the alphabet."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"input": word, "output": table[word]} for word in sorted(words & table.keys())]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):4} {path.relative_to(HERE)}")


def main() -> None:
    """Writes every file beside this one."""
    tables = read_tables()
    splits = split_shared(tables)
    shared = set().union(*splits.values())
    for task, table in tables.items():
        for split, words in splits.items():
            write(HERE / task / f"{split}.jsonl", table, words)
        write(HERE / task / "train_wide.jsonl", table, splits["train"] | (table.keys() - shared))


if __name__ == "__main__":
    main()
