"""Every method of a comparison against every other, two at a time: `python benchmarks/verdict/pairs.py CONFIG`.

For configs whose rows are one method under other seeds, of which no pair should be told apart. Trials are read where
`trimtab compare CONFIG` left them, and what is missing is run. Writes pairs.json beside the command's report.
"""

from __future__ import annotations

from itertools import combinations

from trials import asked_for

from trimtab.runs.folder import write_json
from trimtab.study.report import summarise


def main() -> None:
    """Print the pairs that are told apart, and write all."""
    folder, settings, groups = asked_for(__doc__)
    pairs = []
    for first, second in combinations(groups, 2):
        for name, task in summarise([first, second], settings).tasks.items():
            line = next(one for one in task.methods if one.name == second.way.name)
            found = line.against_reference
            assert found is not None
            pairs.append(
                {
                    "task": name,
                    "methods": [first.way.name, second.way.name],
                    "difference": round(found.difference, 4),
                    "interval": [round(found.low, 4), round(found.high, 4)],
                    "p": found.p,
                    "verdict": found.verdict,
                    "detectable": found.detectable,
                }
            )
    apart = [pair for pair in pairs if pair["verdict"] in ("better", "worse")]
    print(f"{len(apart)} of {len(pairs)} pairs are told apart", *apart, sep="\n")
    rates = {group.way.name: [run.learning_rate for run in group.seeds] for group in groups}
    scores = {group.way.name: group.scores for group in groups}
    write_json(
        folder / "pairs.json", {"told apart": len(apart), "pairs": pairs, "learning rates": rates, "scores": scores}
    )


if __name__ == "__main__":
    main()
