"""lm-evaluation-harness with the type `trimtab`: edits are in the contexts, whatever shares a batch or a forward."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoTokenizer

from trimtab import ReftConfig, cli
from trimtab.interop.mmlu import read_questions, write_mmlu

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from trimtab.interop import lm_eval as interop
from trimtab.interop.lm_eval import TrimtabLM

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models/tiny-llama")
VOCAB = len(TOKENIZER)
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 4}
TOLERANCE = 1e-5
DOG = "The cat sat on the mat and looked at", " the old dog"
TEXTS = [
    DOG,
    ("Rivers", " run down to the sea"),
    ("Two and two are", " five"),
    ("The cat sat on the mat and looked at", " the old door"),  # all but the last token are those of DOG
    ("The cat sat on the mat and", " looked at the old dog"),  # all tokens are, but the prompt ends before
    ("", "A prompt that is empty"),
]


@cache
def unadapted() -> Any:
    return tiny("llama", **SIZES)


def adapted(positions: str = "f2+l3", method: str = "loreft", **overrides: Any) -> PeftModel:
    """A tiny model for the tokenizer, with an adapter whose edits are large enough to be seen."""
    torch.manual_seed(1)
    tied = "+" not in positions
    config = ReftConfig(task_type="CAUSAL_LM", r=3, positions=positions, tied=tied, init_weights="paper", method=method)
    model = get_peft_model(tiny("llama", **SIZES, **overrides), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith((".weight", ".bias")) and ".reft." in name:
                tensor.add_(torch.randn_like(tensor))
    return model.eval()


def harness(model: Any, batch_size: int = 8, kind: type[HFLM] = TrimtabLM, **kwargs: Any) -> HFLM:
    return kind(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, **kwargs)


def ask(lm: HFLM, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    answers: list[Any] = getattr(lm, kind)([Instance(kind, {}, a, i) for i, a in enumerate(arguments)], True)
    return answers


def scores(lm: HFLM, texts: Sequence[tuple[str, str]] = TEXTS) -> Tensor:
    return torch.tensor([score for score, _ in ask(lm, "loglikelihood", texts)])


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As the harness does: BOS stands for an empty context."""
    return (ids(context) or [1]), ids(context + continuation)[len(ids(context)) :]


