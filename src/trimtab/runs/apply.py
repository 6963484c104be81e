"""A finished run on the rows of a file: what `trimtab predict` runs on.

applied = Applied("runs/mood")
for lines in applied.lines(applied.examples("tickets.csv")): ...     # {"row": 1, "text": ..., "prediction": ...}
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

from peft import PeftModel

from trimtab.adapter.folder import inspect_adapter
from trimtab.adapter.hub import local
from trimtab.adapter.weights import weights_in
from trimtab.errors import DataError, NoField, RunError
from trimtab.runs.experiment import Experiment, digest
from trimtab.runs.folder import RunFolder, digest_of, put, write_text
from trimtab.runs.models import Base, ModelSource, hash_of_model
from trimtab.runs.predict import check_context, predict
from trimtab.runs.trainer import TrainingSpec
from trimtab.runs.ways import AdapterSpec
from trimtab.tasks import Example
from trimtab.tasks.files import Row, locate

Line = dict[str, Any]
CHUNK = 8
"""Batches that are written at a time, and among which rows are put in order of length."""
KINDS = (".csv", ".jsonl")
SKIP = "; or leave out such rows: predict --skip-bad-rows"


class Applied:
    """A run's adapter on its model, which is loaded when the first row is predicted.

    Args:
        folder: of one task, or its name on the Hub.
        model: the base model, where it is not the one that the run names.
        batch_size: rows at a time; the training's `eval_batch_size` by default.
        skip_bad_rows: leave out rows that cannot be used, also where training did not.

    Raises:
        RunError: trimtab left no run there.
        AdapterError: the adapter is not there, or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        batch_size: int | None = None,
        skip_bad_rows: bool = False,
    ) -> None:
        self.folder = RunFolder(local(folder))
        run, task = self.folder.run, self.folder.task
        inspect_adapter(self.folder.path)
        self.experiment = Experiment(
            run["name"],
            ModelSource(model or run["model"], run["dtype"], run["attention"]),
            task.spec,
            AdapterSpec.model_validate(run["task"]["adapter"]),
            TrainingSpec.model_validate(run["task"]["training"]),
            run["seed"],
        )
        self.batch_size = batch_size or self.experiment.training.eval_batch_size
        self.skip = skip_bad_rows or task.spec.data.skip_bad_rows
        self.cut = 0
        """How many texts were longer than training's `max_length`, and cut to it."""
        self.left_out: list[str] = []
        """Why rows could not be used."""
        self.blank = 0
        """How many of the predictions are empty; of `lines`, those given so far."""

    @cached_property
    def _base(self) -> Base:
        return Base(self.experiment.source)

    @cached_property
    def _model(self) -> PeftModel:
        plain = self._base.load(self.experiment.task.head, self.experiment.seed).model
        return PeftModel.from_pretrained(plain, str(self.folder.path)).eval()

    def examples(self, file: str | Path) -> dict[int, Example]:
        """The file's rows by number, from 1, as the task asks them, each with what the file holds of it.

        They need no answers.

        Where training left out rows that cannot be used (`skip_bad_rows`), or this is told to, they are left out here
        too (`left_out`).

        Raises:
            DataError: a row cannot be used.
        """
        task, path, found = self.experiment.task, locate(file), {}
        for number, row in enumerate(self._rows(path), 1):
            where = f"{path}, row {number}"
            try:
                found[number] = replace(task.question(task.prepared(row, where), where), row=row)
            except DataError as error:
                lacking = self._lacking(row)
                remedy = f" (rename columns, so that {self.folder.path} finds {', '.join(lacking)})" if lacking else ""
                if not self.skip:
                    raise DataError(f"{error}{remedy}{'' if lacking else SKIP}") from None
                self.left_out.append(f"{error}{remedy}")
        if not found:
            raise DataError(self.left_out[0])
        return found

    def _rows(self, path: Path) -> list[Row]:
        """Of the file. Raises DataError, saying so where broken lines could be left out."""
        task = self.experiment.task
        try:
            return task.rows(path, self.skip)
        except DataError as error:
            with suppress(DataError):
                task.rows(path, True)
                error = DataError(f"{error}{SKIP}")
            raise error from None

    def _lacking(self, row: Row) -> list[str]:
        """The fields that a question is made of and a row has not."""
        task = self.experiment.task
        try:
            task.question(task.prepared(row, ""), "")
        except NoField as error:
            return [error.name, *self._lacking({**row, error.name: "some text"})]
        except DataError:
            pass
        return []

    def lines(self, examples: Mapping[int, Example], start: int = 0) -> Iterator[list[Line]]:
        """Predictions, each behind its row's number and the file's own columns, some rows at a time.

        A column of the file that is called as one of a prediction's is `NAME (given)`.

        Args:
            start: how many rows to pass over.

        Raises:
            DataError: before the first, where a prompt is longer than the model reads.
        """
        experiment, task = self.experiment, self.experiment.task
        numbers = list(examples)
        columns = list(dict.fromkeys(name for example in examples.values() for name in example.row))
        encoded, self.cut = experiment.encode(self._base.tokenizer, list(examples.values()), training=False)
        decoding, size = task.decoding(), self.batch_size
        check_context(self._model, encoded, decoding.get("max_new_tokens", 0), lambda i: f"row {numbers[i]}")
        for at in range(start, len(encoded), size * CHUNK):
            some = encoded[at : at + size * CHUNK]
            told = task.told(predict(self._model, self._base.tokenizer, some, size, **decoding))
            self.blank += sum(line["prediction"] == "" for line in told)
            rows = [(number, examples[number].row) for number in numbers[at : at + len(told)]]
            yield [_line(number, row, columns, line) for (number, row), line in zip(rows, told, strict=True)]

    def remarks(self) -> list[str]:
        """What whoever reads the predictions should know."""
        said = []
        if self.left_out:
            said.append(f"{len(self.left_out)} rows cannot be used and are left out, first {self.left_out[0]}")
        if self.cut:
            length = self.experiment.training.max_length
            said.append(f"{self.cut} texts are longer than {length} tokens and were cut to that, as in training.")
        if self.blank:
            said.append(f"{self.blank} predictions are empty: {self.experiment.task.blank}.")
        return said

    def write(self, file: str | Path, output: Path, watch: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Predict a file's rows into `output`, a .csv or .jsonl file; an interrupted call is gone on with.

        Until all are there, the lines stand in a file beside it, named by what decides them.

        Args:
            watch: told how many rows are done, of how many.

        Returns:
            How many rows were done by an earlier call.

        Raises:
            DataError: the file cannot be used, or the output is of another kind.
            RunError: another process writes it.
        """
        if output.suffix not in KINDS:
            raise DataError(f"{output}: predictions are written as {' or '.join(KINDS)}")
        examples = self.examples(file)
        source = self.experiment.source
        asked = {
            "adapter": digest_of(weights_in(self.folder.path)),
            "rows": digest_of(locate(file)),
            "model": source.name,
            "weights": hash_of_model(source),
            "run": self.folder.run,
        }
        part = output.with_name(f"{output.name}.{digest(asked)}.part")
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+", encoding="utf-8") as opened:
            _lock(opened, part)
            before = done = _whole(opened)
            for lines in self.lines(examples, before) if before < len(examples) else ():
                opened.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
                opened.flush()
                done += len(lines)
                watch(done, len(examples))
            opened.seek(0)
            self.blank = sum(json.loads(line)["prediction"] == "" for line in opened)
            _finish(part, output)
        return before


def _line(number: int, row: Row, columns: Sequence[str], told: Line) -> Line:
    own = {"row": number, **told}
    given = {f"{name} (given)" if name in own else name: row.get(name) for name in columns}
    return {"row": number, **given, **told}


def _lock(opened: IO[str], part: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(f"{part}: another process writes it; wait for it, or give another output") from None


def _whole(opened: IO[str]) -> int:
    """How many lines were written to their end; what an interrupted write left after them is cut off."""
    opened.seek(0)
    count = end = 0
    while opened.readline().endswith("\n"):
        count, end = count + 1, opened.tell()
    opened.truncate(end)
    return count


def _finish(part: Path, output: Path) -> None:
    """Give the lines the output's name, as it wants them."""
    if output.suffix == ".jsonl":
        put(part, output)
        return
    with part.open(encoding="utf-8") as lines:
        write_text(output, as_csv(map(json.loads, lines)))
    part.unlink()


def as_csv(lines: Iterator[Line], header: bool = True) -> str:
    """Lines of the same fields as CSV, what is no text or number in them as JSON."""
    out = io.StringIO(newline="")
    first = next(lines)
    writer = csv.DictWriter(out, list(first), lineterminator="\n")
    if header:
        writer.writeheader()
    for line in chain([first], lines):
        writer.writerow({name: _cell(value) for name, value in line.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
