"""A plan as tables of 100 columns, or as JSON."""

import json
import math
from collections.abc import Sequence

from potstill.console.printable import WIDTH, plain, say
from potstill.planning.plan import RunPlan, as_data
from potstill.planning.units import shown_bytes, shown_count, shown_seconds


def print_as_json(plan: RunPlan) -> None:
    """The plan as one JSON object, on standard output."""
    say(json.dumps(as_data(plan), indent=1, ensure_ascii=False))


def print_tables(plan: RunPlan) -> None:
    """Tables, and what to change as the last lines."""
    asked, work = plan.asked, plan.needs.work
    many = "" if asked.num_devices == 1 else f"{asked.num_devices} of "
    say(
        f"{plan.recipe.method} on {many}{asked.device.name} ({asked.device.source})",
        f"prompts of {work.prompt_tokens} tokens and responses of {work.completion_tokens}, which "
        "no configuration tells: --prompt-tokens, --response-tokens",
        f"a device and step: {work.num_rollouts} rollouts, {work.num_batches} batches of "
        f"{work.rows}",
    )
    _print_models(plan)
    _print_memory(plan)
    _print_step(plan)
    _print_cells(plan)
    say(*_last_lines(plan))


def _print_models(plan: RunPlan) -> None:
    models = {"student": plan.pair.student, "teacher": plan.pair.teacher}
    rows = [
        (role, model.name, f"{model.sizes.num_weights:,}", shown_count(model.sizes.flops.per_token))
        for role, model in models.items()
        if model is not None
    ]
    _table("models", ("", "name", "weights", "operations a token"), rows)


def _print_memory(plan: RunPlan) -> None:
    memory = plan.needs.memory
    rows = [(part, shown_bytes(size), "always") for part, size in memory.kept.items() if size]
    for phase, parts in memory.phases.items():
        sign = " (the peak)" if phase == memory.fullest else ""
        rows += [(part, shown_bytes(size), phase + sign) for part, size in parts.items() if size]
    rows.append(("in all, at the peak", shown_bytes(memory.peak), memory.fullest))
    title = "memory of a device" + ("" if memory.is_counted else ", activations by rule")
    _table(title, ("part", "bytes", "when"), rows)


def _print_step(plan: RunPlan) -> None:
    needs = plan.needs
    parts = [(part, shown_count(number)) for part, number in needs.operations.items() if number]
    _table("operations of a device and step", ("part", "operations"), parts)
    total = needs.step_seconds
    rows = [
        (part, shown_seconds(seconds), f"{seconds / total:.0%}")
        for part, seconds in needs.seconds.items()
        if seconds
    ]
    rows.append(("a step", shown_seconds(total), ""))
    steps = plan.recipe.train.steps
    rows.append((f"all {steps:,} steps", shown_seconds(total * steps), ""))
    _table("time, as a model", ("part", "", "share"), rows)


def _print_cells(plan: RunPlan) -> None:
    rows = []
    for cell in plan.cells:
        needs = cell.needs
        fits = "" if needs.fits(plan.asked.device) else " (does not fit)"
        rows.append(
            (
                cell.methods,
                cell.needs.place,
                shown_bytes(needs.memory.peak) + fits,
                shown_seconds(needs.step_seconds),
                shown_bytes(needs.traffic.total),
            )
        )
    names = ("method", "teacher", "memory", "a step", "received a step")
    if rows:
        _table("cells of the grid, and where the teacher is", names, rows)


def _last_lines(plan: RunPlan) -> list[str]:
    traffic, disk, device = plan.needs.traffic, plan.disk, plan.asked.device
    lines = [
        f"disk: {shown_bytes(disk.most)} ({disk.num_checkpoints} checkpoints of "
        f"{shown_bytes(disk.checkpoint)}, the student {shown_bytes(disk.student)})"
    ]
    if plan.cache_token is not None:
        lines[0] += f"; a teacher cache takes {plan.cache_token:,} bytes a token"
    if plan.asked.num_devices > 1:
        lines.append(
            f"received by a device in a step: shards {shown_bytes(traffic.shards)}, weights that "
            f"decode {shown_bytes(traffic.copy)} (an engine would get {shown_bytes(traffic.push)})"
        )
    lines += _engine_lines(plan)
    peak, memory = plan.needs.memory.peak, shown_bytes(device.memory)
    if plan.needs.fits(device):
        return [*lines, f"it fits: {shown_bytes(peak)} of {memory}"]
    lines.append(f"it does not fit: {shown_bytes(peak)} are needed, of {memory}; change")
    lines += [f"  {c.field} = {c.value!r}: {shown_bytes(c.peak)}" for c in plan.changes]
    if not plan.changes or plan.changes[-1].peak > device.memory:
        lines.append("  and that is not enough: take more or larger devices, or smaller models")
    return lines


def _engine_lines(plan: RunPlan) -> list[str]:
    """How an engine's memory and time are reckoned with."""
    recipe, device = plan.recipe, plan.asked.device
    if recipe.rollouts.engine == "native":
        return []
    timed = "rollouts are timed as those of the native engine"
    if recipe.engine.url is not None:
        return [f"the engine at {recipe.engine.url} is not counted; {timed}"]
    kept = plan.needs.memory.kept
    least = kept["engine's weights"] + kept["engine's KV cache"]
    lines = [f"the engine is a process of its own and takes {shown_bytes(least)}; {timed}"]
    if not device.is_cpu:
        share = math.ceil(100 * least / device.memory) / 100
        lines.append(
            "  vLLM takes a fixed share of a GPU, most of it by default: give it at least "
            f"--gpu-memory-utilization {share:g} in engine.args, and what this plan leaves"
        )
    return lines


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left")
    for place, name in enumerate(names):
        table.add_column(plain(name), justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(plain, row))
    Console(width=WIDTH).print(table)
