"""The training of one adapted model: its trainer, what it reuses and keeps, and what went wrong."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PrinterCallback

from trimtab.errors import RunError
from trimtab.runs.experiment import Trial
from trimtab.runs.kept import store_for
from trimtab.runs.measures import training_memory
from trimtab.runs.models import fitting, is_in
from trimtab.runs.reuse import Reuse
from trimtab.runs.trainer import (
    LOOKS,
    NumberedCollator,
    Progress,
    ReftTrainer,
    Report,
    TrainingSpec,
    Watch,
    training_arguments,
)
from trimtab.runs.ways import Way
from trimtab.tasks.tokens import Encoded

ROOM = 2**20
"""Bytes free on a disk that is not full."""
_memories: dict[Any, int] = {}
TOO_LARGE = (
    "lower training: batch_size: and raise gradient_accumulation: as much, set gradient_checkpointing: true, or lower "
    "max_length:"
)
"""What helps a training that memory does not hold."""


FOUR_BITS = (
    "a base in bitsandbytes' 4 bits is not trained on a CPU: there it passes no gradient back once it has been "
    "evaluated (docs/guides/quantised.md). Take a GPU, 8 bits, or the model in floating point"
)


def check_trainable(model: Any) -> None:
    """Raises RunError where the base's gradients cannot be relied on."""
    if getattr(model, "is_loaded_in_4bit", False) and next(model.parameters()).device.type == "cpu":
        raise RunError(FOUR_BITS)


class Fit:
    """The training of one adapted model.

    Args:
        folder: for checkpoints.
        head: the modules without pretrained weights.
        look: takes the validation score, after the shares `looks` of the steps.
        checkpoints: where the training resumes from, and leaves some for others; None for none.
        measured: count the memory too.
    Raises:
        RunError: the base's gradients cannot be relied on.
    """

    def __init__(
        self,
        trial: Trial,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        encoded: list[Encoded],
        folder: Path,
        progress: Progress,
        *,
        head: Sequence[str] = (),
        watch: Watch = lambda progress: None,
        look: Any = None,
        looks: Sequence[float] = LOOKS,
        checkpoints: Path | None = None,
        measured: bool = False,
    ) -> None:
        spec, way = trial.training, trial.way
        check_trainable(model)
        store = store_for(trial.experiment.source, trial.experiment.training.reuse_memory_gb)
        found = way.reuse(model, store, spec.gradient_checkpointing) if spec.reuse else "reuse: false"
        self._reuse = found if isinstance(found, Reuse) else None
        self._no_reuse = None if isinstance(found, Reuse) else found
        collate = NumberedCollator(tokenizer)
        # What is kept for reuse belongs to an example of its own row.
        collate.packed = trial.experiment.task.generates and self._reuse is None and _packs(spec, model, way)
        arguments = training_arguments(spec, checkpoints or folder, trial.seed, len(encoded))
        if checkpoints is None:
            arguments.save_strategy = "no"
        self.trainer = ReftTrainer(
            model,
            arguments,
            encoded,
            self._reuse,
            supervised=trial.experiment.task.generates and not way.adds_tokens,
            takes_prompts=way.takes_prompts,
            progress=progress,
            head=[name for name, _ in model.named_parameters() if is_in(name, head)],
            head_rate=spec.head_learning_rate,
            data_collator=collate,
            callbacks=[Report(progress, watch, look, self._reuse, looks)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.memory = self._memory(trial, model, encoded) if measured else 0

    def _memory(self, trial: Trial, model: Any, encoded: list[Encoded]) -> int:
        """Of training, counted once for all rates and seeds."""
        experiment, way = trial.experiment, trial.way
        key = (experiment.source, experiment.name, way.name, str(way.settings), len(encoded))
        if key not in _memories:
            with fitting(self._step, TOO_LARGE):
                _memories[key] = training_memory(self.trainer, model, encoded, trial.training.batch_size)
        return _memories[key]

    def run(self, resume_from: str | None = None) -> None:
        """Train, or go on.

        Raises:
            DivergedError: the loss became NaN.
            MemoryFull: a step does not fit.
            RunError: a checkpoint could not be read or written.
        """
        try:
            with fitting(self._step, TOO_LARGE):
                self.trainer.train(resume_from_checkpoint=resume_from)
        except (OSError, EOFError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
            if resume_from and not self.trainer.progress.steps:  # which are known once it was read
                remedy = f"remove it, or start over: --no-resume --task {self.trainer.progress.task}"
                raise RunError(f"{resume_from}: this checkpoint cannot be read; {remedy}") from error
            folder = Path(str(self.trainer.args.output_dir))
            if not _is_of_writing(error, folder):
                raise
            remedy = "make room, and the same command goes on from the last whole one"
            raise RunError(f"{folder}: a checkpoint cannot be written, is the disk full? {remedy}") from error

    @property
    def _step(self) -> str:
        return f"{self.trainer.progress.task}: a step of {self.trainer.args.train_batch_size} rows"

    @property
    def steps(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def losses(self) -> list[float]:
        """Of each step, also of those before the training was resumed."""
        return [log["loss"] for log in self.trainer.state.log_history if "loss" in log]

    @property
    def looks(self) -> list[tuple[int, float]]:
        """Steps after which some of validation was scored, with the scores."""
        return [(int(log["step"]), log["validation"]) for log in self.trainer.state.log_history if "validation" in log]

    @property
    def reuse_summary(self) -> dict[str, Any]:
        refused = self.trainer.reuse_refused or self._no_reuse
        return {"reused": None, "because": refused} if refused or self._reuse is None else self._reuse.summary()

    @property
    def reuse(self) -> Reuse | None:
        """What of the frozen model's work is kept, where that held."""
        return self.trainer.reuse


def _is_of_writing(error: Exception, folder: Path) -> bool:
    """Whether it came of a folder that is gone, a full disk or quota, or a limit on the size of files."""
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return not folder.parent.exists() or shutil.disk_usage(folder.parent).free < ROOM


def _packs(spec: TrainingSpec, model: Any, way: Way) -> bool:
    if not way.takes_prompts:
        return False
    if spec.packing != "auto":
        return spec.packing
    return "flash" in str(model.get_base_model().config._attn_implementation)
