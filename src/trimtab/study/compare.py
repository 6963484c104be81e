"""`trimtab compare`: every method on the same data, budget, seeds and learning rates, one small file a trial.

A trial is one method trained once. Its file is named by all that decides its outcome, so that a study which was
interrupted, or gets more seeds or methods, runs only what is missing. The learning rate of each method is chosen on
validation with the first seed; the other seeds run at the rate chosen; test is looked at by the report alone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from trimtab.adapter.config import ReftConfig
from trimtab.recipe.schema import SPLITS, Recipe
from trimtab.runs.models import quiet
from trimtab.runs.predict import Evaluation, evaluate, evaluating
from trimtab.runs.reuse import Store, choose_reuse
from trimtab.runs.trainer import ReftTrainer
from trimtab.runs.trial import Base, Counting, Progress, Report, RunError, training_arguments, versions, write_json
from trimtab.runs.ways import Contender, NotPossible
from trimtab.tasks import Example, Task, build_task
from trimtab.tasks.tokens import DataError, Encoded, is_templated

CURVE = 60
"""Points of a learning curve."""
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 32, 128
_base_losses: dict[tuple[str, str, str | None], float] = {}
"""A process's held-out losses of models as they come, since each trial starts from one."""
SMALL_STEPS = 100
"""Steps of a few-shot trial, whatever the number of examples."""
Watch = Callable[["Group"], None]


@dataclass(frozen=True)
class Trial:
    """One contender on one task with one learning rate and seed."""

    task: str
    contender: Contender
    learning_rate: float | None
    seed: int
    examples: int | None = None
    """Train on so many, drawn by the seed; None for all."""
    test: bool = True
    """Score on test too; a search, which looks at validation alone, does not."""


