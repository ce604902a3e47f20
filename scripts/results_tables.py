"""Markdown of a report's numbers for docs: `python scripts/results_tables.py runs/paper-mini/results.json`."""

import json
import sys
from pathlib import Path
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def estimate(value: dict[str, Any] | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    digits = (
        1 if scale == 100 else 3 if abs(scale * value["value"]) < 1 else 0 if abs(scale * value["value"]) > 30 else 1
    )
    numbers = [f"{scale * value[key]:.{digits}f}" for key in ("value", "low", "high") if value.get(key) is not None]
    return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "")


def main(file: Path) -> None:
    for panel in json.loads(file.read_text())["panels"]:
        print(f"\n### {panel['title']}\n\n{panel['note']}\n")
        metrics = {key: metric for key, metric in panel["metrics"].items() if key != "seconds"}
        rows = [
            [group["label"], *(estimate(group["metrics"].get(key), metric["scale"]) for key, metric in metrics.items())]
            for group in panel["groups"]
        ]
        print(table(["", *(metric["title"] for metric in metrics.values())], rows))
        judged = [claim for claim in panel["claims"] if claim["effect"]]
        if judged:
            rows = [
                [claim["name"], estimate(claim["effect"]) + " " + claim["unit"], claim["answer"], claim["detail"]]
                for claim in judged
            ]
            print("\n" + table(["claim", "effect", "verdict", "of what"], rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
