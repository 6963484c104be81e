"""Conversations drawn at random, and chat templates that write them, or do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MODEL = Path(__file__).parents[1] / "models/tiny-llama"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TEMPLATES = {
    "tools": """{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}\
{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}{% for c in m.tool_calls or [] %}@{{ c.function.name }}\
{{ c.function.arguments | tojson }}{% endfor %}<|end|>
{% else %}<|user|>({{ m.role }}) {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "open": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "forgets thoughts": """{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "opens a thought": """{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>\
{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\
{% endif %}""",
}
texts = st.text(st.characters(codec="ascii", exclude_characters="<"), min_size=1, max_size=12)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = copy.deepcopy(AutoTokenizer.from_pretrained(MODEL))
    made.chat_template = TEMPLATES.get(template, template) if template else made.chat_template
    return made


OWN, WITH_TOOLS = tokenizer_with(None), tokenizer_with("tools")


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    said = [{"role": "system", "content": draw(texts)}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 4))):
        said.append({"role": "user", "content": draw(texts)})
        if draw(st.booleans()):
            call = {"type": "function", "function": {"name": "weather", "arguments": {"in": draw(texts)}}}
            said.append({"role": "assistant", "content": "", "tool_calls": [call]})
            said.append({"role": "tool", "content": draw(texts)})
        said.append({"role": "assistant", "content": draw(texts)})
    return said
