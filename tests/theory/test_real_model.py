"""The four cells on a real model: SmolLM2-135M-Instruct teaches half of its own layers. Run by
`make test-real`."""

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.config import METHODS, Objective, Sampling, load_recipe
from potstill.models.batch import Batch
from potstill.models.language_model import LanguageModel, load_model
from potstill.models.sampling import sample
from potstill.objectives.loss import Loss, batch_loss, teacher_signal
from potstill.prompts.examples import load_examples, make_prompts
from potstill.rollouts.batching import make_batch
from potstill.teachers.ends import end_set
from potstill.teachers.vocabulary import shared_vocab_size
from potstill.training.loop import train
from potstill.types import Example, Prompt, Rollout, Writer

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
# Kept between test runs, as making the models takes longer than loading them.
FOLDER = ROOT / "build" / "smollm2"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_smollm2.py"))
IM_START, IM_END = 1, 2
CAPITAL = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="session")
def folder() -> Path:
    SCRIPT["make"](FOLDER)
    return FOLDER


@pytest.fixture(scope="session")
def teacher(folder) -> LanguageModel:
    return load_model(str(folder / "teacher"))


@pytest.fixture(scope="session")
def student(folder) -> LanguageModel:
    return load_model(str(folder / "student"))


def tokenise(model: LanguageModel, examples: list[Example], max_completion: int) -> list[Prompt]:
    return make_prompts(
        examples,
        model.tokenizer,
        template="chat",
        max_completion=max_completion,
        context_length=model.context_length,
    )


@pytest.fixture(scope="session")
def held_out(teacher, student) -> dict[str, Batch]:
    """Problems that no run trains on, continued by the teacher and by the untrained student."""
    prompts = tokenise(
        teacher, load_examples("reasoning-gym:gsm_symbolic", split="test", num_examples=6), 48
    )
    writers: dict[Writer, LanguageModel] = {"teacher": teacher, "student": student}
    batches = {}
    for source, model in writers.items():
        completions = sample(
            model.model,
            [prompt.token_ids for prompt in prompts],
            [(7, i) for i in range(len(prompts))],
            max_tokens=48,
            end_ids=(IM_END,),
            sampling=Sampling(),
        )
        batches[source] = make_batch(
            [
                Rollout(
                    prompt=prompt,
                    completion_ids=c.token_ids,
                    trained=(True,) * len(c.token_ids),
                    writers=(source,) * len(c.token_ids),
                    stop=c.stop,
                )
                for prompt, c in zip(prompts, completions, strict=True)
            ]
        )
    return batches


@torch.no_grad()
def mean_loss(
    student: LanguageModel, teacher: LanguageModel, batch: Batch, objective: Objective
) -> float:
    loss = Loss(
        objective=objective, normalize="token", vocab_size=shared_vocab_size(student, teacher)
    )
    loss_N = batch_loss(student, teacher, teacher_signal(teacher, batch, loss), batch, loss)[1]
    return loss_N.mean().item()


def test_the_teacher_is_the_model_in_the_gguf(teacher):
    model, tokenizer = SCRIPT["load_gguf"]()
    text = f"<|im_start|>user\n{CAPITAL} It's 12,345 km²!\n\n  Oui.<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert teacher.tokenizer.encode(text) == ids
    assert teacher.tokenizer.chat_template == tokenizer.chat_template
    with torch.no_grad():
        ids_BT = torch.tensor([ids])
        theirs, ours = model(ids_BT).logits[0], teacher.head(teacher(ids_BT)[0])
    assert (theirs - ours).abs().max() < 1e-3
    assert theirs.std() > 1


def test_the_student_is_every_second_layer_of_the_teacher(teacher, student):
    kept = SCRIPT["spaced"](30, 15)
    assert len(set(kept)) == 15 and (kept[0], kept[-1]) == (0, 29)
    assert {b - a for a, b in itertools.pairwise(kept)} == {2, 3}
    weights = teacher.model.state_dict()
    for name, value in student.model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"model.layers.{kept[int(layer)]}.{rest}"
        assert torch.equal(value, weights[name]), name


def test_vocabulary_and_end_set(teacher, student):
    assert shared_vocab_size(student, teacher) == len(teacher.tokenizer) == 49_152
    assert end_set(student, teacher) == (IM_END,)
    assert teacher.tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END


def test_a_prompt_is_one_templated_turn(teacher):
    example = load_examples("reasoning-gym:gsm_symbolic", num_examples=1)[0]
    (prompt,) = tokenise(teacher, [example], 48)
    text = teacher.tokenizer.decode(prompt.token_ids)
    assert text.endswith(f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user\n") == 1
    # The start of a turn is also the tokenizer's BOS, so one too many would go unnoticed: system,
    # user, assistant.
    assert prompt.token_ids.count(IM_START) == 3
    assert prompt.token_ids[0] == IM_START != prompt.token_ids[1]


def test_the_teacher_answers_and_stops_as_in_plain_transformers(teacher, folder):
    (prompt,) = tokenise(teacher, [Example(id="capital", prompt=CAPITAL)], 32)
    (completion,) = sample(
        teacher.model,
        [prompt.token_ids],
        [(0,)],
        max_tokens=32,
        end_ids=teacher.end_ids,
        sampling=Sampling(temperature=0),
    )
    assert completion.stop == "end" and completion.token_ids[-1] == IM_END
    assert "Paris" in teacher.tokenizer.decode(completion.token_ids)
    assert plain_answer(folder / "teacher") == teacher.tokenizer.decode(
        completion.token_ids, skip_special_tokens=True
    )


def plain_answer(folder: Path, do_sample: bool = False) -> str:
    """A model folder's answer to CAPITAL without potstill."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == IM_END
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": CAPITAL}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=do_sample)[
        0, inputs["input_ids"].shape[1] :
    ]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("method", METHODS)
def test_five_steps_lower_the_loss(method, teacher, student, held_out, tmp_path, monkeypatch):
    # The recipe names the folders from here. One for another student would leave its rate out.
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(
        "smollm2",
        {
            "out": str(tmp_path),
            "objective.prefix": METHODS[method].prefix,
            "objective.kl": METHODS[method].kl,
        },
    )
    train(recipe, quiet=True)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    trained = load_model(str(tmp_path / "model"))
    batch = held_out[METHODS[method].prefix]
    before, after = (
        mean_loss(model, teacher, batch, recipe.objective) for model in (student, trained)
    )
    print(
        f"{method}: held-out loss {before:.3f} -> {after:.3f}, steps "
        f"{[round(r['loss'], 3) for r in rows]}"
    )
    assert after < 0.8 * before
    assert trained.end_ids == (IM_END,)
    assert trained.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert trained.tokenizer.chat_template == teacher.tokenizer.chat_template
    # Five steps do not bring back the half that was cut out: any words will do.
    answer = plain_answer(tmp_path / "model", do_sample=True)
    assert any(c.isalnum() for c in answer), answer
