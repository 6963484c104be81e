"""The model card beside a saved adapter: whoever opens it needs trimtab, which PEFT's own card cannot know."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
TAGS = ("reft", "trimtab")
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
    path = folder / CARD
    card = ModelCard.load(path) if path.exists() else new_card(None, "")
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if "import trimtab" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{HOW_TO_OPEN}".lstrip()
    card.save(path)


def new_card(base_model: str | None, description: str) -> ModelCard:
    """A card with nothing in it that is left to fill in."""
    data = ModelCardData(base_model=base_model, library_name="peft", tags=sorted(TAGS))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{description}")
