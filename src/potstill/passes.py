"""The two passes over tiles of logits: statistics, then the gradient. What `potstill.fused` is made of.

    for each group of rows
        statistics   for each strip of columns, for each block of rows: both models' tile -> the rows' state
        gradient     the same tiles, from memory or computed again: dL/dz -> gradients of hidden states, head and bias

The end class is one more column, whose logit is the log-sum-exp of its members; in the tiles its members are masked.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from potstill import tiles
from potstill.problem import Problem, Side
from potstill.tiles import MASKED, Backend, Terms
from potstill.types import LossTerms, NonFiniteError, TokenStats, VocabShard, Weight

# Rows: fewer make matrix products 5 to 20 % slower on the CPU measured (docs/performance.md), more gain nothing.
# Columns: as many as leave a pair of tiles in 6 MiB.
CPU_TILE = (256, 3072)
# A pair of tiles then fills the cache between the matrix products that write and read it.
GPU_ROWS = 2048


class Plan(NamedTuple):
    """How the work is cut: tiles of `rows` x `columns`, `group_rows` between the passes, `num_resident` tiles kept."""

    rows: int
    columns: int
    group_rows: int
    num_resident: int


def make_plan(
    num_rows: int,
    vocab_size: int,
    budget: int,
    *,
    itemsize: int = 4,
    device: torch.device | None = None,
    one_group: bool = False,
    tile: tuple[int, int] | None = None,
) -> Plan:
    """Cut N x V logits into tiles that fit the cache and groups of rows whose tiles fit the budget of bytes.

    `one_group` keeps all rows together, so that each tile of the head's gradient is finished at once; `tile` fixes the
    rows and columns of a tile.
    """
    if budget < 0:
        raise ValueError(f"the memory budget is {budget} bytes; give 0 (compute every tile twice) or more")
    if tile is not None:
        rows, columns = tile
        if rows < 1 or columns < 1:
            raise ValueError(f"tile is {tile}; give at least one row and one column")
    elif device is not None and device.type == "cuda":
        elements = torch.cuda.get_device_properties(device).L2_cache_size // (2 * itemsize)
        rows, columns = GPU_ROWS, elements // GPU_ROWS
    else:
        rows, columns = CPU_TILE
    if tile is None:
        # A small vocabulary leaves room for more rows.
        rows = rows * max(columns // max(vocab_size, 1), 1)
    columns = min(columns, vocab_size)
    fitting = budget // (2 * itemsize * rows * vocab_size)
    num_blocks = math.ceil(num_rows / rows)
    # Groups no larger than stay whole; with little memory all rows at once, which reads the head just once a pass.
    blocks = num_blocks if one_group or 4 * budget < itemsize * rows * vocab_size else min(max(fitting, 1), num_blocks)
    num_tiles = 2 * blocks * math.ceil(vocab_size / columns)
    return Plan(rows, columns, max(blocks, 1) * rows, min(budget // (itemsize * rows * columns), num_tiles))


def find_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The tile functions of a backend. Raises ValueError for one that is unknown or cannot run on the device."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "eager"
    if name == "eager":
        return tiles.EAGER
    if name == "compiled":
        return tiles.compiled()
    if name == "triton":
        try:
            from potstill import kernels
        except ImportError:
            raise ValueError('backend is "triton", which is not installed; install triton or choose eager') from None
        if dtype != torch.float32:
            raise ValueError(
                f'backend is "triton", which computes in float32, and the inputs are {dtype}; choose eager'
            )
        return kernels.load(device.type)
    raise ValueError(f"backend is {name!r}; choose auto, eager, compiled, triton or plain")


class Tile(NamedTuple):
    block: slice
    columns: slice
    z: Tensor
    y: Tensor | None
    rows: Tensor
    weight: Tensor


class Arena(threading.local):
    """The memory of resident tiles, kept for the thread's next call.

    Getting it anew from the system costs a CPU as much as the arithmetic on a tile. A GPU's allocator keeps it anyway.
    """

    flat: Tensor | None = None

    def buffers(self, count: int, size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        if device.type != "cpu":
            return [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
        num_bytes = count * size * dtype.itemsize
        if self.flat is None or len(self.flat) < num_bytes:
            # The old one goes first, so that the two are never there together.
            self.flat = None
            self.flat = torch.empty(num_bytes, dtype=torch.uint8)
        return list(self.flat[:num_bytes].view(dtype).view(count, size))


ARENA = Arena()


class Walk:
    """The two passes over the tiles of a problem."""

    def __init__(self, problem: Problem, budget: int, backend: str, tile, trains_head: bool):
        self.problem = problem
        self.backend = find_backend(backend, problem.device, problem.dtype)
        itemsize = problem.dtype.itemsize
        # The gradient of a 16-bit head is summed in float32: all rows at once for each tile, or else [V, D] of float32.
        one_group = problem.shard is not None or (trains_head and problem.student.weight.dtype.itemsize < itemsize)
        self.plan = make_plan(
            problem.num_rows,
            problem.vocab_size,
            budget,
            itemsize=itemsize,
            device=problem.device,
            one_group=one_group,
            tile=tile,
        )
        size = min(self.plan.rows, problem.num_rows) * self.plan.columns
        num_sides = len(problem.sides)
        num_resident = min(self.plan.num_resident, num_sides * self.num_tiles())

        self.resident = ARENA.buffers(num_resident, size, problem.dtype, problem.device)
        self.current = [torch.empty(size, dtype=problem.dtype, device=problem.device) for _ in range(num_sides)]
        scratch_size = max(tiles.SCRATCH_ELEMENTS, self.plan.columns)
        self.scratch = list(self.current[0].new_empty(self.backend.num_scratch, scratch_size))

    def num_tiles(self) -> int:
        plan = self.plan
        return math.ceil(plan.group_rows / plan.rows) * math.ceil(self.problem.vocab_size / plan.columns)

    def groups(self) -> list[range]:
        n, step = self.problem.num_rows, self.plan.group_rows
        return [range(start, min(start + step, n)) for start in range(0, n, step)]

    def blocks(self, group: range) -> list[slice]:
        step = self.plan.rows
        return [slice(start, min(start + step, group.stop)) for start in range(group.start, group.stop, step)]

    def tiles(self, group: range, again: bool = False, with_teacher: bool = True) -> Iterator[Tile]:
        """Every tile of a group, one strip of columns after the other; `again` takes resident tiles as they are."""
        problem, blocks = self.problem, self.blocks(group)
        # One resident tile of the side with the wider hidden states saves the most work.
        order = sorted(range(len(problem.sides)), key=lambda i: -problem.sides[i].hidden.shape[1])
        per_side = self.num_tiles()
        for j, start in enumerate(range(0, problem.vocab_size, self.plan.columns)):
            columns = slice(start, min(start + self.plan.columns, problem.vocab_size))
            masked = [i - start for i in problem.member_list if columns.start <= i < columns.stop]
            weights: list[Tensor | None] = [problem.student.weights(columns), None]
            for k, block in enumerate(blocks):
                shape = (block.stop - block.start, columns.stop - columns.start)
                found: list[Tensor | None] = [None, None]
                for i, side in enumerate(problem.sides):
                    if i == 1 and not with_teacher:
                        continue
                    slot = order.index(i) * per_side + j * len(blocks) + k
                    is_resident = slot < len(self.resident)
                    buffer = self.resident[slot] if is_resident else self.current[i]
                    out = found[i] = buffer[: shape[0] * shape[1]].view(shape)
                    if again and is_resident:
                        continue
                    if weights[i] is None:
                        weights[i] = side.weights(columns)
                    side.logits(side.rows(block), weights[i], columns, out)  # pyright: ignore[reportArgumentType]
                    if masked:
                        out[:, masked] = MASKED
                assert found[0] is not None and weights[0] is not None
                yield Tile(block, columns, found[0], found[1], problem.student.rows(block), weights[0])

    def statistics(self, group: range) -> "Group":
        """The first pass over a group, and the JSD's own where it is asked for."""
        problem, num = self.problem, len(group)
        state = tiles.empty_state(num, problem.student.hidden.new_empty(0, dtype=problem.dtype))
        for tile in self.tiles(group):
            here = _shifted(tile.block, group)
            part = self.backend.statistics(tile.z, tile.y, self.scratch)
            state[..., here] = tiles.merge(state[..., here], part)
        # Of each side: the logit of the label, and the log-sum-exp of the end class.
        singles = state.new_full((2, 2, num), MASKED)
        for block in self.blocks(group):
            here = _shifted(block, group)
            for i, side in enumerate(problem.sides):
                if problem.labels is not None:
                    ids = problem.labels[block]
                    is_here = (ids >= 0) & (ids < problem.vocab_size)
                    picked = side.picked(block, ids.clamp(0, problem.vocab_size - 1))
                    singles[0, i, here] = torch.where(is_here, picked, MASKED)
                if len(problem.members):
                    singles[1, i, here] = self.member_logits(side, block).logsumexp(-1)
        if problem.shard is not None:
            state, singles = _over_ranks(state, singles, problem.shard)
        labels, classes = singles
        if problem.label_is_end is not None:
            labels = torch.where(problem.label_is_end[group.start : group.stop], classes, labels)
        # Block by block, as the tiles are: how many rows a group has shows in no shape, and so in no rounding.
        places = [_shifted(block, group) for block in self.blocks(group)]
        if problem.merges_ends:
            for here in places:
                column = tiles.tile_statistics(*self.class_column(classes[:, here]))
                state[..., here] = tiles.merge(state[..., here], column)
        check_finite(state, group, problem)
        parts = [tiles.finish(state[..., here]) for here in places]
        moments = tiles.Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))
        log_sums = torch.stack([moments.student_log_sum_exp, moments.teacher_log_sum_exp])
        mixture = state.new_zeros(3, num)
        if problem.mixture_weight is not None:
            for tile in self.tiles(group, again=True):
                here = _shifted(tile.block, group)
                mixture[:, here] += self.backend.mixture(tile.z, tile.y, log_sums[:, here], problem.mixture_weight)
            if problem.shard is not None:
                dist.all_reduce(mixture, group=problem.shard.group)
            for here in places if problem.merges_ends else ():
                z, y = self.class_column(classes[:, here])
                mixture[:, here] += tiles.tile_mixture(z, y, log_sums[:, here], problem.mixture_weight)  # pyright: ignore
        return Group(group, moments, log_sums, labels, classes, mixture)

    def class_column(self, classes_2N: Tensor) -> tuple[Tensor, Tensor | None]:
        """The end class as a tile of one column: of the student, and of the teacher where there is one."""
        z, y = classes_2N[:, :, None]
        return z, None if self.problem.teacher is None else y

    def forward_kl(self, found: "Group") -> Tensor:
        """KL(teacher || student) [n] of a group term by term, in float64: a pass of its own."""
        problem, group, log_sums = self.problem, found.rows, found.log_sums
        kl = log_sums.new_zeros(len(group), dtype=torch.float64)
        for tile in self.tiles(group, again=True):
            here = _shifted(tile.block, group)
            assert tile.y is not None
            kl[here] += tiles.tile_forward_kl(tile.z, tile.y, log_sums[:, here])
        if problem.merges_ends:
            z, y = found.classes[:, :, None]
            kl += tiles.tile_forward_kl(z, y, log_sums)
        return kl

    def member_logits(self, side: Side, block: slice) -> Tensor:
        members = self.problem.members
        return side.logits(side.rows(block), side.weights(members), members)

    def gradient(
        self, found: "Group", terms: LossTerms, lse: Weight, weights_N: Tensor | None, scale: float, into: "Gradients"
    ) -> Tensor:
        """The second pass: add a group's gradients of `scale * sum_i weights_i loss_i`; returns the KL terms [n].

        The loss of a token is that of `terms` plus `lse` times the student's log-sum-exp.
        """
        problem, group, student = self.problem, found.rows, self.problem.student
        asked = _asked(terms, lse, found)
        value = found.log_sums.new_zeros(len(group))
        gain = scale * asked.factor * student.gain
        blocks = self.blocks(group)
        for tile in self.tiles(group, again=True, with_teacher=asked.has.teacher):
            here = _shifted(tile.block, group)
            g, columns = tile.z, tile.columns
            slope = None if student.softcap is None else 1 - (g / student.softcap).clamp_(min=-1).square_()
            arguments = (found.log_sums[:, here], asked.rows(here), asked.has, asked.mixture_weight)
            value[here] += self.backend.gradient(g, tile.y, *arguments, self.scratch)
            if asked.label_weight is not None:
                ids = problem.labels[tile.block] - columns.start  # pyright: ignore[reportOptionalSubscript]
                is_here = (ids >= 0) & (ids < g.shape[1])
                if problem.label_is_end is not None:
                    is_here &= ~problem.label_is_end[tile.block]
                amount = torch.where(is_here, -asked.label_weight[here], 0)
                g.scatter_add_(1, ids.clamp(0, g.shape[1] - 1)[:, None], amount[:, None])
            if slope is not None:
                g.mul_(slope)
            if weights_N is not None:
                g.mul_(weights_N[tile.block][:, None])
            into.add(tile, g, gain, is_last=tile.block == blocks[-1])
        for block in blocks if problem.merges_ends else ():
            value[_shifted(block, group)] += self._class_gradient(block, found, asked, weights_N, gain, into)
        if problem.shard is not None:
            dist.all_reduce(value, group=problem.shard.group)
        return value * asked.factor

    def _class_gradient(
        self, block: slice, found: "Group", asked: "Asked", weights_N: Tensor | None, gain: float, into: "Gradients"
    ) -> Tensor:
        """Add the gradients of the end class in a block; returns its part [n] of the KL terms, of one rank alone."""
        problem, student, here = self.problem, self.problem.student, _shifted(block, found.rows)
        z, y = self.class_column(found.classes[:, here].clone())
        arguments = (found.log_sums[:, here], asked.rows(here), asked.has, asked.mixture_weight)
        value = tiles.tile_gradient(z, y, *arguments)
        if asked.label_weight is not None:
            z -= (asked.label_weight[here] * problem.label_is_end[block])[:, None]  # pyright: ignore
        if weights_N is not None:
            z *= weights_N[block][:, None]
        if len(problem.members):
            logits = self.member_logits(student, block)
            share = (logits - found.classes[0, here, None]).exp_()
            if student.softcap is not None:
                share *= 1 - (logits / student.softcap) ** 2
            into.add_members(block, problem.members, z * share, gain)
        is_first = problem.shard is None or dist.get_rank(problem.shard.group) == 0
        return value if is_first else torch.zeros_like(value)


