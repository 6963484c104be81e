"""The model card beside a saved adapter: whoever opens it needs trimtab, which PEFT's own card cannot know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

TAGS = {"reft", "trimtab"}
HOW_TO_OPEN = """\
## How to open this adapter

```python
import trimtab  # registers the method with PEFT, which else says KeyError: 'REFT'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def complete_card(folder: Path) -> None:
    """Add the tags and how the adapter is opened to the folder's card; make one where there is none."""
    path = folder / "README.md"
    card: Any = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: peft\n---\n")
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if "import trimtab" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{HOW_TO_OPEN}".lstrip()
    card.save(path)
