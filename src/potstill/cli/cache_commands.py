"""The commands `potstill cache`, one function for each."""

from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from potstill.cli.overrides import refuse_overrides
from potstill.config import CacheOptions, load_recipe
from potstill.console.printable import say

# Shown as the defaults in help texts.
HIDDEN_STATES = CacheOptions()


def build(
    overrides: dict[str, Any],
    recipe: Positional[str],
    out: Path,
    storage: OmitArgPrefixes[CacheOptions] = HIDDEN_STATES,
) -> None:
    """Write completions and a teacher's signal on them to disk, or what is missing there.

    Training with teacher.cache then needs no teacher. With --writer student a student writes, such
    as that of a run (--model RUN). The same command goes on after a kill; with more prompts or
    completions it adds them. `--section.field VALUE` overrides the recipe's, as in
    `potstill train --help-all`.

    Args:
        recipe: A TOML file, or the name of a shipped recipe such as demo.
        out: Folder of the cache.
    """
    resolved = load_recipe(recipe, overrides)
    from potstill.cache.build import build_cache
    from potstill.cache.describe import summary
    from potstill.models import distributed

    world = distributed.start()
    manifest = build_cache(resolved, out, storage)
    distributed.stop()
    if world.is_main:
        say(*summary(manifest))
        prefix = manifest.settings.writer
        say(f"train from it with --objective.prefix {prefix} --teacher.cache {out}")


def info(overrides: dict[str, Any], folder: Positional[Path]) -> None:
    """Say what a cache holds: teacher, settings, size.

    Args:
        folder: Folder of the cache.
    """
    from potstill.cache.describe import facts, summary
    from potstill.teachers.manifest import read_manifest

    refuse_overrides(overrides)
    manifest = read_manifest(folder)
    say(*facts(manifest), *summary(manifest))


def verify(
    overrides: dict[str, Any],
    folder: Positional[Path],
    teacher: str | None = None,
    drop_broken: bool = False,
) -> None:
    """Read a whole cache and check it.

    All checksums, log-sum-exps against the head, and some rollouts against the teacher.

    Args:
        folder: Folder of the cache.
        teacher: Where the teacher is now, if not where it was.
        drop_broken: Remove damaged shards, so that a build makes them again.
    """
    from potstill.cache.describe import verification_lines
    from potstill.cache.verify import verify_cache
    from potstill.teachers.manifest import CacheError

    refuse_overrides(overrides)
    verified = verify_cache(folder, teacher=teacher, drop_broken=drop_broken)
    say(*verification_lines(verified))
    if verified.broken and not drop_broken:
        raise CacheError(
            f"{len(verified.broken)} of {len(verified.manifest.shards)} shards are damaged"
        )