class Asked(NamedTuple):
    """What the gradient pass is to do for each row of a group: `factor` times what the coefficients [6, n] say.

    Without coefficients that is the forward KL. `label_weight` [n] is that of the cross-entropy, None where it is 0.
    """

    has: Terms
    coefficients: Tensor | None
    factor: float
    mixture_weight: float
    label_weight: Tensor | None

    def rows(self, here: slice) -> Tensor | None:
        return None if self.coefficients is None else self.coefficients[:, here]


def _asked(terms: LossTerms, lse: Weight, found: "Group") -> Asked:
    """The terms of a loss, and `lse` times the student's log-sum-exp, as coefficients of the gradient."""
    skews, is_gated, b = (terms.skew_forward, terms.skew_reverse), terms.forward_above is not None, terms.mixture_weight
    is_skew = any(map(is_there, skews))
    has = Terms(
        forward=is_there(terms.forward),
        reverse=is_there(terms.reverse) or is_gated,
        entropy=is_there(terms.entropy),
        mixture=is_there(terms.jsd) or is_skew,
        skew=is_skew,
    )
    others = (terms.reverse, terms.jsd, *skews, terms.entropy, terms.cross_entropy, lse)
    is_plain_forward = has.forward and not isinstance(terms.forward, Tensor) and not any(map(is_there, others))
    if is_plain_forward and not is_gated:
        return Asked(has, None, float(terms.forward), b, None)
    label_weight = _row(terms.cross_entropy, found)
    f, r, h, e = (_row(w, found) for w in (terms.forward, terms.reverse, terms.entropy, lse))
    moments = found.moments
    if terms.forward_above is not None:
        f, r = gated(f, r, moments.teacher_entropy, terms.forward_above)
    # A KL(p || m) + B KL(q || m); of the JSD's own parts nothing is left in d.
    a, s, jsd = (_row(w, found) for w in (*skews, terms.jsd))
    j, d = s + (1 - b) * jsd, (1 - b) * a - b * s
    c = f + label_weight + e - h * moments.student_entropy - j * found.mixture[1] + d * found.mixture[2]
    # Without a teacher the reverse KL is not a number.
    c = c - r * moments.reverse_kl if has.reverse else c
    coefficients = torch.stack([f, r, h, j, d, c])
    return Asked(has, coefficients, 1.0, b, label_weight if is_there(terms.cross_entropy) else None)


