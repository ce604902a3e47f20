"""A teacher behind a URL that writes: what it writes is what the model here would write."""

import pytest
import served
import torch
from conftest import tiny_recipe
from small_runs import rows_of

import potstill
from potstill.cache.build import build_cache
from potstill.config import RecipeError, Sampling, TeacherSpec, make_recipe
from potstill.engines import remote as engines_remote
from potstill.engines.native import NativeEngine
from potstill.engines.remote import RemoteEngine
from potstill.models.language_model import fingerprint
from potstill.models.probe import ready
from potstill.serving import app
from potstill.teachers.remote.reach import reach
from potstill.teachers.store import Cache
from potstill.types import ModelError
from potstill.wire import request

TEACHER, STUDENT = "potstill:stops-teacher", "potstill:stops-student"
CPU = torch.device("cpu")
PROMPTS = [(1, 5, 6), (1, 7), (1,), (1, 5, 6, 7, 8), (1, 9)]
SEEDS = [(7, 2**100, place) for place in range(5)]


@pytest.fixture(scope="module")
def teacher():
    return ready(TEACHER).requires_grad_(False)


@pytest.fixture(scope="module")
def url(teacher):
    with served.in_a_thread(app.make_app(teacher, fingerprint(teacher))) as url:
        yield url


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_it_writes_what_the_model_here_does(teacher, url, batch_size):
    """To the bit, as the rows that are decoded together are the same."""
    there = reach(TeacherSpec(model=TEACHER, url=(url, url)), CPU, must_write=True)
    heard = []
    how = {"max_tokens": [3, 9, 1, 20, 12], "end_ids": (2,), "vocab_size": teacher.vocab_size - 1}
    how["sampling"] = Sampling(batch_size=batch_size, temperature=0.8, top_k=9)
    here = NativeEngine(teacher.model).write(PROMPTS, SEEDS, **how)
    found = RemoteEngine(there.decoder).write(
        PROMPTS, SEEDS, **how, on_token=lambda *one: heard.append(one)
    )
    for place, (mine, theirs) in enumerate(zip(here, found, strict=True)):
        assert (mine.token_ids, mine.stop) == (theirs.token_ids, theirs.stop)
        assert mine.log_probs == theirs.log_probs
        assert tuple(token_id for at, token_id in heard if at == place) == mine.token_ids


HANDOFF = {"prefix": "mixed", "prefix_mix": "handoff", "handoff_tokens": [1, 8], "kl": "mixed"}


@pytest.mark.parametrize("objective", [{"prefix": "teacher", "kl": "forward"}, HANDOFF])
def test_a_run_is_the_same_to_the_bit(tmp_path, url, objective):
    sections = {"student": {"model": STUDENT}, "objective": objective, "train": {"steps": 2}}
    for name, where in (("here", {}), ("there", {"url": url})):
        recipe = tiny_recipe(tmp_path / name, teacher={"model": TEACHER} | where, **sections)
        potstill.train(recipe, quiet=True)
    here, there = (
        [row | {"flops": 0, "total_flops": 0} for row in rows_of(tmp_path / name)]
        for name in ("here", "there")
    )
    assert here == there
    writes = [rows_of(tmp_path / name)[0]["flops"]["rollout"] for name in ("here", "there")]
    assert writes[0] > writes[1], "what is written elsewhere is not of our operations"


def test_a_cache_is_the_same(tmp_path, url):
    sections = {"student": {"model": STUDENT}, "objective": {"prefix": "teacher"}}
    texts = []
    for name, where in (("here", {}), ("there", {"url": url})):
        recipe = tiny_recipe(tmp_path / "run", teacher={"model": TEACHER} | where, **sections)
        build_cache(recipe, tmp_path / name, quiet=True)
        cache = Cache(tmp_path / name)
        texts.append({record.sha256 for record in cache.manifest.shards})
    assert texts[0] == texts[1]


def test_a_server_that_writes_nothing_is_refused_where_it_must(teacher):
    """As a pooling server of vLLM, which gives states alone."""
    pooling = app.make_app(teacher, "print")

    async def without_completions(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/v1/completions":
            scope = scope | {"path": "/nowhere"}
        await pooling(scope, receive, send)

    with served.in_a_thread(without_completions) as url:
        spec = TeacherSpec(model=TEACHER, url=url)
        assert reach(spec, CPU).decoder is None
        with pytest.raises(ModelError, match=r"writes no completions .*status 404.*cache first"):
            reach(spec, CPU, must_write=True)


ROWS = {"prompt": [[1, 5], [1]], "seed": [[1], [2]], "max_tokens": [3, 4]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 0}, "give as many seeds"),
        ({"seed": [[1]]}, "give as many seeds"),
        ({"max_tokens": [3]}, "as many caps"),
        ({"prompt": [1, 5]}, "prompt is no list of rows"),
        ({"prompt": [[1], 5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"seed": [[], [1]]}, "seed"),
        ({"seed": [[-1], [1]]}, "seed"),
        ({"max_tokens": [3, 0]}, "max_tokens"),
        ({"max_tokens": [3, 5000]}, "max_tokens is 5000"),
        ({"prompt": [[1]] * 65, "seed": [[1]] * 65, "max_tokens": 3}, "prompt"),
        ({"prompt": [[1, 10**6], [1]]}, "an id is 1000000"),
        ({"n": 2}, "n"),
    ],
)
def test_rows_that_are_not_as_they_should_be(url, changed, says):
    answer = request(url, "/v1/completions", ROWS | changed, seconds=30)
    assert 400 <= answer.status < 500 and says in answer.text, answer.text


def test_what_is_much_at_once_is_refused_and_not_asked_for(teacher, url, monkeypatch):
    monkeypatch.setattr(app, "MAX_DRAWN", 40)
    answer = request(url, "/v1/completions", ROWS | {"max_tokens": 20}, seconds=30)
    assert answer.status == 400 and "2 rows of up to 22 tokens are more than 40" in answer.text
    monkeypatch.setattr(engines_remote, "MAX_DRAWN", 40)
    there = reach(TeacherSpec(model=TEACHER, url=url), CPU)
    how = {"max_tokens": 15, "end_ids": (2,), "sampling": Sampling()}
    here = NativeEngine(teacher.model).write(PROMPTS, SEEDS, **how)
    found = RemoteEngine(there.decoder).write(PROMPTS, SEEDS, **how)
    assert [each.token_ids for each in found] == [each.token_ids for each in here]


def test_tokens_from_both_models_in_turn_are_refused(url):
    objective = {"prefix": "mixed", "prefix_mix": "token"}
    with pytest.raises(RecipeError, match="for which both must be here"):
        make_recipe({"teacher": {"url": url}, "objective": objective})
