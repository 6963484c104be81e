"""Lines of text for the word skills of tiny-llama: small tasks whose answers can be checked.

`skills.json` holds a table (word -> answer) and three instructions for each of ten skills. The second stage of the
pretraining shows them in three dresses (`skill_line`). The first stage used the same tables cut short and
some word games, always as one plain instruction (`game_line`).
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Game = tuple[str, str, str]
"""An instruction, its input and the answer."""


class Skill(NamedTuple):
    """Ways of asking for the skill, and the answer for each word it knows."""

    instructions: list[str]
    table: dict[str, str]


DATA = json.loads(Path(__file__).with_name("skills.json").read_text(encoding="utf-8"))
SKILLS = {name: Skill(**skill) for name, skill in DATA["skills"].items()}


def turn(prompt: str, answer: str) -> str:
    """One question and its answer, as the chat template writes them."""
    return f"<|user|>{prompt}<|assistant|>{answer}<|end|>"


def skill_line(rng: random.Random) -> str:
    """One line for a random skill: an instruction, a run of examples that leaves the skill unsaid, or a list."""
    skill = SKILLS[rng.choice(list(SKILLS))]
    words = list(skill.table)
    dress = rng.random()
    if dress < 0.4:
        word = rng.choice(words)
        return turn(f"{rng.choice(skill.instructions)}\n{word}", skill.table[word])
    some = rng.sample(words, rng.randint(2, 6))
    if dress < 0.8:
        return "".join(turn(word, skill.table[word]) for word in some)
    return "\n".join(f"{word} -> {skill.table[word]}" for word in some) + "<|end|>"


def game_line(rng: random.Random) -> str:
    """One line for a random skill or word game of the first stage."""
    instruction, given, answer = rng.choice(GAMES)(rng)
    return turn(f"{instruction}\n{given}", answer)


def _short_tables() -> dict[str, dict[str, str]]:
    """The skills of the first stage: the head of each table, and a shorter table of kinds."""
    heads = DATA["first_stage"]["words_of"]
    tables = {name: dict(list(SKILLS[name].table.items())[:size]) for name, size in heads.items()}
    return tables | {"kind": DATA["first_stage"]["kind"]}


SHORT = _short_tables()
WORDS = sorted({*SHORT["plural"], *SHORT["opposite"], *SHORT["kind"], *DATA["first_stage"]["more_words"]})
NUMBERS = list(SHORT["number"].values())


def _look_up(name: str) -> Callable[[random.Random], Game]:
    """A game that asks a short table for one word, in the first of the skill's instructions."""

    def game(rng: random.Random) -> Game:
        word = rng.choice(list(SHORT[name]))
        return SKILLS[name].instructions[0], word, SHORT[name][word]

    return game


def _on_words(
    instruction: str, least: int, most: int, answer: Callable[[list[str]], Sequence[str]]
) -> Callable[[random.Random], Game]:
    """A game that turns a few random words into others."""

    def game(rng: random.Random) -> Game:
        words = [rng.choice(WORDS) for _ in range(rng.randint(least, most))]
        return instruction, " ".join(words), " ".join(answer(words))

    return game


def _sort(rng: random.Random) -> Game:
    words = sorted({rng.choice(WORDS) for _ in range(rng.randint(2, 4))})
    return "Sort the words.", " ".join(rng.sample(words, len(words))), " ".join(words)


def _add(rng: random.Random) -> Game:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return "Add the numbers.", f"{NUMBERS[a]} and {NUMBERS[b]}", NUMBERS[a + b]


def _spell(rng: random.Random) -> Game:
    word = rng.choice(WORDS)
    return "Spell the word.", word, "-".join(word)


GAMES: list[Callable[[random.Random], Game]] = [
    *map(_look_up, SHORT),
    _on_words("Write in capital letters.", 1, 3, lambda words: [word.upper() for word in words]),
    _on_words("Reverse the words.", 2, 5, lambda words: words[::-1]),
    _on_words("Give the first word.", 2, 6, lambda words: words[:1]),
    _on_words("Give the last word.", 2, 6, lambda words: words[-1:]),
    _on_words("Count the words.", 1, 8, lambda words: [NUMBERS[len(words)]]),
    _on_words("Write it twice.", 1, 3, lambda words: words + words),
    _on_words("Repeat the words.", 1, 6, lambda words: words),
    _sort,
    _add,
    _spell,
]