@dataclass(frozen=True)
class Group:
    """What the first pass found out about a group of rows. Second index of labels and classes: student, teacher."""

    rows: range
    moments: tiles.Moments
    log_sums: Tensor
    labels: Tensor
    classes: Tensor
    mixture: Tensor

    def stats(self, problem: Problem) -> TokenStats:
        """The statistics of the group's rows."""
        moments = self.moments
        stats = TokenStats(
            student_entropy_N=moments.student_entropy,
            student_log_sum_exp_N=moments.student_log_sum_exp,
        )
        if problem.teacher is not None:
            stats = dataclasses.replace(
                stats,
                forward_kl_N=moments.forward_kl,
                reverse_kl_N=moments.reverse_kl,
                teacher_entropy_N=moments.teacher_entropy,
                teacher_log_sum_exp_N=moments.teacher_log_sum_exp,
            )
        if problem.labels is not None:
            student_N, teacher_N = self.labels - self.log_sums
            teacher_N = None if problem.teacher is None else teacher_N
            stats = dataclasses.replace(stats, student_log_prob_N=student_N, teacher_log_prob_N=teacher_N)
        if (b := problem.mixture_weight) is not None:
            skew_forward_N, skew_reverse_N = self.mixture[:2]
            jsd_N = b * skew_forward_N + (1 - b) * skew_reverse_N
            stats = dataclasses.replace(
                stats, jsd_N=jsd_N, skew_forward_N=skew_forward_N, skew_reverse_N=skew_reverse_N
            )
        return stats