@dataclass(eq=False)
class Group:
    """The trials of one contender on one task with one number of examples."""

    task: str
    contender: Contender
    examples: int | None
    rates: list[dict[str, Any]] = field(default_factory=list)
    """The first seed's trials, one a learning rate."""
    seeds: list[dict[str, Any]] = field(default_factory=list)
    """The trials at the learning rate chosen, one a seed, the first seed's among them."""
    impossible: str | None = None
    """Why there is nothing to show."""

    @property
    def chosen(self) -> float | None:
        """The learning rate with the best validation score; the middle one of those that are equally good."""
        done = [r for r in self.rates if "validation" in r]
        best = [r for r in done if r["validation"] == max(r["validation"] for r in done)]
        return best[(len(best) - 1) // 2]["run"]["learning_rate"] if best else None


class Study:
    """A recipe's comparison: which trials it needs, and those there are.

    Args:
        recipe: with its `compare` section.
        contenders: for each task.
        sizes: numbers of training examples; None for all there are.
        folder: where the trials' files lie.
    Raises:
        DataError: a task's data cannot be read, or it has no test data.
    """

    def __init__(
        self,
        recipe: Recipe,
        contenders: dict[str, list[Contender]],
        folder: Path,
        sizes: Sequence[int | None] = (None,),
    ) -> None:
        for name in contenders:
            if recipe.tasks[name].data.test is None:
                raise DataError(
                    f"{name}: learning rates are chosen on validation and scores reported on test, which without data: "
                    "test: are the same; give test data"
                )
        self.recipe, self.folder = recipe, folder
        self.rates = sorted(set(recipe.compare.learning_rates))
        self.seeds = [recipe.seed + i for i in range(recipe.compare.seeds)]
        self.groups = [Group(task, c, n) for n in sizes for task, cs in contenders.items() for c in cs]
        self.content = {task: fingerprints(recipe, task) for task in contenders}

    def run(self, jobs: int, watch: Watch = lambda group: None) -> list[Group]:
        """Run what is missing, `jobs` at a time; returns the finished groups in the order of the recipe.

        Raises:
            DataError, RunError: a task cannot be read or trained; what was done until then is kept.
        """
        with workers(jobs) as pool:
            waiting: dict[Future[dict[str, Any]], Group] = {}
            for group in self.groups:
                self._submit(pool, waiting, group, self._first_trials(group))
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    group = waiting.pop(future)
                    self._take(group, future.result())
                    if group not in waiting.values():
                        self._submit(pool, waiting, group, self._later_trials(group))
                    if group not in waiting.values():
                        watch(group)
        return self.groups

    def _submit(
        self, pool: Executor, waiting: dict[Future[dict[str, Any]], Group], group: Group, trials: list[Trial]
    ) -> None:
        for trial in trials:
            waiting[pool.submit(run_trial, self.recipe, trial, self.folder, self.content[trial.task])] = group

    def _first_trials(self, group: Group) -> list[Trial]:
        first = Trial(group.task, group.contender, None, self.seeds[0], group.examples)
        return [replace(first, learning_rate=rate) for rate in self.rates] if group.contender.trains else [first]

    def _later_trials(self, group: Group) -> list[Trial]:
        """Once the learning rates are tried: the other seeds. Once those are run too, or cannot be: none."""
        if group.impossible:
            return []
        if group.seeds or not (group.contender.trains or group.contender.shots):
            group.seeds = group.seeds or [r for r in group.rates if "validation" in r]
            if not group.seeds:
                group.impossible = group.rates[0]["failed"]
            return []
        rate = group.chosen
        group.seeds = [r for r in group.rates if "validation" in r and r["run"]["learning_rate"] == rate]
        if not group.seeds:
            failures = [f"at {r['run']['learning_rate']} {r['failed']}" for r in group.rates]
            group.impossible = f"no learning rate trained: {'; '.join(failures)}"
            return []
        first = Trial(group.task, group.contender, rate, self.seeds[0], group.examples)
        return [replace(first, seed=seed) for seed in self.seeds[1:]]

    def _take(self, group: Group, result: dict[str, Any]) -> None:
        if "impossible" in result:
            group.impossible, group.seeds = result["impossible"], []
        elif group.impossible:
            return  # for one seed, so for the group: seeds chosen by what fits would not compare
        elif group.seeds:
            if "failed" in result:
                return  # one seed less, which the report shows
            group.seeds = sorted([*group.seeds, result], key=lambda r: int(r["run"]["seed"]))
        else:  # in the order of the rates, not of the processes that came first
            group.rates = sorted([*group.rates, result], key=lambda r: float(r["run"]["learning_rate"] or 0))


@contextmanager
def workers(jobs: int) -> Iterator[Executor]:
    """Processes that share the cores; each has its own GPU where there are several."""
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    cards = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for i in range(jobs):
        devices.put(cards.split(",")[i % (cards.count(",") + 1)])
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes whose threads spin for one another's cores
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(devices, threads))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(devices: Any, threads: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()  # seeing several, transformers' Trainer would use them all
    torch.set_num_threads(threads)
    quiet()


def room_for(recipe: Recipe) -> int:
    """How many trials fit at a time: one a GPU, else one for each core whose copy of the model fits into memory."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    size = sum(f.stat().st_size for f in Path(recipe.model).glob("*.safetensors")) if Path(recipe.model).is_dir() else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fit = memory // (8 * size) if size else 1  # a full fine-tuning holds weights, gradients and two moments
    return max(1, min(len(os.sched_getaffinity(0)), fit))


def run_trial(recipe: Recipe, trial: Trial, folder: Path, content: dict[str, str] | None = None) -> dict[str, Any]:
    """The trial's result: read where there is one, else trained, scored and written.

    Args:
        content: the task's `fingerprints`, where the caller has them; with them a result is found without reading data.
    Returns:
        What was `run`; `validation` and `test` scores, `predictions` and `per_item` on test, `parameters`, `seconds`,
        `memory`, `curve`; or `failed` or `impossible` with the reason.
    """
    run = describe(recipe, trial, content or fingerprints(recipe, trial.task))
    file = folder / trial.task / trial.contender.name / f"{digest(run)}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    result: dict[str, Any]
    try:
        result, lasting = _run(recipe, trial), True
    except NotPossible as error:
        result, lasting = {"impossible": str(error)}, False  # another version of PEFT may know how
    except (RunError, FloatingPointError, DataError) as error:
        result, lasting = {"failed": str(error)}, True
    except torch.OutOfMemoryError:
        result, lasting = {"failed": "out of memory"}, False
    result = {"run": run, "versions": versions(), **result}
    if lasting:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
    return result


def digest(described: Any) -> str:
    """A short name for what JSON can say."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def describe(recipe: Recipe, trial: Trial, content: dict[str, str]) -> dict[str, Any]:
    """All that decides a trial's outcome; files by their content, so that no path of this machine is in it."""
    task = recipe.tasks[trial.task]
    spec = task.model_dump(mode="json", exclude={"adapter", "data"})
    if task.data.sets:
        spec["sets"] = {name: one.model_dump(mode="json", exclude={"file"}) for name, one in task.data.sets.items()}
    return {
        "model": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "dtype": recipe.dtype,
        "attention": recipe.attention,
        "task": spec,
        "content": content,
        "settings": dict(trial.contender.settings),
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "examples": trial.examples,
    }


def fingerprints(recipe: Recipe, name: str) -> dict[str, str]:
    """Short hashes of what a task's splits, the held-out text and a local model's files say."""
    task = build_task(name, recipe.tasks[name])
    texts = {
        split: json.dumps([(e.texts, e.answer, e.label, e.set) for e in task.examples(split)], ensure_ascii=False)
        for split in SPLITS
    }
    if recipe.compare.held_out:
        texts["held_out"] = Path(recipe.compare.held_out).read_text(encoding="utf-8")
    found = {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in texts.items()}
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    files = sorted(f for f in Path(recipe.model).glob("*") if f.suffix in kinds)
    return {**found, "model": _hash_of(tuple((f, f.stat().st_mtime_ns) for f in files))} if files else found


@cache
def _hash_of(files: tuple[tuple[Path, int], ...]) -> str:
    """Of files of some age, names and contents."""
    whole = hashlib.sha256()
    for file, _ in files:
        with file.open("rb") as opened:
            whole.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()} ".encode())
    return whole.hexdigest()[:16]


