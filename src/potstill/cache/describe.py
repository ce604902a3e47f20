"""A cache in words and numbers, for the command line."""

from potstill.cache.verify import Verified
from potstill.teachers.manifest import Manifest


def summary(manifest: Manifest) -> list[str]:
    """Size, bytes a token, and what whole logits would have taken."""
    num_tokens, num_bytes = manifest.total("num_tokens"), manifest.total("num_bytes")
    lines = [
        f"{manifest.total('num_rollouts'):,} completions of {num_tokens:,} tokens in "
        f"{len(manifest.shards):,} shards: {_size(num_bytes)}, "
        f"{num_bytes / max(num_tokens, 1):,.1f} bytes a token ({manifest.settings.describe()})"
    ]
    if manifest.settings.payload != "completions":
        whole = 2 * manifest.teacher_vocab_size * num_tokens
        lines.append(
            f"whole logits in bfloat16 would take {_size(whole)}, "
            f"{2 * manifest.teacher_vocab_size:,} bytes a token: {whole / max(num_bytes, 1):.3g} "
            "times as much"
        )
    if manifest.mean_kl is not None:
        lines.append(
            f"KL(teacher || what is stored): {manifest.mean_kl:.3g} nats a token, over all tokens"
        )
    return lines


def facts(manifest: Manifest) -> list[str]:
    """Who wrote a cache and how, one fact a line."""
    teacher, settings = manifest.teacher, manifest.settings
    written = (
        f"by the {settings.writer}, at most {settings.window} tokens, end set "
        f"{list(settings.end_ids)}"
    )
    if settings.sampling is not None:
        sampling = ", ".join(f"{name} {value:g}" for name, value in settings.sampling.items())
        written += f", {sampling}, seed {settings.seed}"
    if manifest.student is not None:
        written += f"; it is {manifest.student.describe()}, on {manifest.date}"
    lines = [
        f"teacher: {teacher.name} in {teacher.dtype}, weights {teacher.parameters}, files "
        f"{teacher.files}, configuration {teacher.config}, tokenizer {teacher.tokenizer}, chat "
        f"template {teacher.chat_template}",
        f"head: {manifest.teacher_vocab_size:,} rows of {manifest.hidden_size:,}",
        f"completions: {written}",
    ]
    if settings.payload == "topk":
        lines.append(
            f"kept: the {settings.top_k} likeliest of {settings.vocab_size:,} tokens at "
            f"temperature {settings.temperature:g}, end class {list(settings.end_class or ())}"
        )
    return lines


def verification_lines(verified: Verified) -> list[str]:
    """A verification in words, one fact a line."""
    manifest = verified.manifest
    num_whole = len(manifest.shards) - len(verified.broken)
    lines = [
        *verified.broken,
        f"{num_whole:,} of {len(manifest.shards):,} shards have their checksums",
    ]
    if verified.head_error is not None:
        lines.append(
            f"log-sum-exps against the head: at most {verified.head_error:.2g} off, relative"
        )
    if manifest.mean_kl is not None:
        lines.append(
            "KL(teacher || what is stored), over all tokens at the build: "
            f"{manifest.mean_kl:.3g} nats a token"
        )
    if verified.live_kl is not None:
        lines.append(
            f"KL(teacher now || what is stored), over a sample: {verified.live_kl:.3g} nats a token"
        )
    return [*lines, verified.note] if verified.note else lines


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