class Gradients:
    """The gradients of the student's hidden states, head weight and bias, as they add up over tiles."""

    def __init__(self, walk: Walk, hidden: Tensor, weight: Tensor, bias: Tensor | None, trained: Sequence[bool]):
        problem = walk.problem
        self.student = problem.student
        self.hidden = self.weight = self.bias = self.strip = None
        if trained[0]:
            self.hidden = torch.zeros(hidden.shape, dtype=problem.dtype, device=hidden.device)
        if trained[1]:
            self.weight = torch.empty_like(weight)
            # Rows beyond the shared vocabulary; all of them when there is no token.
            self.weight[problem.vocab_size if problem.num_rows else 0 :] = 0
            if weight.dtype != problem.dtype:
                self.strip = weight.new_empty(walk.plan.columns, weight.shape[1], dtype=problem.dtype)
        if trained[2]:
            assert bias is not None
            self.bias = torch.zeros(bias.shape, dtype=problem.dtype, device=bias.device)

    def add(self, tile: Tile, g: Tensor, gain: float, is_last: bool) -> None:
        """Add the products of one tile of logit gradients; `is_last` when its strip of columns is then complete."""
        starts_anew = tile.block.start == 0
        strip = None
        if self.weight is not None:
            strip = self.weight[tile.columns] if self.strip is None else self.strip[: g.shape[1]]
        for i, piece in enumerate(self.student.pieces(g)):
            if self.hidden is not None:
                self.student.multiply(piece, tile.weight, self.hidden[tile.block], gain, add=True)
            if strip is not None:
                self.student.multiply(piece.T, tile.rows, strip, gain, add=not starts_anew or i > 0)
        if self.weight is not None and self.strip is not None and is_last:
            self.weight[tile.columns] = self.strip[: g.shape[1]]
        if self.bias is not None:
            self.bias[tile.columns] += gain * g.sum(0)

    def add_members(self, block: slice, members: Tensor, g: Tensor, gain: float) -> None:
        """Add the products of the end class's members, whose columns of the tiles were empty."""
        student = self.student
        if self.hidden is not None:
            self.hidden[block] += gain * (g @ student.weight[members].to(g.dtype))
        if self.weight is not None:
            self.weight[members] += (gain * (g.T @ student.hidden[block].to(g.dtype))).to(self.weight.dtype)
        if self.bias is not None:
            self.bias[members] += gain * g.sum(0)

    def finish(self, problem: Problem, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """The gradients, in the types of what they are for."""
        if self.hidden is not None and problem.shard is not None:
            dist.all_reduce(self.hidden, group=problem.shard.group)
        gradients = (self.hidden, self.weight, self.bias)
        return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _over_ranks(state: Tensor, singles: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Merge what the ranks found on their shards: twelve floats a token, in one collective."""
    num = state.shape[-1]
    mine = torch.cat([state.reshape(8, num), singles.reshape(4, num)])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, mine, group=shard.group)
    merged = tiles.merge(*(part[:8].view_as(state) for part in parts))
    # One rank has the label's logit; each has some members of the end class.
    each = torch.stack([part[8:].view_as(singles) for part in parts])
    return merged, torch.stack([each[:, 0].amax(0), each[:, 1].logsumexp(0)])


def gated(forward, reverse, teacher_entropy_N: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Weights [N] of both KLs where the forward one's goes to the reverse unless the teacher's entropy is above."""
    is_above_N = (teacher_entropy_N > above).to(teacher_entropy_N.dtype)
    return is_above_N * forward, reverse + (1 - is_above_N) * forward


def is_there(weight: Weight) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _row(weight: Weight, found: Group) -> Tensor:
    """A term's weight for each row of a group."""
    like, group = found.log_sums[0], found.rows
    if isinstance(weight, Tensor):
        return weight[group.start : group.stop].detach().to(like.dtype)
    return torch.full_like(like, weight)


def _shifted(block: slice, group: range) -> slice:
    return slice(block.start - group.start, block.stop - group.start)


def check_finite(state: Tensor, group: range, problem: Problem) -> None:
    """Raise NonFiniteError if a row's logits are NaN or infinite, by the name of the model whose they are."""
    names = ("model",) if problem.teacher is None else ("student", "teacher")
    # The fourth moment is about both models.
    for who, is_bad_N in zip(names, ~torch.isfinite(state[:, :3]).all(1), strict=False):
        refuse_rows(is_bad_N, who, group.start)


def refuse_rows(is_bad_N: Tensor, who: str, first: int = 0) -> None:
    """Raise NonFiniteError if any of a model's rows is bad; `first` is the number of the first of them."""
    if is_bad_N.any():
        rows = [first + i for i in is_bad_N.nonzero().flatten()[:5].tolist()]
        raise NonFiniteError(
            f"the {who}'s logits are NaN or infinite in rows {rows} of the loss tokens; a vocabulary is cut with "
            "vocab_size, not masked with -inf"
        )
