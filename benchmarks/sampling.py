"""Completion tokens per CPU second of potstill's sampler and of `transformers.generate`, side by
side.

Both decode the same prompts of the demo recipe with the shipped pair and the same settings, in
turns within one run. What counts is process CPU time, which other programs disturb less than wall
time, and real tokens up to and including the end token. A rate is the tokens of all batches over
the sum of each batch's shortest time in any round.

Both also decode the same lengths, as draws of their own would compare their luck. What generate
does depends on the lengths by the longest alone: it computes all rows of a batch until that one has
ended. So it is given the number of tokens of potstill's longest completion, and an end token to
look for that no row draws. Greedy decoding has one outcome; there both look for the real one.
"""

import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from potstill.config import Sampling, load_recipe
from potstill.models.language_model import LanguageModel, load_model
from potstill.models.sampling import sample
from potstill.prompts.examples import load_examples, make_prompts
from potstill.teachers.ends import end_set
from potstill.types import Completion

BATCH = 48
# No vocabulary has this id.
NO_TOKEN = 2**40


class Case(NamedTuple):
    name: str
    stops: bool
    temperature: float
    num_batches: int


# The ratio depends on how unequal the lengths in a batch are, so rollouts need more batches to
# settle.
CASES = (
    Case("demo rollouts", stops=True, temperature=1.0, num_batches=6),
    Case("all rows to the end", stops=False, temperature=1.0, num_batches=3),
    Case("greedy", stops=True, temperature=0.0, num_batches=3),
)


def main(
    threads: int = 1,
    rounds: int = 4,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print a table, and write its rows to a JSON file."""
    torch.set_num_threads(threads)
    recipe = load_recipe("demo")
    models = [load_model(recipe.student.model), load_model(recipe.teacher.model)]
    end_ids = end_set(*models)
    num_prompts = BATCH * max(case.num_batches for case in CASES)
    window = recipe.window.tokens
    prompts = make_prompts(
        load_examples(recipe.data.source, num_examples=num_prompts, seed=recipe.data.seed),
        models[0].tokenizer,
        template=recipe.data.template,
        max_completion=window,
        context_length=models[0].context_length,
    )
    prompt_ids = [prompt.token_ids for prompt in prompts]
    rows = [
        measure(model, case, prompt_ids, end_ids, window, rounds)
        for model in models
        for case in CASES
    ]
    lengths = sorted({len(token_ids) for token_ids in prompt_ids})
    shapes = [
        f"{model.name} with {model.model.config.num_hidden_layers} layers of "
        f"{model.model.config.hidden_size} and a vocabulary of {model.vocab_size}"
        for model in models
    ]
    facts = [
        f"{datetime.date.today()}: Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{threads} thread{'s' * (threads > 1)}",
        f"batches of {BATCH} prompts of {' or '.join(map(str, lengths))} tokens, completions of "
        f"up to {window} tokens",
        *shapes,
    ]
    print_table(rows, facts)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def measure(
    model: LanguageModel,
    case: Case,
    prompt_ids: Sequence[tuple[int, ...]],
    end_ids,
    window: int,
    rounds: int,
) -> dict:
    """One row of the table. Asserts that greedy completions are identical."""
    ends = end_ids if case.stops else ()
    batches = [prompt_ids[i * BATCH : (i + 1) * BATCH] for i in range(case.num_batches)]
    sampling = Sampling(temperature=case.temperature, batch_size=BATCH)

    def ours(i: int) -> list[Completion]:
        seeds = [(0, i, row) for row in range(BATCH)]
        return sample(
            model.model, batches[i], seeds, max_tokens=window, end_ids=ends, sampling=sampling
        )

    inputs = [torch.tensor(batch) for batch in batches]
    masks = [torch.ones_like(ids_BT) for ids_BT in inputs]
    our_ids = [[completion.token_ids for completion in ours(i)] for i in range(case.num_batches)]
    settings = [
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        | {"max_new_tokens": max(map(len, batch_ids)), "eos_token_id": NO_TOKEN}
        if case.temperature
        else {"do_sample": False, "max_new_tokens": window, "eos_token_id": list(ends)}
        for batch_ids in our_ids
    ]
    configs = [
        transformers.GenerationConfig(pad_token_id=model.model.config.pad_token_id, **kw)
        for kw in settings
    ]

    @torch.inference_mode()
    def theirs(i: int) -> torch.Tensor:
        return model.model.generate(
            inputs[i], attention_mask=masks[i], generation_config=configs[i]
        )

    for i in range(case.num_batches):
        their_ids = theirs(i)[:, inputs[i].shape[1] :].tolist()
        assert len(their_ids[0]) == max(map(len, our_ids[i])), (
            f"{model.name}: generate takes another number of steps"
        )
        if case.temperature == 0:
            assert [up_to_end(ids, ends) for ids in their_ids] == our_ids[i], (
                f"{model.name}: greedy ids differ"
            )
    num_tokens = sum(len(ids) for batch_ids in our_ids for ids in batch_ids)
    seconds = [
        [(cpu_seconds(ours, i), cpu_seconds(theirs, i)) for i in range(case.num_batches)]
        for _ in range(rounds)
    ]
    # Rounds, batches, methods: both methods take turns on every batch.
    our_seconds, their_seconds = np.array(seconds).min(axis=0).sum(axis=0).tolist()
    return {
        "model": model.name,
        "case": case.name,
        "batch": BATCH,
        "tokens_per_cpu_s": num_tokens / our_seconds,
        "generate_tokens_per_cpu_s": num_tokens / their_seconds,
        "ratio": their_seconds / our_seconds,
    }


def up_to_end(ids: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """The ids up to and including the first end token."""
    length = next((i + 1 for i, token_id in enumerate(ids) if token_id in ends), len(ids))
    return tuple(ids[:length])


def cpu_seconds(method: Callable[[int], object], i: int) -> float:
    start = time.process_time()
    method(i)
    return time.process_time() - start


def print_table(rows: list[dict], facts: list[str]) -> None:
    table = Table(title="Completion tokens per CPU second")
    table.add_column("model", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for name in ("potstill", "generate", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rates = (f"{row[key]:,.0f}" for key in ("tokens_per_cpu_s", "generate_tokens_per_cpu_s"))
        table.add_row(row["model"], row["case"], *rates, f"{row['ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print("\n".join(facts), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    tyro.cli(main)
