import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

# No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread is fastest for models this small, here and in what is started from here, so that as
# many tests as there are cores can run side by side. Every test holds with any number: where bits
# are compared, they are those of one machine with one number of threads.
os.environ["OMP_NUM_THREADS"] = os.environ.get("POTSTILL_TEST_THREADS", "1")

import pytest
import torch
from forked import Forks
from waiting import SECONDS

if not torch.cuda.is_available():
    # Triton then runs its kernels in Python; it looks when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import Qwen3Config, Qwen3ForCausalLM

from potstill.config import Recipe
from potstill.models.character_tokenizer import build_tokenizer
from potstill.models.language_model import LanguageModel
from potstill.training import step as step_parts
from potstill.types import Example, Prompt, Rollout

# A shell has what it runs in the background ignore these, and processes that are started would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# torch.compile does not tell instruction sets apart in its cache: code of another one gives wrong
# numbers.
COMPILED = f"potstill-compiled-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / COMPILED))


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="neither chromium nor google-chrome is installed, in which to load the page",
)


def browsed(page: Path) -> str:
    """The DOM that a browser with a narrow window makes of a page, after its scripts."""
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking "
    )
    options += (
        "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom "
        "--window-size=500,900"
    )
    command = [
        str(CHROMIUM),
        *options.split(),
        f"--user-data-dir={page.parent / 'browser'}",
        page.resolve().as_uri(),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=True
    ).stdout


def make_model(
    hidden_size: int = 16, seed: int = 0, vocab_size: int = 23, eos_token_id: int = 2
) -> LanguageModel:
    """A random two-layer model over the embedded task's vocabulary."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        tie_word_embeddings=True,
        # Large, so that two random models differ by more than rounding.
        initializer_range=0.5,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=eos_token_id,
    )
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_token_id)
    return LanguageModel(Qwen3ForCausalLM(config).eval(), tokenizer, f"model-{seed}")


def make_rollout(
    prompt_ids, completion_ids, trained=None, stop="end", name="p", writer="student"
) -> Rollout:
    prompt = Prompt(example=Example(id=name, prompt="prompt"), token_ids=tuple(prompt_ids))
    trained = tuple(trained) if trained is not None else (True,) * len(completion_ids)
    return Rollout(
        prompt=prompt,
        completion_ids=tuple(completion_ids),
        trained=trained,
        writers=(writer,) * len(completion_ids),
        stop=stop,
    )


def tiny_recipe(out, **sections) -> Recipe:
    """A few fast steps on the shipped pair; sections are merged over the defaults."""
    data = {
        "out": str(out),
        "data": {"source": "multiplication", "num_prompts": 64},
        "window": {"tokens": 24},
        "train": {
            "steps": 4,
            "prompts_per_step": 8,
            "tokens_per_batch": 256,
            "warmup_steps": 1,
            "checkpoint_every": 2,
        },
    }
    data["train"]["lr"] = 3e-3
    for name, section in sections.items():
        is_table = isinstance(section, dict)
        data[name] = {**data.get(name, {}), **section} if is_table else section
    return Recipe.model_validate(data)


@contextlib.contextmanager
def interrupted_at(step: int):
    """Ctrl-C in the middle of a step's update."""
    real = step_parts.learning_rate

    def interrupt(config, current, spent):
        if current == step:
            raise KeyboardInterrupt
        return real(config, current, spent)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step_parts, "learning_rate", interrupt)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """A process to fork from: nothing else forks, as the process of the tests may have threads."""
    loaded = Forks(tmp_path_factory.mktemp("forks"))
    yield loaded
    loaded.close()


@pytest.fixture
def student() -> LanguageModel:
    return make_model(hidden_size=16, seed=0)


@pytest.fixture
def teacher() -> LanguageModel:
    return make_model(hidden_size=24, seed=1)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU that a test needs."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is here")
    return torch.device("cuda")


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        terminalreporter.write_line("no GPU is here: 0 run")
