"""Texts of 10 to 240 tokens to be told apart: `python benchmarks/verdict/topics.py --out DATA`.

A text has three words of one topic and one of another, wherever they fall, among little words that say nothing; the
longer it is, the fewer of its tokens tell. Its answer is a colour that stands for the topic, of which no pretraining
knows. Writes DATA/topics/TOKENS/SPLIT.jsonl; the topics and the words are those of pretrain.py.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer

from pretrain import BUNDLED, FILLER, TOPICS

TOKENS = (10, 25, 60, 120, 240)
SIZES = {"train": 240, "validation": 60, "test": 500}
COLOURS = dict(zip(TOPICS, ("green", "red", "white", "blue", "black", "yellow"), strict=True))


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    for tokens in TOKENS:
        rng, seen = random.Random(f"topics {tokens}"), set[str]()
        (folder := out / f"topics/{tokens}").mkdir(parents=True, exist_ok=True)
        for split, size in SIZES.items():
            rows = []
            while len(rows) < size:
                right, wrong = rng.sample(sorted(TOPICS), 2)
                words = rng.sample(TOPICS[right], 3) + rng.sample(TOPICS[wrong], 1)
                while len(tokenizer(" ".join([*words, "the"]), add_special_tokens=False).input_ids) <= tokens:
                    words.append(rng.choice(FILLER))
                rng.shuffle(words)
                if (text := " ".join(words)) not in seen:
                    seen.add(text)
                    rows.append({"input": text, "output": COLOURS[right]})
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
