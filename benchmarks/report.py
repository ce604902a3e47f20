"""Time and size of a report over many made-up runs, and the time in which a browser opens it."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from potstill.report.page import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from synthetic_runs import evaluate, write_run  # pyright: ignore[reportMissingImports]

NUM_TOKENS = 60


def samples(seed: int) -> list[dict]:
    """Rollouts of a first and a last step, with a number for every token."""
    numbers = [round(0.01 * ((seed + 7 * i) % 97), 4) for i in range(NUM_TOKENS)]
    names = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
    choices = [[[f"token {k}", 0.5 / (k + 1)] for k in range(5)]] * NUM_TOKENS
    row = {
        "prompt_id": "p",
        "prompt": "12 * 34 =",
        "writers": [["student", NUM_TOKENS]],
        "stop": "end",
        "tokens": [f" {i}" for i in range(NUM_TOKENS)],
        "trained": [True] * NUM_TOKENS,
        "temperature": 1.0,
        "kept": None,
        "student_choices": choices,
        "teacher_choices": choices,
        **dict.fromkeys(names, numbers),
    }
    return [row | {"step": step} for step in (1, 1, 120, 120)]


def make_runs(folder: Path, num_runs: int) -> list[Path]:
    """Finished runs of four seeds a learning rate, with an evaluation and rollouts each."""
    evals = [evaluate(i, accuracy) for i, accuracy in enumerate((0.3, 0.5, 0.8))]
    paths = []
    for i in range(num_runs):
        train = {"seed": i % 4, "lr": 1e-3 + i // 4 * 1e-4}
        path = write_run(folder / f"run-{i}", evals[i % 3], 120, train=train)
        text = "".join(json.dumps(row) + "\n" for row in samples(i))
        (path / "samples.jsonl").write_text(text)
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    num_runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_runs(folder, num_runs)
        started, used = time.perf_counter(), time.process_time()
        page = write_report(paths, folder / "report.html")
        seconds, used = time.perf_counter() - started, time.process_time() - used
        size = page.stat().st_size / 1e6
        print(
            f"{num_runs} runs: made in {seconds:.1f} s ({used:.1f} s of processor), {size:.2f} MB"
        )
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is not None:
            print(f"opened, drawn and closed by a browser in {opened(browser, page):.1f} s")


def opened(browser: str, page: Path) -> float:
    """Seconds in which a browser starts, draws the page and prints what it has become."""
    profile = f"--user-data-dir={page.parent / 'browser'}"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom"]
    started = time.perf_counter()
    subprocess.run([*command, page.as_uri()], capture_output=True, check=True, timeout=300)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
