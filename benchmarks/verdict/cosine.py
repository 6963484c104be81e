"""What the encoder of sts-b.yaml says of its test pairs without training: the cosine of two sentences' embeddings.

python benchmarks/verdict/cosine.py --model FOLDER --data DATA
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from trimtab.tasks.files import read_rows
from trimtab.tasks.scores import PEARSON, SPEARMAN, Truth

RESULT = Path(__file__).parents[1] / "results/verdict/sts-b/cosine.json"


def main() -> None:
    """Write the figures into `RESULT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    asked = parser.parse_args()
    rows = read_rows(asked.data / "glue/STS-B/dev.tsv")
    tokenizer, model = AutoTokenizer.from_pretrained(asked.model), AutoModel.from_pretrained(asked.model).eval()

    def embedded(texts: list[str]) -> Tensor:
        """The mean of a text's tokens, as the model was trained."""
        parts = []
        for start in range(0, len(texts), 50):
            batch = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    one, other = (embedded([str(row[name]) for row in rows]) for name in ("sentence1", "sentence2"))
    said, truth = torch.cosine_similarity(one, other).tolist(), Truth([float(row["score"]) for row in rows])
    found = {score.name: round(score.value(said, truth), 4) for score in (PEARSON, SPEARMAN)}
    found["correlation"] = round(sum(found.values()) / 2, 4)
    RESULT.write_text(json.dumps({"items": len(rows), **found}, indent=2) + "\n")
    print(found)


if __name__ == "__main__":
    main()
