"""PEFT's method_comparison/MetaMathQA with ReFT: its own run.py, told what a ReFT adapter and the prompt of a row are.

    cp -r benchmarks/method_comparison/* PEFT/method_comparison/MetaMathQA/
    cd PEFT/method_comparison/MetaMathQA
    make RUN_SCRIPT=reft.py results/reft--llama-3.2-3B-rank4-f7+l7.json

It needs what PEFT's does (a GPU, the model, its requirements.txt). Its loss is over question and answer, so that labels
do not say where the prompt ends. The rule here: behind what its query_template puts after the question, at the token
that completes it, which in a tokenizer that joins "Answer:" with the first word of the answer is that joint token.
"""

from __future__ import annotations

import json
import runpy
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import trimtab  # noqa: F401  (after which PEFT opens the config)

DEFAULTS = "default_training_params.json"


class PromptEnds:
    """Counts the tokens of a row's prompt, which ends with `marker`."""

    def __init__(self, tokenizer: Any, marker: str) -> None:
        self.tokenizer, self.marker = tokenizer, marker
        self._texts: dict[int, str] = {}

    def __call__(self, ids: list[int]) -> int:
        """Of a row without padding; all of it where there is no marker."""
        ends = list(accumulate(len(self._text(token)) for token in ids))
        found = "".join(map(self._text, ids)).find(self.marker)
        return len(ids) if found < 0 else bisect_left(ends, found + len(self.marker)) + 1

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def tell(self, model: nn.Module) -> None:
        """Let every forward of a PeftModel that is given labels know its prompts' lengths."""

        def told(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if "labels" not in kwargs:
                return None
            ids: Tensor = kwargs["input_ids"]
            rows = zip(ids, kwargs["attention_mask"].bool(), strict=True)
            return args, {**kwargs, "prompt_lengths": [self(row[mask].tolist()) for row, mask in rows]}

        model.register_forward_pre_hook(told, with_kwargs=True)


def main() -> None:
    """Run their run.py, on the arguments given, with its models told."""
    import utils  # theirs, beside this file

    get_model = utils.get_model
    marker = json.loads(Path(DEFAULTS).read_text())["query_template"].rpartition("{query}")[2]

    def told_model(*, model_id: str, **options: Any) -> Any:
        model = get_model(model_id=model_id, **options)
        tokenizer = utils.get_tokenizer(model_id=model_id, max_seq_length=0)
        PromptEnds(tokenizer, marker).tell(model)
        return model

    utils.get_model = told_model
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