@torch.no_grad()
def reference(model: PeftModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probabilities (answer, V) of one sequence under LoReFT f2+l3: a loop over the blocks, with the formula."""
    n, saved, base = len(prompt), get_peft_model_state_dict(model), unadapted()
    p, s = (2, 3) if n >= 5 else (min(2, n // 2), min(3, (n + 1) // 2))
    h = base.model.embed_tokens(torch.tensor([prompt + answer[:-1]]))
    rope = base.model.rotary_emb(h, torch.arange(h.shape[1])[None])
    for i, block in enumerate(base.model.layers):
        h = block(h, position_embeddings=rope, attention_mask=None)
        for part, at in ("prefix", slice(p)), ("suffix", slice(n - s, n)):
            key = f"base_model.model.model.layers.{i}.reft.reft_{part}"
            R, W, b = (saved[f"{key}.{name}"] for name in ("rotation", "weight", "bias"))
            h[0, at] += (h[0, at] @ W.T + b - h[0, at] @ R.T) @ R
    return base.lm_head(base.model.norm(h))[0, -len(answer) :].log_softmax(-1)


def expected(model: PeftModel, prompt: list[int], answer: list[int]) -> float:
    return float(reference(model, prompt, answer)[range(len(answer)), answer].sum())


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
def test_contexts_are_edited_and_nothing_else(batch_size: Any) -> None:
    model = adapted()
    found = scores(harness(model, batch_size, max_batch_size=4))
    assert (found - torch.tensor([expected(model, *split(*text)) for text in TEXTS])).abs().max() < TOLERANCE
    with model.disable_adapter():
        assert ((found - scores(harness(model))).abs() > 1e-2).all()  # the edits are there to be seen


def test_batch_size_does_not_matter() -> None:
    model = adapted("f1+l2", "direft")
    assert (scores(harness(model, 1)) - scores(harness(model, 8))).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("positions", "same"), [("l1", False), ("prompt", False), ("generated", False), ("f2", True), ("all", True)]
)
def test_the_stock_type_edits_answers(positions: str, same: bool) -> None:
    """Which is why there is a type of our own; where the end of a prompt does not matter the two agree."""
    model = adapted(positions)
    texts = [TEXTS[i] for i in (0, 1, 3)]
    difference = (scores(harness(model), texts) - scores(harness(model, kind=HFLM), texts)).abs()
    assert (difference < TOLERANCE).all() if same else (difference > 1e-3).all()


def test_one_token_continuations_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (context, answer) = adapted(), split(*DOG)
    best = int(reference(model, context + answer[:-1], [0])[0].argmax())
    pairs = [(context + answer[:-1], [token]) for token in (5, best, 77)]
    pairs += [(context, answer), (context, [*answer[:-1], best]), (context, [*answer[:-1], 77])]  # the same tokens
    lm, batches = harness(model), []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inputs, **kwargs: batches.append(inputs) or call(inputs, **kwargs))
    found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)
    assert [len(batch) for batch in batches] == [2]
    for (score, greedy), (prompt, continuation) in zip(found, pairs, strict=True):
        log_probs = reference(model, prompt, continuation)
        assert abs(score - expected(model, prompt, continuation)) < TOLERANCE
        assert greedy == (log_probs.argmax(-1).tolist() == continuation)
    assert [greedy for _, greedy in found[:3]] == [False, True, False]


def test_what_is_cut_from_the_left_shortens_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    model, lengths = adapted(), range(4, 11)
    context, answer = split(*DOG)
    assert len(context) + len(answer) == 12
    for longest in lengths:
        kept = (context + answer)[-longest - 1 :]
        lm = harness(model, max_length=longest)
        assert abs(scores(lm, [DOG])[0] - expected(model, kept[: -len(answer)], answer)) < TOLERANCE
    assert caplog.text.count("1 of 1 requests lose the start of their context") == len(lengths)


def test_a_continuation_longer_than_the_model_takes() -> None:
    with pytest.raises(ValueError, match=r"a continuation of \d tokens: must be from 1 to 2"):
        scores(harness(adapted(), max_length=2), [DOG])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rolling_requests_answer_an_empty_prompt(batch_size: int) -> None:
    """The first window holds the prompt, BOS; the text goes on in windows of which nothing is edited."""
    model, text = adapted(), "".join(DOG)
    tokens, longest = ids(text), 5
    assert 10 < len(tokens) <= 15
    windows = [([1], tokens[:5]), (tokens[4:5], tokens[5:10]), (tokens[-6 : 10 - len(tokens)], tokens[10:])]
    total = expected(model, *windows[0])
    with torch.no_grad(), model.disable_adapter():
        for context, answer in windows[1:]:
            log_probs = model(torch.tensor([context + answer[:-1]])).logits[0, -len(answer) :].log_softmax(-1)
            total += float(log_probs[range(len(answer)), answer].sum())
    (found,) = ask(harness(model, batch_size, max_length=longest), "loglikelihood_rolling", [(text,)])
    assert abs(found - total) < 5 * TOLERANCE


# ---- generation, other models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8])
def test_generate_until(batch_size: int) -> None:
    model = adapted()
    contexts = [context for context, _ in TEXTS if context]
    until = {"until": [], "max_gen_toks": 8}
    found = ask(harness(model, batch_size), "generate_until", [(context, until) for context in contexts])
    for context, text in zip(contexts, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([ids(context)]), max_new_tokens=8, do_sample=False)[0]
        assert text == TOKENIZER.decode(alone[len(ids(context)) :], skip_special_tokens=True) != ""


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_other_models_are_scored_as_ever(adapter: str) -> None:
    model = tiny("llama", **SIZES)
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    ours, stock = harness(model), harness(model, kind=HFLM)
    assert not ours.has_reft
    assert torch.equal(scores(ours), scores(stock))
    assert ask(ours, "loglikelihood_rolling", [DOG[:1]]) == ask(stock, "loglikelihood_rolling", [DOG[:1]])


def test_encoder_decoder() -> None:
    """The encoder's input is the context; batches of any size agree."""
    config = ReftConfig(task_type="SEQ_2_SEQ_LM", r=3, positions="f2+l3", init_weights="paper")
    model = get_peft_model(tiny("t5", vocab_size=VOCAB), config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".reft." in name and name.endswith("bias"):
                tensor.mul_(20)
    alone = scores(harness(model, 1))
    assert (alone - scores(harness(model, 8))).abs().max() < TOLERANCE
    with model.disable_adapter():
        assert ((alone - scores(harness(model, 1))).abs() > 1e-3).all()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A base model, whose vocabulary is larger than the tokenizer's as is common, and adapters of it."""

    def base() -> Any:
        return tiny("llama", **{**SIZES, "vocab_size": VOCAB + 64})

    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    fresh, reft = (ReftConfig(task_type="CAUSAL_LM", positions="f2+l3", init_weights=how) for how in (True, "paper"))
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    for name, config in {"fresh": fresh, "reft": reft, "lora": lora}.items():
        get_peft_model(base(), config).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("base", "fresh", "reft", "lora")}


def test_adapters_from_folders(folders: dict[str, str]) -> None:
    def load(adapter: str, kind: type[HFLM] = TrimtabLM) -> HFLM:
        extra = f",peft={folders[adapter]}" if adapter else ""
        return kind.create_from_arg_string(f"pretrained={folders['base']}{extra}", {"device": "cpu", "batch_size": 4})

    def found(*which: Any) -> Tensor:
        return scores(load(*which), [text for text in TEXTS if text is not TEXTS[4]])  # which HFLM mixes up with DOG

    base = found("")
    assert torch.equal(found("", HFLM), base)
    assert load("fresh").has_reft
    assert (found("fresh") - base).abs().max() < TOLERANCE
    assert (found("fresh", HFLM) - base).abs().min() > 1e-2  # whose vocabulary was cut
    assert (found("reft") - base).abs().max() > 1e-4
    assert torch.equal(found("lora"), found("lora", HFLM))


# ---- MMLU from files, and the commands -------------------------------------------------------------------------------

QUESTIONS = [
    ("Which one barks?", "a dog", "a cat", "a river", "bread", "A"),
    ("Which is a drink?", "a stone", "milk", "a door", "a hill", "B"),
    ('What flows, "down"?', "a dog", "a cat, or two", "a river", "bread", "C"),
    ("What is baked?", "a dog", "a cat", "a river", "bread", "D"),
]


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Two subjects as MMLU is published, and one in the other form that is about: headings, and answers as numbers."""
    for split_name, rows in ("dev", QUESTIONS[:1]), ("test", QUESTIONS):
        (tmp_path / "mmlu" / split_name).mkdir(parents=True)
        for subject in ("anatomy", "astronomy"):
            with (tmp_path / "mmlu" / split_name / f"{subject}_{split_name}.csv").open("w", newline="") as file:
                headed = subject == "astronomy"
                lines = [(*row[:5], "ABCD".index(row[5])) for row in rows] if headed else rows
                csv.writer(file).writerows([["question", "a", "b", "c", "d", "answer"], *lines] if headed else lines)
    return tmp_path / "mmlu"


def test_mmlu_from_files(mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip, which takes seconds
    monkeypatch.setattr("sys.argv", ["trimtab", "mmlu", str(mmlu), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    stock = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    tasks = TaskManager(include_path=[stock, tmp_path / "out"], include_defaults=False)
    model = adapted()
    results = lm_eval.simple_evaluate(
        harness(model), tasks=["mmlu_local"], task_manager=tasks, num_fewshot=1, bootstrap_iters=0
    )
    assert {name: len(samples) for name, samples in results["samples"].items()} == {
        "mmlu_anatomy": 4,
        "mmlu_astronomy": 4,
    }
    right = []
    for sample in [s for samples in results["samples"].values() for s in samples]:
        prompts = [prompt for prompt, _ in sample["arguments"]]
        assert set(prompts) == {prompts[0]}
        assert "Which one barks?\nA. a dog\n" in prompts[0]
        assert prompts[0].endswith("\nAnswer:")
        by_hand = [expected(model, *split(prompts[0], f" {letter}")) for letter in "ABCD"]
        right.append(by_hand.index(max(by_hand)) == sample["target"])
    assert results["results"]["mmlu_local"]["acc,none"] == sum(right) / 8


@pytest.mark.parametrize(
    ("line", "message"), [("q,a,b,c,d,E", "question 1: must be"), ("q,a,b,c,A", "question 1: must be")]
)
def test_bad_questions(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="no MMLU there"):
        write_mmlu(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--tasks", "boolq", "-L", "5"], ["run", "--model", "trimtab", "--tasks", "boolq", "-L", "5"]),
        (["run", "--model", "hf"], ["run", "--model", "trimtab", "--model", "hf"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["run", "--help"], ["run", "--model", "trimtab", "--help"]),
    ],
)
def test_command(given: list[str], passed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("sys.argv", ["trimtab", "lm-eval", *given])
    monkeypatch.setattr(interop, "cli_evaluate", lambda: seen.append(interop.sys.argv[1:]))
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [passed]
