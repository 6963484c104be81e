"""Edits before attention's projection are served as plain `generate` has them, and at no other side of a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from served import MODEL, listening, make_adapters

from trimtab.errors import AdapterError
from trimtab.runs.models import ModelSource, load_model
from trimtab.serve.app import create_app
from trimtab.serve.guard import Access
from trimtab.serve.server import Settings, open_service


def test_edits_by_head(tmp_path: Path) -> None:
    make_adapters(
        tmp_path,
        {
            "heads": {"positions": "f1+l2", "r": 4, "site": "heads"},
            "outputs": {"positions": "f1+l2", "r": 2, "site": r".*\.o_proj"},
        },
    )
    settings: dict[str, Any] = {"sites": ("heads",), "dtype": "float32"}
    with pytest.raises(AdapterError, match="o_proj is served for edits of its other side"):
        open_service(Settings(MODEL, adapters={"outputs": tmp_path / "outputs"}, **settings))
    service = open_service(Settings(MODEL, adapters={"heads": tmp_path / "heads"}, **settings))
    ids = service.tokens.of_text("The cat and the dog")
    model = PeftModel.from_pretrained(load_model(ModelSource(MODEL, "float32")), str(tmp_path / "heads")).eval()
    how = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(torch.tensor([ids]), **how)[0, len(ids) :]]
    with model.disable_adapter():
        expected.append(model.generate(torch.tensor([ids]), **how)[0, len(ids) :])
    try:
        with listening(create_app(service, Access(), 1 << 20)) as url:
            for name, wanted in zip(("heads", "tiny-llama"), expected, strict=True):
                body = {"model": name, "prompt": ids, "max_tokens": 6, "temperature": 0}
                said = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
                assert said == service.tokens.tokenizer.decode(wanted, skip_special_tokens=True)
    finally:
        service.engine.close()
    assert not torch.equal(*expected)
