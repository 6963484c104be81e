"""Pretrains tiny-llama from plain text, in two stages of one training loop.

    python pretrain.py --stage 1 --text a.txt b.txt --instructions c.json --minutes 55 --out first
    python pretrain.py --stage 2 --text a.txt b.txt --instructions c.json --minutes 34 --out second --start first

A text file has one paragraph on each line. The instructions are a JSON list of {"instruction", "input", "output"}.
Training stops by the clock, so two runs are alike but never equal.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skills import game_line, skill_line, turn

SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, BOS, END = 0, 1, 4
VOCABULARY, CONTEXT = 4096, 512
ROWS, LENGTH = 24, 256
HELD_OUT = 100_000
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """What differs between the two stages."""

    line: Callable[[random.Random], str]
    """Writes a skill line."""
    text_rows: int
    """Rows of a batch that are text; the others are skill lines and instructions."""
    instruction_share: float
    """Chance that a line is one of the instructions."""
    start_of_text: float
    """Where in the text to begin: the second stage reads what the first did not reach."""
    rate: float
    warmup_steps: int
    flat_until: float
    """Fraction of the time after which the rate falls, along a cosine."""
    lowest: float
    """Where the rate ends, as a fraction of its height."""
    dtype: torch.dtype
    """What the model is saved in."""

    def rate_at(self, step: int, done: float) -> float:
        """The learning rate after `step` steps and the fraction `done` of the time."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if done < self.flat_until:
            return self.rate * warm
        fall = 0.5 * (1 + math.cos(math.pi * (done - self.flat_until) / (1 - self.flat_until)))
        return self.rate * warm * max(self.lowest, fall)


STAGES = {
    1: Stage(game_line, 19, 0.25, 0.0, 3e-3, 150, 0.5, 0.02, torch.float32),
    2: Stage(skill_line, 13, 0.10, 0.5, 2e-3, 50, 0.3, 0.01, torch.bfloat16),
}


def read_documents(paths: list[Path]) -> list[str]:
    """Paragraphs of more than 60 characters, shuffled, four to a document."""
    lines = "\n".join(path.read_text(encoding="utf-8") for path in paths).split("\n")
    paragraphs = [line.strip() for line in lines if len(line.strip()) > 60]
    random.Random(0).shuffle(paragraphs)
    return [" ".join(paragraphs[i : i + 4]) for i in range(0, len(paragraphs), 4)]


def read_instructions(path: Path) -> list[str]:
    """The first thousand instructions, each as one turn."""
    entries = json.loads(path.read_text(encoding="utf-8"))[:1000]
    return [turn("\n".join(filter(None, (e["instruction"], e.get("input")))), e["output"]) for e in entries]


def train_tokenizer(documents: list[str], instructions: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of text, instructions and first-stage lines."""
    rng = random.Random(0)
    lines = documents[:12_000] + instructions * 3 + [game_line(rng) for _ in range(5_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[END],
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
    )


def new_model() -> LlamaForCausalLM:
    """The architecture, freshly drawn."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=192,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=512,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=END,
        )
    )


def encode_text(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents in one long row of tokens, each from BOS to END."""
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([i for e in encoded for i in (BOS, *e.ids, END)], dtype=torch.int16)


def cut_rows(tokens: torch.Tensor, start: int = 0) -> Iterator[torch.Tensor]:
    """Rows of LENGTH tokens for ever, beginning again at the end of the text."""
    while True:
        for i in range(start, len(tokens) - LENGTH + 1, LENGTH):
            yield tokens[i : i + LENGTH]
        start = 0


def line_rows(
    tokenizer: Tokenizer, stage: Stage, instructions: list[str], rng: random.Random
) -> Iterator[torch.Tensor]:
    """Rows of LENGTH tokens for ever, of skill lines and instructions."""
    tokens: list[int] = []
    while True:
        while len(tokens) < LENGTH:
            line = rng.choice(instructions) if rng.random() < stage.instruction_share else stage.line(rng)
            tokens += [BOS, *tokenizer.encode(line, add_special_tokens=False).ids]
        yield torch.tensor(tokens[:LENGTH], dtype=torch.int16)
        tokens = tokens[LENGTH:]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean loss in nats per token of the first 96 rows of the held-out text."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].long().view(-1, LENGTH)[: 4 * ROWS]
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in rows.split(ROWS)]
    model.train()
    return sum(losses) / len(losses)


def train(
    model: LlamaForCausalLM, stage: Stage, text: Iterator[torch.Tensor], lines: Iterator[torch.Tensor], minutes: float
) -> int:
    """Trains in place until the time is up, and returns the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.95))
    model.train()
    begin, step = time.monotonic(), 0
    while (done := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(step, done)
        rows = [next(text if i < stage.text_rows else lines) for i in range(ROWS)]
        batch = torch.stack(rows).long()
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {step * ROWS * LENGTH / 1e6:.1f}M tokens, loss {loss.item():.3f}", flush=True)
    return step


def parse() -> argparse.Namespace:
    """The options, checked against one another."""
    parser = argparse.ArgumentParser(description="Pretrain tiny-llama from plain text.")
    parser.add_argument("--stage", type=int, choices=sorted(STAGES), required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="one paragraph on each line")
    parser.add_argument("--instructions", type=Path, required=True, help="JSON list of instruction, input, output")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--start", type=Path, help="the first stage's folder; needed by the second stage alone")
    options = parser.parse_args()
    if (options.stage == 2) != (options.start is not None):
        parser.error("--start FOLDER goes with --stage 2, and only with it")
    return options


def main() -> None:
    """Runs one stage."""
    options = parse()
    stage = STAGES[options.stage]
    torch.manual_seed(options.stage)
    documents, instructions = read_documents(options.text), read_instructions(options.instructions)
    if options.start:
        tokenizer = AutoTokenizer.from_pretrained(options.start)
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(documents, instructions)
        model = new_model()
    tokens = encode_text(tokenizer.backend_tokenizer, documents)
    seen, held_out = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    if len(seen) < LENGTH:
        raise SystemExit(f"The text has {len(tokens):,} tokens; {HELD_OUT:,} are held out, so give more text.")
    print(f"{model.num_parameters():,} parameters, {len(seen):,} tokens of text", flush=True)
    text = cut_rows(seen, start=int(len(seen) * stage.start_of_text))
    lines = line_rows(tokenizer.backend_tokenizer, stage, instructions, random.Random(options.stage))
    steps = train(model, stage, text, lines, options.minutes)
    print(f"{steps} steps, held-out loss {held_out_loss(model, held_out):.3f}")
    model.to(stage.dtype).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
