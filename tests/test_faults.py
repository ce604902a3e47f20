"""Damaged files, forged manifests, full disks, missing rights: said in one line, or what a command
does is right.

Each fault is done to a copy of a folder that commands made. A command then either exits with 2 and
one line, or leaves what it leaves in a folder without the fault. It never ends in a traceback, and
nothing outside the folder is touched.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from commands import OPD, SFT, cache, command, differences, train
from forked import Forks, Trouble
from safetensors.torch import load_file, save_file

from potstill.models.language_model import ASSETS

Harm = Callable[[Path], None]
NO_TROUBLE = Trouble()
NO_HARM: Harm = lambda folder: None  # noqa: E731

FOUR_STEPS = {"train.steps": "4", "evaluation.temperatures": "[1.0]"}
OWN = {"student.model": "student", "teacher.model": "teacher", "data.source": "prompts.jsonl"}
OWN_RUN = [word for word in train(OPD, FOUR_STEPS, OWN) if word]
SELF = OWN | {
    "teacher.model": "self",
    "teacher.refresh-steps": "3",
    "teacher.prompt-column": "hint",
}
SELF_RUN = train(OPD, FOUR_STEPS, SELF, {"rollouts.reuse": "4"})
CACHED_RUN = train(SFT, FOUR_STEPS, {"teacher.cache": "cache", "teacher.model": "teacher"})
BUILD = cache({"teacher.model": "teacher"})
JUDGED = {
    "num-problems": "3",
    "num-responses": "3",
    "max-tokens": "8",
    "batch-size": "4",
    "temperatures": "1.0",
}
EVALUATE = command("evaluate run", JUDGED)
SCORE = command("evaluate potstill:base --out evals.json --responses responses", JUDGED)
REPORT = ["report", "run", "--out", "report.html"]


@dataclass(frozen=True)
class Fault:
    """A fault in a folder, and what a command makes of it.

    refused: one line on standard error that `says` (a pattern), exit code 2. right: what the
    command leaves without the fault. runs: exit code 0, for what is not compared. either: refused
    or right. With `again` the command is run once more without trouble, and is right then.
    """

    name: str
    base: str
    argv: list[str]
    expect: Literal["refused", "right", "runs", "either"]
    harm: Harm = NO_HARM
    says: str = ""
    trouble: Trouble = NO_TROUBLE
    again: bool = False
    # Lines of progress may come before the refusal.
    is_late: bool = False
    is_quick: bool = False


# --- what is done to files ---


def found(folder: Path, name: str) -> Path:
    """The first file of a pattern."""
    return folder if name == "." else sorted(folder.glob(name))[0]


def flipped(name: str, place: float) -> Harm:
    """One bit of the byte at this place is the other; a share of the length below 1, a place from
    the end below 0."""

    def harm(folder: Path) -> None:
        path = found(folder, name)
        data = bytearray(path.read_bytes())
        data[int(place * len(data)) if 0 < place < 1 else int(place)] ^= 1
        path.write_bytes(data)

    return harm


def written(name: str, data: bytes) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return harm


def changed(name: str, change: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path) -> None:
        path = found(folder, name)
        path.write_bytes(change(path.read_bytes()))

    return harm


def gone(name: str) -> Harm:
    def harm(folder: Path) -> None:
        path = found(folder, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def as_folder(name: str) -> Harm:
    def harm(folder: Path) -> None:
        path = found(folder, name)
        path.unlink()
        path.mkdir()

    return harm


def as_file(name: str) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(b"a file")

    return harm


def swapped(name: str, other: str) -> Harm:
    def harm(folder: Path) -> None:
        a, b = found(folder, name), found(folder, other)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)

    return harm


def mode(name: str, value: int) -> Harm:
    return lambda folder: found(folder, name).chmod(value)


def lines(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Harm:
    """The lines of a file, each with its end, as another list."""
    return changed(name, lambda data: b"".join(change(data.splitlines(keepends=True))))


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Harm:
    def harm(folder: Path) -> None:
        tensors = load_file(found(folder, name))
        change(tensors)
        save_file(tensors, found(folder, name), metadata={"format": "pt"})

    return harm


def filled(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][3, 0] = value

    return change


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name.replace("q_proj", "q_pr0j")] = tensors.pop(name)


def forged(change: Callable[[dict[str, Any]], None]) -> Harm:
    """A manifest that says something else, with the checksum that belongs to it."""

    def harm(folder: Path) -> None:
        path = folder / "cache" / "manifest.json"
        data = json.loads(path.read_text())
        del data["checksum"]
        change(data)
        digest = hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]
        path.write_text(json.dumps({"checksum": digest, **data}))
        (folder / "victim.safetensors").write_text("years of work")

    return harm


def first_shard(**fields: Any) -> Harm:
    return forged(lambda data: data["shards"][0].update(fields))


def settings(**fields: Any) -> Harm:
    return forged(lambda data: data["settings"].update(fields))


def both(*harms: Harm) -> Harm:
    def harm(folder: Path) -> None:
        for each in harms:
            each(folder)

    return harm


def linked_shard(folder: Path) -> None:
    """A shard that is a link to a file elsewhere."""
    shard = found(folder, "cache/shards/*.safetensors")
    shard.rename(folder / "victim.safetensors")
    shard.symlink_to(folder / "victim.safetensors")


def damaged(
    name: str, kinds: str = "first byte, header, middle, last byte, cut, empty, missing, a folder"
) -> dict[str, Harm]:
    """Ways in which one file can be damaged."""
    known = {
        "first byte": flipped(name, 0),
        "header": flipped(name, 40),
        "middle": flipped(name, 0.5),
        "last byte": flipped(name, -1),
        "cut": changed(name, lambda data: data[: len(data) // 2]),
        "empty": changed(name, lambda data: b""),
        "missing": gone(name),
        "a folder": as_folder(name),
    }
    return {kind: known[kind] for kind in kinds.split(", ")}


def garbled(name: str) -> dict[str, Harm]:
    """Ways in which a file of text can hold none."""
    return {
        "garbage": lines(name, lambda rows: [b"%%%\n", *rows[1:]]),
        "NUL": lines(name, lambda rows: [b"\0" * 64 + b"\n", *rows[1:]]),
        "Latin-1": lines(
            name,
            lambda rows: ['{"step": 1, "text": "Gr\u00fc\u00dfe"}\n'.encode("latin-1"), *rows[1:]],
        ),
        "a list": lines(name, lambda rows: [b"[1]\n", *rows[1:]]),
        "no step": lines(name, lambda rows: [b'{"loss": 1}\n', *rows[1:]]),
        "a step in words": lines(name, lambda rows: [b'{"step": "one"}\n', *rows[1:]]),
        "nested": lines(name, lambda rows: [b"[" * 100_000 + b"\n", *rows[1:]]),
        "a folder": as_folder(name),
    }


# --- the table ---


def checkpoints() -> list[Fault]:
    step, rows = "run/checkpoint/step-000002", []
    for file in ("model.safetensors", "optimizer.safetensors", "state.json", "teacher.safetensors"):
        base, argv = ("self", SELF_RUN) if file == "teacher.safetensors" else ("half", OWN_RUN)
        for kind, harm in damaged(f"{step}/{file}").items():
            quick = base == "half" and kind in ("header", "last byte", "missing")
            rows.append(
                Fault(
                    f"{file}: {kind}",
                    base,
                    argv,
                    "refused",
                    harm,
                    says="step-000002",
                    is_quick=quick,
                )
            )
    model, other = f"{step}/model.safetensors", f"{step}/optimizer.safetensors"
    refused: dict[str, Harm] = {
        "two files swapped": swapped(model, other),
        "weights of the teacher": swapped(model, f"{step}/teacher.safetensors"),
        "no files": lambda folder: [path.unlink() for path in (folder / step).iterdir()] and None,
        "a tensor renamed": weights(model, renamed),
        "a NaN": weights(
            model,
            lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")) and None,
        ),
    }
    rows += [
        Fault(name, "self", SELF_RUN, "refused", harm, says="checkpoint")
        for name, harm in refused.items()
    ]
    late: dict[str, Harm] = {
        "a file in its place": as_file(step),
        "a file in place of all": as_file("run/checkpoint"),
    }
    rows += [
        Fault(name, "self", SELF_RUN, "refused", harm, says="checkpoint", is_late=True)
        for name, harm in late.items()
    ]
    right: dict[str, Harm] = {
        "a stray file": written("run/checkpoint/stray.txt", b"mine"),
        "a hidden file": written("run/checkpoint/.stray", b"mine"),
        "a copy of one": lambda folder: (
            shutil.copytree(folder / step, folder / "run/checkpoint/stray-copy") and None
        ),
        "a link": lambda folder: (folder / "run/checkpoint/stray-link").symlink_to(
            folder / "nowhere"
        ),
        "a half written one": lambda folder: (
            folder / "run/checkpoint/unfinished-step-000099"
        ).mkdir(),
        "none": gone("run/checkpoint"),
        "an older one": lambda folder: (
            shutil.copytree(folder / step, folder / "run/checkpoint/step-000001") and None
        ),
    }
    return rows + [
        Fault(n, "half", OWN_RUN, "right", harm, is_quick=n == "a stray file")
        for n, harm in right.items()
    ]


def run_logs() -> list[Fault]:
    rows = []
    for file in ("metrics.jsonl", "samples.jsonl"):
        name = f"run/{file}"
        for kind, harm in garbled(name).items():
            quick = (file, kind) in (("metrics.jsonl", "garbage"), ("samples.jsonl", "Latin-1"))
            rows.append(
                Fault(
                    f"{file}: {kind}", "half", OWN_RUN, "refused", harm, says=file, is_quick=quick
                )
            )
        lost: dict[str, Harm] = {
            "missing": gone(name),
            "empty": changed(name, lambda data: b""),
            "without its first row": lines(name, lambda rows: rows[1:]),
            "a row twice": lines(name, lambda rows: [rows[0], *rows]),
        }
        for kind, harm in lost.items():
            quick = (file, kind) == ("metrics.jsonl", "without its first row")
            rows.append(
                Fault(
                    f"{file}: {kind}", "half", OWN_RUN, "refused", harm, says=file, is_quick=quick
                )
            )
        whole: dict[str, Harm] = {
            "a torn line": changed(name, lambda data: data + b'{"step": 3, "lo'),
            "torn in a letter": changed(
                name, lambda data: data + '{"step": 3, "text": "Gr\u00fc'.encode()[:-1]
            ),
            "zeros at the end": changed(name, lambda data: data + b"\0" * 512),
            "60 MB more": changed(
                name, lambda data: data + b'{"step": 99, "x": "' + b"a" * 60_000_000 + b'"}\n'
            ),
        }
        rows += [
            Fault(f"{file}: {kind}", "half", OWN_RUN, "right", harm) for kind, harm in whole.items()
        ]
    return rows


def run_files() -> list[Fault]:
    environment, recipe = "run/environment.json", "run/recipe.toml"
    refused: dict[str, Harm] = {
        f"environment.json: {kind}": harm for kind, harm in garbled(environment).items()
    }
    refused |= {
        f"environment.json: {k}": harm for k, harm in damaged(environment, "cut, empty").items()
    }
    refused |= {f"recipe.toml: {kind}": harm for kind, harm in garbled(recipe).items()}
    refused |= {
        f"recipe.toml: {k}": harm
        for k, harm in damaged(recipe, "first byte, cut, empty, missing").items()
    }
    refused |= {
        "the lock is a folder": both(
            gone("run/.lock"), lambda folder: (folder / "run/.lock").mkdir()
        ),
        "the folder is a file": as_file("run"),
    }
    quick = ("environment.json: cut", "recipe.toml: Latin-1", "the folder is a file")
    rows = [
        Fault(name, "half", OWN_RUN, "refused", harm, is_quick=name in quick)
        for name, harm in refused.items()
    ]
    late: dict[str, Harm] = {
        "model is a file": as_file("run/model"),
        "responses is a file": as_file("run/responses"),
        "DONE is a folder": lambda folder: (folder / "run/DONE").mkdir(),
    }
    rows += [
        Fault(name, "half", OWN_RUN, "refused", harm, is_late=True) for name, harm in late.items()
    ]

    def moved(folder: Path) -> None:
        (folder / "run").rename(folder / "elsewhere")
        (folder / "run").symlink_to("elsewhere")

    right: dict[str, Harm] = {
        "nothing": NO_HARM,
        "no environment.json": gone(environment),
        "a lock left over": written("run/.lock", b""),
        "DONE of another recipe": written("run/DONE", b"0123456789abcdef\n"),
        "DONE is empty": written("run/DONE", b""),
        "DONE is binary": written("run/DONE", b"\xff\xfe\0\0"),
        "the folder is a link": moved,
        "half of a model folder": written("run/model/config.json", b"{"),
    }
    return rows + [Fault(name, "half", OWN_RUN, "right", harm) for name, harm in right.items()]


def finished_models() -> list[Fault]:
    rows = []
    for argv, says in ((OWN_RUN, "trains"), (EVALUATE, "evaluates")):
        harms = {
            f"model.safetensors: {kind}": harm
            for kind, harm in damaged(
                "run/model/model.safetensors", "first byte, header, cut, empty, missing, a folder"
            ).items()
        }
        for file in ("config.json", "tokenizer.json"):
            kinds = damaged(f"run/model/{file}", "first byte, cut, empty, missing, a folder")
            harms |= {f"{file}: {kind}": harm for kind, harm in kinds.items()}
        harms["config.json: a list"] = written("run/model/config.json", b"[]")
        harms["config.json: other sizes"] = changed(
            "run/model/config.json",
            lambda data: data.replace(b'"hidden_size": ', b'"hidden_size": 1'),
        )
        harms["generation_config.json: cut"] = written("run/model/generation_config.json", b'{"eos')
        harms["a NaN"] = weights("run/model/model.safetensors", filled(float("nan")))
        quick = ("model.safetensors: cut", "config.json: a list")
        rows += [
            Fault(
                f"{says} with model: {name}",
                "done",
                argv,
                "refused",
                harm,
                is_quick=name in quick and says != "trains",
            )
            for name, harm in harms.items()
        ]
    return rows


def evaluations() -> list[Fault]:
    evals, responses = "run/evals.jsonl", "responses/*.jsonl"
    rows = [
        Fault(
            "evals.jsonl: a torn line",
            "done",
            EVALUATE,
            "right",
            changed(evals, lambda data: data + b'{"st'),
            is_quick=True,
        )
    ]
    for kind, harm in garbled(evals).items():
        rows.append(Fault(f"evals.jsonl: {kind}", "done", EVALUATE, "either", harm))
    for kind, harm in {
        **garbled("run/metrics.jsonl"),
        **damaged("run/metrics.jsonl", "empty, missing"),
    }.items():
        rows.append(
            Fault(f"evaluates with metrics.jsonl: {kind}", "done", EVALUATE, "either", harm)
        )
    wrong: dict[str, Harm] = {
        "garbage": lines(responses, lambda rows: [b"%%%\n", *rows[1:]]),
        "Latin-1": lines(
            responses, lambda rows: ["Gr\u00fc\u00dfe\n".encode("latin-1"), *rows[1:]]
        ),
        "a list": lines(responses, lambda rows: [b"[1]\n", *rows[1:]]),
        "the first batch twice": lines(responses, lambda rows: rows[:4] + rows),
        "a row twice": lines(responses, lambda rows: [rows[0], *rows]),
        "two rows swapped": lines(responses, lambda rows: [rows[1], rows[0], *rows[2:]]),
        "a row missing": lines(responses, lambda rows: rows[1:]),
        "another problem": lines(
            responses, lambda rows: [rows[0].replace(b'"problem": "', b'"problem": "x'), *rows[1:]]
        ),
        "no score": lines(
            responses, lambda rows: [rows[0].replace(b'"score"', b'"scor"'), *rows[1:]]
        ),
        "a score in words": lines(
            responses,
            lambda rows: [re.sub(rb'"score": [\d.]+', b'"score": "x"', rows[0]), *rows[1:]],
        ),
        "a score above 1": lines(
            responses, lambda rows: [re.sub(rb'"score": [\d.]+', b'"score": 7', rows[0]), *rows[1:]]
        ),
        "no rows but many": lines(responses, lambda rows: rows * 9),
        "a folder": as_folder(responses),
    }
    quick = ("the first batch twice", "two rows swapped")
    rows += [
        Fault(f"responses: {kind}", "scored", SCORE, "either", harm, is_quick=kind in quick)
        for kind, harm in wrong.items()
    ]
    rows.append(
        Fault(
            "responses: a torn line",
            "scored",
            SCORE,
            "right",
            changed(responses, lambda d: d + b'{"pro'),
        )
    )
    rows.append(
        Fault(
            "responses: a file in place of the folder",
            "scored",
            SCORE,
            "refused",
            as_file("responses"),
        )
    )
    rows.append(
        Fault(
            "--out is a folder",
            "scored",
            SCORE,
            "refused",
            lambda f: (f / "evals.json").mkdir(),
            is_late=True,
        )
    )
    return rows


def reports() -> list[Fault]:
    rows = []
    for file in ("metrics.jsonl", "samples.jsonl", "evals.jsonl", "recipe.toml", "DONE"):
        for kind, harm in {
            **garbled(f"run/{file}"),
            **damaged(f"run/{file}", "cut, empty, missing"),
        }.items():
            needed = file == "metrics.jsonl" and kind in (
                "garbage",
                "no step",
                "Latin-1",
                "a list",
                "NUL",
                "a folder",
            )
            quick = (file, kind) in (("metrics.jsonl", "garbage"), ("metrics.jsonl", "no step"))
            expect = "refused" if needed else "either"
            rows.append(
                Fault(f"report with {file}: {kind}", "done", REPORT, expect, harm, is_quick=quick)
            )
    inputs = {
        "garbage": b"%%%",
        "empty": b"",
        "a table": b"{}",
        "no rows": b"[]",
        "numbers": b"[1, 2]",
        "Latin-1": b'["\xfc"]',
        "rows of nothing": b"[{}]",
        "NUL": b"\0" * 99,
        "cut": b'[{"model": "x", "temp',
        "nested": b"[" * 100_000,
    }
    for kind, data in inputs.items():
        argv = ["report", "evals.json", "--out", "report.html"]
        rows.append(
            Fault(
                f"report of a file: {kind}", "scored", argv, "refused", written("evals.json", data)
            )
        )
    targets: dict[str, Harm] = {
        "report.html is a folder": lambda folder: (folder / "report.html").mkdir(),
        "results.json is mine": written("results.json", b'{"mine": 1}'),
        "results.json is a folder": lambda folder: (folder / "results.json").mkdir(),
    }
    return rows + [Fault(name, "done", REPORT, "refused", harm) for name, harm in targets.items()]


STUDY = """
out = "study"
recipe = "demo"
[fields]
train.steps = 2
train.warmup_steps = 0
[[panels]]
title = "Natural"
[[panels.groups]]
axes.method = ["sft"]
"""


def studies() -> list[Fault]:
    rows = []
    run = {"folder": "runs/a", "name": "SFT", "state": "done"}
    panel = {"title": "Natural", "note": "", "is_sweep": False, "runs": [run]}
    plans: dict[str, bytes] = {
        "garbage": b"%%%",
        "empty": b"",
        "a list": b"[]",
        "no panels": b"{}",
        "panels in words": b'{"panels": "x"}',
        "a panel of nothing": b'{"panels": [{}]}',
        "Latin-1": b'{"panels": "\xfc"}',
        "NUL": b"\0" * 99,
        "cut": json.dumps({"panels": [panel]}).encode()[:-9],
        "a run without a folder": json.dumps(
            {"panels": [panel | {"runs": [{"name": "a", "state": "done"}]}]}
        ).encode(),
        "a state that is a number": json.dumps(
            {"panels": [panel | {"runs": [run | {"state": 7}]}]}
        ).encode(),
    }
    commands = {
        "report": ["report", "study", "--out", "report.html"],
        "study": ["study", "study.toml", "--no-report"],
    }
    for kind, data in plans.items():
        for name, argv in commands.items():
            harm = both(written("study/plan.json", data), written("study.toml", STUDY.encode()))
            rows.append(
                Fault(
                    f"{name} with plan.json: {kind}",
                    "empty",
                    argv,
                    "refused",
                    harm,
                    says="plan.json",
                    is_quick=kind == "cut",
                )
            )
    return rows


def caches() -> list[Fault]:
    rows, shard = [], "cache/shards/*.safetensors"
    for file in (
        "cache/manifest.json",
        "cache/head.safetensors",
        shard,
        "cache/tokenizer/tokenizer.json",
    ):
        for kind, harm in damaged(file).items():
            # A shard's rollouts are compared with their checksums when they are read.
            late = file == shard and kind in ("middle", "last byte")
            quick = file != "cache/head.safetensors" and kind in ("middle", "missing")
            rows.append(
                Fault(
                    f"{file}: {kind}",
                    "cache",
                    CACHED_RUN,
                    "refused",
                    harm,
                    is_late=late,
                    is_quick=quick,
                )
            )
    for kind, harm in damaged("cache/tokenizer/tokenizer_config.json").items():
        rows.append(Fault(f"tokenizer_config.json: {kind}", "cache", CACHED_RUN, "either", harm))

    def rotated(folder: Path) -> None:
        a, b = sorted((folder / "cache/shards").iterdir())[:2]
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)

    more: dict[str, Harm] = {
        "two shards swapped": rotated,
        "no shards": gone("cache/shards"),
        "no tokenizer": gone("cache/tokenizer"),
    }
    rows += [Fault(name, "cache", CACHED_RUN, "refused", harm) for name, harm in more.items()]
    verify, info = ["cache", "verify", "cache"], ["cache", "info", "cache"]
    for kind, harm in damaged(shard).items():
        rows.append(
            Fault(f"verifies a shard: {kind}", "cache", verify, "refused", harm, is_late=True)
        )
        # A stored rollout is compared with its checksum when it is read.
        expect = "runs" if kind == "middle" else "either"
        rows.append(Fault(f"builds on a shard: {kind}", "cache", BUILD, expect, harm, is_late=True))
    for kind, harm in damaged("cache/manifest.json").items():
        for name, argv in (("info", info), ("verify", verify), ("build", BUILD)):
            expect = "either" if (name, kind) == ("build", "missing") else "refused"
            rows.append(
                Fault(
                    f"{name} with manifest.json: {kind}", "cache", argv, expect, harm, is_late=True
                )
            )
    strays: dict[str, Harm] = {
        "a stray file": written("cache/stray.txt", b"mine"),
        "a hidden file": written("cache/.stray", b"mine"),
        "a shard that is not listed": written("cache/shards/0123456789abcdef.safetensors", b"half"),
        "half of a manifest": written("cache/.manifest.json.unfinished", b"{"),
    }
    rows += [
        Fault(f"builds beside {name}", "half cache", BUILD, "right", harm)
        for name, harm in strays.items()
    ]
    begun = Fault(
        "builds after a kill at once",
        "half cache",
        BUILD,
        "right",
        both(gone("cache"), lambda folder: (folder / "cache/shards").mkdir(parents=True)),
    )
    return [*rows, begun]


def forgeries() -> list[Fault]:
    drop = ["cache", "verify", "cache", "--drop-broken"]
    places = {
        "a file above": "../victim.safetensors",
        "a file above by shards": "shards/../../victim.safetensors",
        "the tokenizer": "tokenizer/tokenizer.json",
        "the manifest": "manifest.json",
        "a folder": "shards",
        "nothing": "",
        "another name": "shards/victim.safetensors",
        "a folder below": "shards/x/0123456789abcdef.safetensors",
        "capitals": "shards/0123456789ABCDEF.safetensors",
        "a number": 7,
        "a NUL": "shards/\0",
        "null": None,
        "a line more": "shards/0123456789abcdef.safetensors\n",
    }
    harms: dict[str, Harm] = {
        f"a shard is {name}": first_shard(file=file) for name, file in places.items()
    }

    def absolute(folder: Path) -> None:
        first_shard(file=str(folder / "victim.safetensors"))(folder)

    harms |= {"a shard is an absolute path": absolute, "a shard is a link": linked_shard}
    rows = []
    for name, harm in harms.items():
        for argv in (drop, CACHED_RUN, BUILD):
            expect = "either" if name == "a shard is a link" and argv is not drop else "refused"
            quick = argv is drop and name in (
                "a shard is a file above",
                "a shard is an absolute path",
                "a shard is a link",
            )
            rows.append(
                Fault(
                    f"{argv[0]} {argv[1]}: {name}",
                    "cache",
                    argv,
                    expect,
                    harm,
                    is_late=True,
                    is_quick=quick,
                )
            )
    values: dict[str, Harm] = {
        "shards are a table": forged(lambda data: data.update(shards={})),
        "a shard is a list": forged(lambda data: data.update(shards=[[]])),
        "a shard twice": forged(lambda data: data["shards"].append(data["shards"][0])),
        "a shard without a size": forged(lambda data: data["shards"][0].pop("num_bytes")),
        "a shard with more": first_shard(more=1),
        "a size in words": first_shard(num_bytes="many"),
        "a negative number of rollouts": first_shard(num_rollouts=-1),
        "another number of rollouts": first_shard(num_rollouts=400),
        "another number of tokens": first_shard(num_tokens=3),
        "hidden size -1": forged(lambda data: data.update(hidden_size=-1)),
        "another hidden size": forged(lambda data: data.update(hidden_size=7)),
        "head scale NaN": forged(lambda data: data.update(head_scale=float("nan"))),
        "head scale 0": forged(lambda data: data.update(head_scale=0)),
        "head softcap in words": forged(lambda data: data.update(head_softcap="x")),
        "vocabulary of 1": forged(lambda data: data.update(teacher_vocab_size=1)),
        "no settings": forged(lambda data: data.update(settings=None)),
        "no teacher": forged(lambda data: data.update(teacher=None)),
        "more than is known": forged(lambda data: data.update(more=1)),
        "unknown payload": settings(payload="x"),
        "unknown dtype": settings(dtype="x"),
        "another payload": settings(payload="topk"),
        "no window": settings(window=None),
        "end ids in words": settings(end_ids="x"),
        "end ids beyond the vocabulary": forged(lambda data: data.update(teacher_end_ids=[999])),
        "format 2": forged(lambda data: data.update(format=2)),
    }
    for name, harm in values.items():
        rows.append(Fault(f"forged: {name}", "cache", CACHED_RUN, "either", harm, is_late=True))
        rows.append(
            Fault(
                f"verify forged: {name}",
                "cache",
                ["cache", "verify", "cache"],
                "either",
                harm,
                is_late=True,
            )
        )
    return rows


def troubles() -> list[Fault]:
    """The disk is full, or files may not be written: from one file on nothing can be written."""
    rows = []
    places = (
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "unfinished-step",
        ".model.unfinished",
        "responses",
        "evals.jsonl",
        "DONE",
    )
    for where in places:
        errors = (
            ("ENOSPC", "EACCES") if where in ("metrics.jsonl", ".model.unfinished") else ("ENOSPC",)
        )
        for error in errors:
            rows.append(
                Fault(
                    f"{error} at {where}",
                    "half",
                    OWN_RUN,
                    "refused",
                    says="no space|permission",
                    is_late=True,
                    again=True,
                    trouble=Trouble(event=1, where=where, error=error),
                    is_quick=where in ("environment.json",),
                )
            )
    starts = {
        "recipe.toml": "EROFS",
        "environment.json": "EDQUOT",
        "metrics.jsonl": "EIO",
        ".lock": "EROFS",
    }
    for where, error in starts.items():
        trouble = Trouble(event=1, where=where, error=error)
        rows.append(
            Fault(
                f"{error} at {where} of a new run",
                "own",
                OWN_RUN,
                "refused",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
    for where in ("tokenizer", "head.safetensors", "manifest.json", "shards", ".lock"):
        trouble = Trouble(event=1, where=where, error="ENOSPC")
        rows.append(
            Fault(
                f"ENOSPC at {where} of a new cache",
                "own",
                BUILD,
                "refused",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
    for where in ("responses", "evals.json"):
        trouble = Trouble(event=1, where=where, error="ENOSPC")
        rows.append(
            Fault(
                f"ENOSPC at {where}",
                "empty",
                SCORE,
                "refused",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
    for where in ("report.html", "results.json"):
        trouble = Trouble(event=1, where=where, error="EROFS")
        rows.append(
            Fault(f"EROFS at {where}", "done", REPORT, "refused", trouble=trouble, is_late=True)
        )
    for size in (0, 100, 2_000, 30_000, 200_000, 500_000):
        trouble = Trouble(limits={"RLIMIT_FSIZE": size})
        rows.append(
            Fault(
                f"resumes with files of {size} bytes at most",
                "half",
                OWN_RUN,
                "refused",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
        if size < 30_000:
            rows.append(
                Fault(
                    f"builds with files of {size} bytes at most",
                    "own",
                    BUILD,
                    "refused",
                    trouble=trouble,
                    is_late=True,
                    again=True,
                )
            )
        if size < 2_000:
            rows.append(
                Fault(
                    f"evaluates with files of {size} bytes at most",
                    "empty",
                    SCORE,
                    "refused",
                    trouble=trouble,
                    is_late=True,
                    again=True,
                )
            )
    for handles in (5, 8, 12, 16, 20):
        trouble = Trouble(limits={"RLIMIT_NOFILE": handles})
        rows.append(
            Fault(
                f"{handles} file handles",
                "half",
                OWN_RUN,
                "either",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
    for megabytes in (0, 1, 4, 16, 64, 256):
        trouble = Trouble(limits={"RLIMIT_AS": megabytes << 20})
        rows.append(
            Fault(
                f"{megabytes} MiB of memory more",
                "half",
                OWN_RUN,
                "either",
                trouble=trouble,
                is_late=True,
                again=True,
            )
        )
    return rows


def rights() -> list[Fault]:
    """File modes that forbid what a command needs; they bind it even where it is run as root."""
    needs = {
        "the run folder": ("half", OWN_RUN, "run", 0o500),
        "the checkpoints": ("half", OWN_RUN, "run/checkpoint", 0o500),
        "a checkpoint": ("half", OWN_RUN, "run/checkpoint/step-000002/model.safetensors", 0),
        "recipe.toml": ("half", OWN_RUN, "run/recipe.toml", 0),
        "environment.json": ("half", OWN_RUN, "run/environment.json", 0),
        "metrics.jsonl": ("half", OWN_RUN, "run/metrics.jsonl", 0),
        "the student": ("half", OWN_RUN, "student/model.safetensors", 0),
        "the student's tokenizer": ("half", OWN_RUN, "student/tokenizer.json", 0),
        "the teacher's folder": ("half", OWN_RUN, "teacher", 0),
        "the prompts": ("half", OWN_RUN, "prompts.jsonl", 0),
        "the work folder": ("own", OWN_RUN, ".", 0o500),
        "a shard": ("cache", CACHED_RUN, "cache/shards/*", 0),
        "the manifest": ("cache", CACHED_RUN, "cache/manifest.json", 0),
        "the head": ("cache", CACHED_RUN, "cache/head.safetensors", 0),
        "the cache": ("half cache", BUILD, "cache", 0o500),
        "the shards": ("half cache", BUILD, "cache/shards", 0o500),
        "the responses": ("scored", SCORE, "responses", 0o500),
        "the finished model": ("done", EVALUATE, "run/model/model.safetensors", 0),
        "evals.jsonl": ("done", EVALUATE, "run/evals.jsonl", 0),
        "the place of a report": ("done", REPORT, ".", 0o500),
        "the metrics of a report": ("done", REPORT, "run/metrics.jsonl", 0),
    }
    quick = ("the run folder", "the prompts")
    return [
        Fault(
            f"no right to {name}",
            base,
            argv,
            "refused",
            mode(path, value),
            trouble=Trouble(bound=True),
            is_late=True,
            is_quick=name in quick,
        )
        for name, (base, argv, path, value) in needs.items()
    ]


def changes() -> list[Fault]:
    """Changes of what a run was begun with: it is gone, or something else."""
    prompts = lines(
        "prompts.jsonl", lambda rows: [rows[1], rows[0].replace(b"*2", b"*3"), *rows[2:]]
    )
    refused: dict[str, tuple[Harm, str]] = {
        "the student is gone": (gone("student"), "student"),
        "the teacher is gone": (gone("teacher"), "teacher"),
        "the prompts are gone": (gone("prompts.jsonl"), "prompts.jsonl"),
        "a file in place of the student": (as_file("student"), "student"),
        "other weights of the student": (flipped("student/model.safetensors", 0.7), "other models"),
        "other weights of the teacher": (flipped("teacher/model.safetensors", 0.7), "other models"),
        "other prompts": (prompts, "other prompts"),
        "prompts in another order": (
            lines("prompts.jsonl", lambda rows: rows[::-1]),
            "other prompts",
        ),
        "fewer prompts": (lines("prompts.jsonl", lambda rows: rows[:-1]), ""),
        "a NaN in the student": (weights("student/model.safetensors", filled(float("nan"))), ""),
        "infinity in the teacher": (weights("teacher/model.safetensors", filled(float("inf"))), ""),
        "another end": (
            changed(
                "student/generation_config.json",
                lambda d: d.replace(b'"eos_token_id": 2', b'"eos_token_id": [2, 5]'),
            ),
            "other models",
        ),
    }
    quick = ("other weights of the student", "other prompts", "the teacher is gone")
    rows = [
        Fault(
            f"resumes when {name}",
            "half",
            OWN_RUN,
            "refused",
            harm,
            says=says,
            is_quick=name in quick,
        )
        for name, (harm, says) in refused.items()
    ]
    for model in ("student", "teacher"):
        for value in (float("nan"), float("inf"), float("-inf"), 3e38):
            harm = weights(f"{model}/model.safetensors", filled(value))
            rows.append(
                Fault(
                    f"begins with {value} in the {model}",
                    "own",
                    OWN_RUN,
                    "refused",
                    harm,
                    is_late=True,
                )
            )
    for lr in ("1e4", "1e30", "1e38"):
        rows.append(
            Fault(
                f"diverges at lr {lr}", "own", [*OWN_RUN, "--train.lr", lr], "either", is_late=True
            )
        )
    cached: dict[str, tuple[Harm, str]] = {
        "other weights of the teacher": (flipped("teacher/model.safetensors", 0.7), "refused"),
        "no teacher": (gone("teacher"), "right"),
    }
    rows += [
        Fault(f"from a cache with {name}", "cache", CACHED_RUN, expect, harm)
        for name, (harm, expect) in cached.items()
    ]
    return rows


TABLES = (
    checkpoints,
    run_logs,
    run_files,
    finished_models,
    evaluations,
    reports,
    studies,
    caches,
    forgeries,
    troubles,
    rights,
    changes,
)


def table() -> list[Any]:
    rows = [(f"{make.__name__}: {fault.name}", fault) for make in TABLES for fault in make()]
    return [
        pytest.param(fault, id=name, marks=[] if fault.is_quick else pytest.mark.slow)
        for name, fault in rows
    ]


# --- the folders, and the test ---


class Folders:
    """Folders that commands made, and what commands leave in them without a fault; each made
    once."""

    def __init__(self, root: Path, forks: Forks):
        self.root, self.forks = root, forks

    def base(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=self.root))
            getattr(self, f"_make_{name.replace(' ', '_')}")(made)
            made.rename(folder)
        return folder

    def whole(self, base: str, argv: list[str]) -> Path:
        """The base after the command."""
        folder = self.root / hashlib.sha256(repr((base, argv)).encode()).hexdigest()
        if not folder.exists():
            made = shutil.copytree(
                self.base(base), Path(tempfile.mkdtemp(dir=self.root)), dirs_exist_ok=True
            )
            self._run(made, argv)
            made.rename(folder)
        return folder

    def _run(self, folder: Path, argv: list[str], trouble: Trouble | None = None) -> None:
        ended = self.forks.run(folder, argv, trouble)
        assert ended.is_killed if trouble else ended.code == 0, ended.err

    def _make_empty(self, folder: Path) -> None:
        pass

    def _make_own(self, folder: Path) -> None:
        """Models and prompts, and no run."""
        shutil.copytree(ASSETS / "base", folder / "student")
        shutil.copytree(ASSETS / "teacher-small", folder / "teacher")
        rows = [{"prompt": f"{10 + i:_>4}*2=", "hint": f"{60 + i:_>4}*7="} for i in range(24)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _make_half(self, folder: Path) -> None:
        """A run that was killed when its second checkpoint began."""
        self._make_own(folder)
        self._run(folder, OWN_RUN, Trouble(event=1, where="step-000004"))

    def _make_self(self, folder: Path) -> None:
        """The same, of a student that is its own teacher and uses its rollouts again."""
        self._make_own(folder)
        self._run(folder, SELF_RUN, Trouble(event=1, where="step-000004"))

    def _make_done(self, folder: Path) -> None:
        shutil.copytree(self.whole("half", OWN_RUN), folder, dirs_exist_ok=True)

    def _make_cache(self, folder: Path) -> None:
        self._make_own(folder)
        self._run(folder, BUILD)

    def _make_half_cache(self, folder: Path) -> None:
        self._make_own(folder)
        self._run(folder, BUILD, Trouble(event=5, where="manifest.json"))

    def _make_scored(self, folder: Path) -> None:
        """An evaluation that was killed after six of nine responses."""
        self._run(folder, SCORE, Trouble(event=8, where="responses/"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, forks):
    return Folders(tmp_path_factory.mktemp("folders"), forks)


def strays(folder: Path) -> dict[str, Any]:
    """Files that are not potstill's, which must be left alone."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    foreign = {name: path for name, path in paths.items() if re.search("stray|victim", name)}
    return {name: path.read_bytes() if path.is_file() else None for name, path in foreign.items()}