def _run(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    task = build_task(trial.task, recipe.tasks[trial.task])
    base = Base(recipe.model_copy(update={"seed": trial.seed}))
    model, tokenizer, contender = base.model_for(task), base.tokenizer, trial.contender
    held_out = windows(recipe.compare.held_out, tokenizer) if task.spec.type == "generation" else []
    key = (recipe.model, recipe.dtype, recipe.compare.held_out)
    if held_out and key not in _base_losses:
        _base_losses[key] = window_loss(model, held_out)
    size = sum(p.numel() for p in model.parameters())
    examples = drawn(task.examples("train"), trial)
    some = replace(trial, examples=trial.examples or contender.shots)
    shots = drawn(task.examples("train"), some) if contender.shots else []
    set_seed(trial.seed)
    adapted = contender.build(model, task.spec.task_type, base.heads.get(trial.task, []), trial.seed)
    trained = _train(recipe, trial, task, adapted, tokenizer, examples) if contender.trains else {}

    def score(split: str) -> Evaluation:
        asked = with_shots(task, tokenizer, task.examples(split), shots)
        if shots:
            check_context(model, task, tokenizer, asked, len(shots))
        until = "\n\n" if shots and not is_templated(tokenizer, task.spec.chat) else None
        return evaluate(adapted, tokenizer, task, asked, equal_lengths=contender.adds_tokens, until=until)

    result: dict[str, Any] = {"validation": score("validation").main}
    if trial.test:
        found = score("test")
        result |= {"test": found.scores, "predictions": found.predictions, "per_item": found.per_item}
    return {
        **result,
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "model_parameters": size,
        **trained,
        **({"forgetting": window_loss(adapted, held_out, contender) - _base_losses[key]} if held_out else {}),
    }


def drawn(examples: list[Example], trial: Trial) -> list[Example]:
    """So many examples as the trial asks for, drawn by its seed."""
    if trial.examples is None:
        return examples
    if trial.examples > len(examples):
        raise NotPossible(f"{trial.examples} examples asked for, {len(examples)} there")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(trial.seed)).tolist()
    return [examples[i] for i in order[: trial.examples]]


def with_shots(
    task: Task[Any], tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], shots: Sequence[Example]
) -> list[Example]:
    """The examples with solved ones before each prompt: in the user's turn or, without a chat, as text that goes on."""
    if not shots:
        return list(examples)
    solved = "".join(f"{s.texts[0]}\n{s.answer}\n\n" for s in shots)
    end = "" if is_templated(tokenizer, task.spec.chat) else "\n"
    return [replace(e, texts=(solved + e.texts[0] + end,)) for e in examples]


def check_context(
    model: Any, task: Task[Any], tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], shots: int
) -> None:
    """Raises NotPossible where solved examples make a prompt longer than the model reads."""
    encoded, _ = task.encode(tokenizer, examples, training=False)
    longest = max(len(e.input_ids) for e in encoded) + task.spec.max_new_tokens
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and longest > room:
        raise NotPossible(f"{shots} solved examples make a prompt of {longest} tokens; the model reads {room}")


