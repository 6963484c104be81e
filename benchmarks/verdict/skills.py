"""Writes six of tiny-llama's word skills as tasks of a bare word each: `python benchmarks/verdict/skills.py`.

The word alone does not say which skill is wanted; training must. A word's split is the same in every task.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent
TABLES = HERE.parents[1] / "models/pretrain/skills.json"
SKILLS = ("plural", "past", "opposite", "kind", "mood", "french")


def split_of(word: str) -> str:
    """Two in five for training and for test, one for validation, by a hash of the word."""
    place = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 5
    return "train" if place < 2 else "test" if place < 4 else "validation"


def main() -> None:
    """Write `data/<skill>/<split>.jsonl`."""
    skills = json.loads(TABLES.read_text(encoding="utf-8"))["skills"]
    for skill in SKILLS:
        for split in ("train", "validation", "test"):
            rows = [{"input": w, "output": a} for w, a in skills[skill]["table"].items() if split_of(w) == split]
            path = HERE / "data" / skill / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
