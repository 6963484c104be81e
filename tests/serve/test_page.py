"""The page in a real browser: who answers, strengths, streams, the command line to copy; wide and on a phone."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, Browser
from served import BASE, Served, listening, serving

from trimtab.serve.app import create_app
from trimtab.serve.guard import Access

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
MARKS = ".turn:last-child .moves:not([hidden])"
DONE = "!document.getElementById('send').disabled && document.querySelectorAll('.answer').length === "
ANSWERS = "[...document.querySelectorAll('.turn:last-child .answer p:not(.moves)')].map(p => p.textContent)"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("adapters")) as server:
        yield server


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as browser:
        yield browser
        assert not browser.errors


@pytest.mark.parametrize("width", [1250, 420])
def test_adapters_answer_side_by_side(served: Served, tab: Browser, width: int, tmp_path: Path) -> None:
    tab.open(served.url, width)
    tab.wait("document.querySelectorAll('.lane').length === 3")
    tab.screenshot(tmp_path / f"first-{width}.png")
    for name in ("ends", "new"):  # by hand: a name of the list, and Enter
        tab.js("document.querySelector('#add input').focus()")
        tab.type(name)
        tab.press("Enter")
    tab.js("document.getElementById('most').value = 12")
    tab.js("document.getElementById('text').focus()")
    tab.type("cat")
    tab.press("Enter")
    tab.wait(DONE + "5")
    models = [BASE, "all", "apart", "ends", "new"]
    ids = served.chat_ids("cat")
    assert tab.js(ANSWERS) == [served.expected_text(ids, model, 12) for model in models]
    marked = tab.js(f"[...document.querySelectorAll('{MARKS}')].map(p => p.textContent)")
    assert marked == ["<|bos|><|user|>cat<|assistant|>"] * 4  # of all but the base model
    edited = tab.js(f"[...document.querySelectorAll('{MARKS}')].map(p => p.querySelectorAll('.moved').length)")
    assert edited == [len(ids), 5, 3, 0]  # all, f2+l3, f1+l2, generated
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js("document.querySelector('.turn:last-child').getBoundingClientRect().top") < 400
    tab.screenshot(tmp_path / f"answers-{width}.png")

    tab.js("document.querySelectorAll('.lane input')[2].focus()")
    for _ in range(10):
        tab.press("ArrowLeft")  # by 0.05 each
    assert tab.js("lanes[3].scale") == 0.5 and tab.js("document.querySelectorAll('output')[2].textContent") == "0.50"
    tab.js("document.getElementById('again').click()")
    tab.wait(DONE + "5")
    assert tab.js(ANSWERS)[3] == served.expected_text(ids, "ends", 12, scale=0.5)

    tab.js("document.getElementById('text').focus()")
    tab.type("it's a dog")
    tab.press("Enter")
    tab.wait(DONE + "10")
    answer = served.expected_text(ids, BASE, 12)
    said = f"<|bos|><|user|>cat<|assistant|>{answer}<|end|><|user|>it's a dog<|assistant|>"
    both = served.service.tokens.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert tab.js(ANSWERS)[0] == served.expected_text(both, BASE, 12)
    command = tab.js("curl(bodyOf(lanes[3], [], 'it\\'s a dog'))")
    assert command.startswith(f"curl {served.url}/v1/chat/completions") and "it'\\''s a dog" in command
    assert '"reft_scale":0.5' in command
    tab.screenshot(tmp_path / f"second-{width}.png")


def test_escape_stops_an_answer(served: Served, tab: Browser) -> None:
    tab.open(served.url, 1250)
    tab.wait("document.querySelectorAll('.lane').length === 3")
    tab.js("document.getElementById('most').value = 480")
    tab.js("document.getElementById('text').focus()")
    with served.service.engine.pause():
        tab.type("cat")
        tab.press("Enter")
        tab.wait("!document.getElementById('stop').disabled")
        tab.press("Escape")
        tab.wait(DONE + "3")
    assert tab.js("[...document.querySelectorAll('.foot span')].map(s => s.textContent)") == ["stopped"] * 3
    tab.js("document.getElementById('clear').click()")
    assert tab.js("document.querySelectorAll('.turn').length") == 0


def test_with_a_key_and_a_name_that_is_not_there(served: Served, tab: Browser) -> None:
    with listening(create_app(served.service, Access(keys=("secret",)))) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        tab.open(url, 420)
        tab.wait("document.getElementById('note').textContent.includes('key')")
        tab.said.clear()  # the browser reports the 401 as an error
        tab.js("document.getElementById('key').value = 'secret'; models()")
        tab.wait("document.querySelectorAll('.lane').length === 3")
        tab.js("document.querySelector('#add input').value = 'nobody'; document.getElementById('add').requestSubmit()")
        tab.js("document.getElementById('text').value = 'cat'; document.getElementById('say').requestSubmit()")
        tab.wait(DONE + "4")
        assert "there is no model 'nobody'" in tab.js(ANSWERS)[3]
        tab.said.clear()
