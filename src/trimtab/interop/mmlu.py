"""MMLU from files, so that lm-evaluation-harness runs it without the Hub.

The harness's own tasks, prompts and scores stay: one YAML file sends them to a folder that `datasets` opens as it opens
a data set of the Hub. Other tasks can be sent to a local copy in the same way.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("dev", "test")
ANSWERS = {"A": 0, "B": 1, "C": 2, "D": 3, "0": 0, "1": 1, "2": 2, "3": 3}


def write_mmlu(data: Path, out: Path) -> None:
    """Write a data set folder, and in it the group `mmlu_local` of lm-eval tasks, from the CSV files of MMLU.

    Args:
        data: holds `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`: question, four choices, and the answer as a
            letter or counted from 0, with or without a line of headings.
        out: the folder to write to, lm-eval's `--include_path`.
    Raises:
        ValueError: no subject is there, or a line is not a question with four choices and an answer.
    """
    subjects = sorted(path.name.removesuffix("_test.csv") for path in (data / "test").glob("*_test.csv"))
    if not subjects:
        raise ValueError(f"{data}: no MMLU there, which has files named test/SUBJECT_test.csv and dev/SUBJECT_dev.csv.")
    for subject in subjects:
        (out / subject).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = read_questions(data / split / f"{subject}_{split}.csv")
            (out / subject / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [
        {"config_name": s, "data_files": [{"split": t, "path": f"{s}/{t}.jsonl"} for t in SPLITS]} for s in subjects
    ]
    (out / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\nMMLU, from {data.resolve()}.\n")
    group = {
        "group": "mmlu_local",
        "task": [f"mmlu_{subject}" for subject in subjects],
        "dataset_path": str(out.resolve()),
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (out / "mmlu.yaml").write_text(yaml.safe_dump(group, sort_keys=False))


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The `question`, four `choices` and `answer` (0 to 3) of every line.

    Raises:
        ValueError: naming the file and the line.
    """
    questions = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[-1:] == ["answer"]:
                continue
            if len(row) != 6 or row[5] not in ANSWERS:
                raise ValueError(f"{path}: question {number}: must be a question, 4 choices and A to D or 0 to 3.")
            questions.append({"question": row[0], "choices": row[1:5], "answer": ANSWERS[row[5]]})
    return questions
