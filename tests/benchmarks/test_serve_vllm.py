"""What benchmarks/serve_vllm.py makes of answers; the engines are faked, so that no vLLM is needed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from conftest import importable

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.setenv(name, "")  # which the script sets
    with importable(monkeypatch, FOLDER):
        import serve_vllm

        monkeypatch.setattr(serve_vllm, "REST", 0)
        yield serve_vllm


class Engine:
    """Answers from a thread of its own with what the adapter adds to the prompt's first token."""

    def __init__(self, short: bool = False) -> None:
        self.short, self.asked, self.running, self.most, self.lock = short, list[Any](), 0, 0, Lock()

    def submit(
        self, id: str, prompt: list[int], new: int, adapter: int | None, heard: Callable[[Sequence[int], bool], None]
    ) -> None:
        self.asked.append(adapter)
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)

        def answer() -> None:
            for i in range(new - self.short):
                last = i == new - self.short - 1
                with self.lock:
                    self.running -= last
                heard([prompt[0] + (adapter or 0)], last)

        Thread(target=answer).start()


def test_each_prompt_is_asked_once_with_the_next_adapter(script: Any) -> None:
    engine, load = Engine(), script.Load(10, 0, 0, 3, 4)
    answers = script.asked(engine.submit, load, [[i] for i in range(10)], [None, 7], "run")
    assert answers.tokens == [[i + 7 * (i % 2)] * 4 for i in range(10)]
    assert sorted(engine.asked, key=str) == [7] * 5 + [None] * 5 and engine.most <= 3
    assert len(answers.first) == 10 and len(answers.gaps) == 10 * 3
    assert min(answers.first + answers.gaps) >= 0 and max(answers.first) <= answers.seconds


def test_an_answer_that_is_too_short_ends_the_run(script: Any) -> None:
    with pytest.raises(RuntimeError, match="4 tokens"):
        script.asked(Engine(short=True).submit, script.Load(2, 0, 0, 2, 4), [[1], [2]], [None], "run")


def test_adapters_that_change_nothing_are_not_counted(script: Any) -> None:
    load, prompts = script.Load(2, 0, 0, 3, 4), [[1], [2]]
    base = script.asked(Engine().submit, load, prompts, [None], "base")
    assert script.changed(Engine().submit, load, prompts, [0, 5, 0, 6, 7], base) == 3


def test_ratios_are_of_the_same_round_and_the_first_is_left_out(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"base": iter([9.0, 1.0, 4.0]), "other": iter([9.0, 2.0, 2.0])}

    def asked(submit: str, load: Any, *_: Any) -> Any:
        return script.Answers(next(seconds[submit]), [], [0.5], [0.25])

    monkeypatch.setattr(script, "asked", asked)
    contenders = {"base": script.Contender("base", [None], ()), "other": script.Contender("other", [1])}
    base, other = script.measure(contenders, [script.Load(4, 5, 9, 2, 8)], 2, 100)
    assert base["ratio_to"] == {} and base["tokens_per_second"] == {"median": 20.0, "min": 8.0, "max": 32.0, "n": 2}
    assert other["ratio_to"]["base"] == {"median": 1.25, "min": 0.5, "max": 2.0, "n": 2}
    assert other["first_token_ms"] == {"p50": 500.0, "p99": 500.0}