@pytest.mark.parametrize("fault", table())
def test_a_fault_is_said_or_does_no_harm(tmp_path, forks, folders, fault):
    folder = shutil.copytree(folders.base(fault.base), tmp_path / "folder")
    fault.harm(folder)
    foreign = strays(folder)
    ended = forks.run(folder, fault.argv, fault.trouble)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)
    said = f"exit code {ended.code}:\n{ended.out}\n{ended.err}"
    assert "Traceback" not in ended.err and ended.code in (0, 2), said
    assert strays(folder) == foreign
    is_refused = ended.code == 2
    assert fault.expect == "either" or (fault.expect == "refused") == is_refused, said
    if is_refused:
        assert ended.last_line.startswith("potstill: ") and re.search(
            fault.says, ended.last_line, re.IGNORECASE
        ), said
        assert fault.is_late or ended.err.count("\n") == 1, said
        assert ended.err.count("potstill: ") == 1, said
    if fault.again:
        ended = forks.run(folder, fault.argv)
        assert ended.code == 0, ended.err
    if (
        ended.code == 0
        and fault.expect != "runs"
        and fault.argv[0] in ("train", "cache", "evaluate")
    ):
        # Inputs of a command stay as they were damaged, where they are not the command's to make.
        given = "stray|victim|elsewhere|^teacher/" + ("" if "build" in fault.argv else "|^cache/")
        given += "|^run/metrics" if fault.argv == EVALUATE else ""
        wrong = differences(folder, folders.whole(fault.base, fault.argv))
        wrong = [line for line in wrong if not re.search(given, line)]
        assert not wrong, f"{wrong}\n{said}"
