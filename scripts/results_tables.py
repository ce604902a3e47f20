"""Markdown of a report's numbers for docs: `python scripts/results_tables.py
runs/paper-mini/results.json`."""

import json
import sys
from pathlib import Path
from typing import Any

from potstill.statistics import SEEDS_TO_JUDGE, seeds_in_words


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def estimate(value: dict[str, Any] | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    digits = (
        1
        if scale == 100
        else 3
        if abs(scale * value["value"]) < 1
        else 0
        if abs(scale * value["value"]) > 30
        else 1
    )
    numbers = [
        f"{scale * value[key]:.{digits}f}"
        for key in ("value", "low", "high")
        if value.get(key) is not None
    ]
    return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "")


def label(group: dict[str, Any], trained: set[str]) -> str:
    """A group's name, and how many seeds it has where they are too few for a verdict."""
    num = len(group["paths"]) if group["paths"][0] in trained else SEEDS_TO_JUDGE
    return group["label"] + (f" ({seeds_in_words(num)})" if num < SEEDS_TO_JUDGE else "")


def main(file: Path) -> None:
    for panel in json.loads(file.read_text())["panels"]:
        print(f"\n### {panel['title']}\n\n{panel['note']}\n")
        metrics = {key: metric for key, metric in panel["metrics"].items() if key != "seconds"}
        trained = {run["path"] for run in panel["runs"] if run["recipe"] is not None}
        rows = [
            [
                label(group, trained),
                *(
                    estimate(group["metrics"].get(key), metric["scale"])
                    for key, metric in metrics.items()
                ),
            ]
            for group in panel["groups"]
        ]
        print(table(["", *(metric["title"] for metric in metrics.values())], rows))
        judged = [claim for claim in panel["claims"] if claim["effect"]]
        if judged:
            rows = [
                [
                    claim["name"],
                    estimate(claim["effect"]) + " " + claim["unit"],
                    claim["answer"],
                    claim["detail"],
                ]
                for claim in judged
            ]
            print("\n" + table(["claim", "effect", "verdict", "of what"], rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