def _train(
    recipe: Recipe,
    trial: Trial,
    task: Task[Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> dict[str, Any]:
    encoded, _ = task.encode(tokenizer, examples, training=True)
    spec = task.spec.training.model_copy(update={"learning_rate": trial.learning_rate})
    if trial.examples is not None:
        small = {"epochs": None, "max_steps": SMALL_STEPS, "batch_size": min(spec.batch_size, trial.examples)}
        spec = spec.model_copy(update=small)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(int(spec.reuse_memory_gb * 1e9), Path(folder) / "reuse")
        reuse = None
        if trial.contender.is_reft and spec.reuse:
            config = ReftConfig(task_type=task.spec.task_type, **trial.contender.settings)
            found = choose_reuse(model, config, store, spec.gradient_checkpointing)
            reuse = None if isinstance(found, str) else found
        arguments = training_arguments(spec, Path(folder), trial.seed, len(encoded))
        arguments.save_strategy = "no"
        progress = Progress(trial.task)
        trainer = ReftTrainer(
            model,
            arguments,
            encoded,
            reuse,
            supervised=not trial.contender.adds_tokens,
            data_collator=(Counting if trial.contender.is_reft else _WithoutPrompts)(tokenizer, progress),
            callbacks=[Report(progress, lambda progress: None)],
        )
        trainer.remove_callback(PrinterCallback)
        memory = training_memory(trainer, model, encoded, spec.batch_size)
        trainer.train()
        store.close()
    return {
        "seconds": round(progress.seconds, 3),
        "steps": trainer.state.global_step,
        "tokens": progress.tokens,
        "memory": memory,
        "curve": thinned([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]),
    }


class _WithoutPrompts(Counting):
    """Leaves out what only a ReFT model takes."""

    def __call__(self, batch: Sequence[Any]) -> dict[str, Any]:
        return {key: value for key, value in super().__call__(batch).items() if key != "prompt_lengths"}


def training_memory(trainer: ReftTrainer, model: nn.Module, encoded: Sequence[Encoded], batch_size: int) -> int:
    """Bytes that training needs on top of the model: what autograd keeps on the longest batch, gradients and moments.

    Counted rather than measured, so that it is the same on every machine and in every allocator.
    """
    longest = sorted(enumerate(encoded), key=lambda pair: len(pair[1].input_ids))[-batch_size:]
    collate: Any = trainer.data_collator
    batch = trainer._prepare_inputs(collate(longest))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own graph node saved would keep both, and the model, for good

    reuse, trainer.reuse = trainer.reuse, None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(model, batch)
    del loss
    trainer.reuse = reuse
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(kept.values()) + 3 * trained


def thinned(curve: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) at no more than `CURVE` places, each the mean since the last."""
    stride = max(1, -(-len(curve) // CURVE))
    parts = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    return [(min((n + 1) * stride, len(curve)), round(sum(p) / len(p), 5)) for n, p in enumerate(parts)]


def windows(path: str | None, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Stretches of a held-out text, evenly spread over it."""
    if path is None:
        return []
    text = Path(path).read_text(encoding="utf-8")
    width = 16 * HELD_OUT_LENGTH  # characters, more than enough for the tokens
    starts = [i * max(1, len(text) - width) // HELD_OUT_WINDOWS for i in range(HELD_OUT_WINDOWS)]
    parts = [tokenizer(text[s : s + width])["input_ids"][:HELD_OUT_LENGTH] for s in starts]
    return [list(ids) for ids in parts if len(ids) == HELD_OUT_LENGTH]


@torch.no_grad()
def window_loss(model: Any, texts: Sequence[list[int]], contender: Contender | None = None) -> float:
    """The mean loss a token on the second half of each stretch, its first half being the prompt.

    So an adapter that edits prompts edits text as it would in use, and the loss is taken past its edits.
    """
    losses = []
    device = next(model.parameters()).device
    with evaluating(model):
        for at in range(0, len(texts), 16):
            ids = torch.tensor(texts[at : at + 16], device=device)
            labels = ids.clone()
            labels[:, : HELD_OUT_LENGTH // 2] = -100
            extra = {}
            if contender is not None and contender.is_reft:
                extra = {"prompt_lengths": torch.full((len(ids),), HELD_OUT_LENGTH // 2, device=device)}
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            losses += [float(model(**batch, **extra).loss)] * len(ids)
    return sum(losses) / len(losses)
