"""Teacher whose signal is read from a cache; its body is not loaded."""

import torch
from torch import Tensor

from potstill.config import Recipe, RecipeError
from potstill.kl.topk import TopK
from potstill.models.batch import Batch
from potstill.models.flops import head_flops
from potstill.models.language_model import ModelError, load_tokenizer
from potstill.teachers.manifest import CacheError, tokenizer_digests
from potstill.teachers.store import Cache
from potstill.types import Prompt


class CachedTeacher:
    """A teacher whose body is not there: its head, its tokenizer, and its signal on the rollouts of
    a cache.

    It cannot write: its completions are read from the cache (`Cache.rollout`).
    """

    can_score = False
    decoder = None
    config = context_length = None

    def __init__(self, cache: "Cache", device: torch.device, trust_remote_code: bool = False):
        manifest = cache.manifest
        self.cache, self.device = cache, device
        self.name = manifest.teacher.name
        self.end_ids = manifest.teacher_end_ids
        self.vocab_size = manifest.teacher_vocab_size
        folder = cache.folder / "tokenizer"
        try:
            self.tokenizer = load_tokenizer(str(folder), trust_remote_code)
        except ModelError as error:
            raise CacheError(f"the cache's tokenizer: {error}") from None
        if tokenizer_digests(self.tokenizer) != (
            manifest.teacher.tokenizer,
            manifest.teacher.chat_template,
        ):
            raise CacheError(
                f"{str(folder)!r} is not the tokenizer that the cache was built with; build the "
                "cache again"
            )
        self.head = cache.head(device) if manifest.settings.payload == "hidden" else None
        self.flops = head_flops(self.head)

    def weights_digest(self) -> str | None:
        return self.cache.manifest.teacher.parameters

    def signal_at(self, batch: Batch) -> Tensor | TopK:
        """Hidden states [N, E], or the k likeliest tokens, at the loss tokens of a batch of cached
        rollouts."""
        if self.head is None:
            return self.cache.top_k_of(batch.rollouts, self.device)
        return self.cache.rows_of(batch.rollouts, self.head)


def cached_once(recipe: Recipe, cache: Cache, prompts: list[Prompt]) -> list[Prompt]:
    """Each prompt with the first of its cached completions. Raises RecipeError for a cache without
    whole KLs."""
    settings, max_tokens = cache.manifest.settings, recipe.validation.max_tokens or 0
    if settings.writer != "teacher" or settings.payload != "hidden":
        held = {
            "teacher": "the teacher's likeliest tokens alone",
            "student": "a student's completions",
            "dataset": "the data's completions",
        }[settings.writer]
        raise RecipeError(
            f"validation is asked for and the cache {str(cache.folder)!r} holds {held}, of which "
            "no exact KL is known; build a cache of the teacher's completions with --payload "
            "hidden, or set validation.num_prompts = 0"
        )
    if max_tokens > settings.window:
        raise RecipeError(
            f"validation.max_tokens is {max_tokens} and the cache {str(cache.folder)!r} has "
            f"completions of at most {settings.window} tokens; lower it"
        )
    first: dict[tuple[int, ...], Prompt] = {}
    for prompt in cache.attach(prompts):
        first.setdefault(prompt.token_ids, prompt)
    return list(first.values())
