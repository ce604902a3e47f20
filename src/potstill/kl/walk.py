"""The two passes over tiles of logits: statistics, then the gradient. What `potstill.kl.fused` is
made of.

    for each group of rows
        statistics   for each strip of columns, for each block of rows: both models' tile -> the
        rows' state
        gradient     the same tiles, from memory or computed again: dL/dz -> gradients of hidden
        states, head and bias

The end class is one more column, whose logit is the log-sum-exp of its members; in the tiles its
members are masked.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from potstill.kl import tiles
from potstill.kl.coefficients import AskedGradient, RowGroup, ask
from potstill.kl.inputs import Problem, Side
from potstill.kl.plan import ARENA, Tile, buffers_of, find_backend, make_plan
from potstill.kl.terms import LossTerms, VocabShard, Weight
from potstill.kl.tiles import MASKED
from potstill.types import NonFiniteError


class Walk:
    """The two passes over the tiles of a problem."""

    def __init__(
        self,
        problem: Problem,
        budget: int,
        backend: str,
        tile: tuple[int, int] | None,
        trains_head: bool,
        together: bool = False,
    ):
        self.problem = problem
        self.backend = find_backend(backend, problem.device, problem.dtype)
        itemsize = problem.dtype.itemsize
        # The gradient of a 16-bit head is summed in float32: all rows at once for each tile, or
        # else [V, D] of float32.
        sums_apart = trains_head and problem.student.weight.dtype.itemsize < itemsize
        one_group = together or problem.shard is not None or sums_apart
        self.plan = make_plan(
            problem.num_rows,
            problem.vocab_size,
            budget,
            itemsize=itemsize,
            device=problem.device,
            one_group=one_group,
            tile=tile,
        )
        num_sides = len(problem.sides)
        size, num_resident, self.num_tiles = buffers_of(
            self.plan, problem.num_rows, problem.vocab_size, num_sides
        )
        self.resident = ARENA.buffers(num_resident, size, problem.dtype, problem.device)
        self.current = [
            torch.empty(size, dtype=problem.dtype, device=problem.device) for _ in range(num_sides)
        ]
        scratch_size = max(tiles.SCRATCH_ELEMENTS, self.plan.columns)
        self.scratch = list(self.current[0].new_empty(self.backend.num_scratch, scratch_size))

    def groups(self) -> list[range]:
        n, step = self.problem.num_rows, self.plan.group_rows
        return [range(start, min(start + step, n)) for start in range(0, n, step)]

    def blocks(self, group: range) -> list[slice]:
        step = self.plan.rows
        return [
            slice(start, min(start + step, group.stop))
            for start in range(group.start, group.stop, step)
        ]

    def tiles(self, group: range, again: bool = False, with_teacher: bool = True) -> Iterator[Tile]:
        """Every tile of a group, one strip of columns after the other; `again` takes resident tiles
        as they are."""
        problem, blocks = self.problem, self.blocks(group)
        # One resident tile of the side with the wider hidden states saves the most work.
        order = sorted(range(len(problem.sides)), key=lambda i: -problem.sides[i].hidden.shape[1])
        per_side = self.num_tiles
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
                yield Tile(
                    block, columns, found[0], found[1], problem.student.rows(block), weights[0]
                )

    def statistics(self, group: range) -> "RowGroup":
        """The first pass over a group, and the JSD's own where it is asked for."""
        problem, num = self.problem, len(group)
        state = tiles.empty_state(num, problem.student.hidden.new_empty(0, dtype=problem.dtype))
        for tile in self.tiles(group):
            here = _shifted(tile.block, group)
            part = self.backend.statistics(tile.z, tile.y, self.scratch)
            state[..., here] = tiles.merge(state[..., here], part)
        singles = self.singles(group)
        if problem.shard is not None:
            state, singles = _over_ranks(state, singles, problem.shard)
        labels, classes = singles
        if problem.label_is_end is not None:
            labels = torch.where(problem.label_is_end[group.start : group.stop], classes, labels)
        # Block by block, as the tiles are: how many rows a group has shows in no shape, and so in
        # no rounding.
        places = [_shifted(block, group) for block in self.blocks(group)]
        if problem.merges_ends:
            for here in places:
                column = tiles.tile_statistics(*self.class_column(classes[:, here]))
                state[..., here] = tiles.merge(state[..., here], column)
        check_finite(state, group, problem)
        parts = [tiles.moments_of(state[..., here]) for here in places]
        moments = tiles.Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))
        log_sums = torch.stack([moments.student_log_sum_exp, moments.teacher_log_sum_exp])
        mixture = state.new_zeros(3, num)
        if problem.mixture_weight is not None:
            for tile in self.tiles(group, again=True):
                here = _shifted(tile.block, group)
                mixture[:, here] += self.backend.mixture(
                    tile.z, tile.y, log_sums[:, here], problem.mixture_weight
                )
            if problem.shard is not None:
                dist.all_reduce(mixture, group=problem.shard.group)
            for here in places if problem.merges_ends else ():
                z, y = self.class_column(classes[:, here])
                weight = problem.mixture_weight
                mixture[:, here] += tiles.tile_mixture(z, y, log_sums[:, here], weight)  # pyright: ignore
        return RowGroup(
            rows=group,
            moments=moments,
            log_sums=log_sums,
            labels=labels,
            classes=classes,
            mixture=mixture,
        )

    def singles(self, group: range) -> Tensor:
        """The logit of the label and the log-sum-exp of the end class, of each side: [2, 2, n]."""
        problem = self.problem
        singles = problem.student.hidden.new_full((2, 2, len(group)), MASKED, dtype=problem.dtype)
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
        return singles

    def class_column(self, classes_2N: Tensor) -> tuple[Tensor, Tensor | None]:
        """The end class as a tile of one column: of the student, and of the teacher where there is
        one."""
        z, y = classes_2N[:, :, None]
        return z, None if self.problem.teacher is None else y

    def forward_kl(self, found: "RowGroup") -> Tensor:
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
        self,
        found: "RowGroup",
        terms: LossTerms,
        lse: Weight,
        weights_N: Tensor | None,
        scale: float,
        into: "Gradients",
    ) -> Tensor:
        """The second pass: add a group's gradients of `scale * sum_i weights_i loss_i`; returns the
        KL terms [n].

        The loss of a token is that of `terms` plus `lse` times the student's log-sum-exp, both for
        the group's rows.
        """
        problem, group, student = self.problem, found.rows, self.problem.student
        asked = ask(terms, lse, found)
        value = found.log_sums.new_zeros(len(group))
        weights_n = asked.row_weights(weights_N, group)
        gain = scale * asked.shared_factor * student.gain
        blocks = self.blocks(group)
        for tile in self.tiles(group, again=True, with_teacher=asked.has.teacher):
            here = _shifted(tile.block, group)
            g, columns = tile.z, tile.columns
            slope = (
                None
                if student.softcap is None
                else 1 - (g / student.softcap).clamp_(min=-1).square_()
            )
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
            if weights_n is not None:
                g.mul_(weights_n[here][:, None])
            into.add(tile, g, gain, is_last=tile.block == blocks[-1])
        for block in blocks if problem.merges_ends else ():
            value[_shifted(block, group)] += self._class_gradient(
                block, found, asked, weights_n, gain, into
            )
        if problem.shard is not None:
            dist.all_reduce(value, group=problem.shard.group)
        return value * asked.factor

    def _class_gradient(
        self,
        block: slice,
        found: "RowGroup",
        asked: "AskedGradient",
        weights_n: Tensor | None,
        gain: float,
        into: "Gradients",
    ) -> Tensor:
        """Add the gradients of the end class in a block; returns its part [n] of the KL terms, of
        one rank alone."""
        problem, student, here = self.problem, self.problem.student, _shifted(block, found.rows)
        z, y = self.class_column(found.classes[:, here].clone())
        arguments = (found.log_sums[:, here], asked.rows(here), asked.has, asked.mixture_weight)
        value = tiles.tile_gradient(z, y, *arguments)
        if asked.label_weight is not None:
            z -= (asked.label_weight[here] * problem.label_is_end[block])[:, None]  # pyright: ignore
        if weights_n is not None:
            z *= weights_n[here][:, None]
        if len(problem.members):
            logits = self.member_logits(student, block)
            share = (logits - found.classes[0, here, None]).exp_()
            if student.softcap is not None:
                share *= 1 - (logits / student.softcap) ** 2
            into.add_members(block, problem.members, z * share, gain)
        is_first = problem.shard is None or dist.get_rank(problem.shard.group) == 0
        return value if is_first else torch.zeros_like(value)


class Gradients:
    """The gradients of the student's hidden states, head weight and bias, as they add up over
    tiles."""

    def __init__(
        self,
        walk: Walk,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Sequence[bool],
    ):
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
                self.strip = weight.new_empty(
                    walk.plan.columns, weight.shape[1], dtype=problem.dtype
                )
        if trained[2]:
            assert bias is not None
            self.bias = torch.zeros(bias.shape, dtype=problem.dtype, device=bias.device)

    def add(self, tile: Tile, g: Tensor, gain: float, is_last: bool) -> None:
        """Add the products of one tile of logit gradients; `is_last` when its strip of columns is
        then complete."""
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
            self.weight[members] += (gain * (g.T @ student.hidden[block].to(g.dtype))).to(
                self.weight.dtype
            )
        if self.bias is not None:
            self.bias[members] += gain * g.sum(0)

    def finish(self, problem: Problem, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """The gradients, in the types of what they are for."""
        if self.hidden is not None and problem.shard is not None:
            dist.all_reduce(self.hidden, group=problem.shard.group)
        gradients = (self.hidden, self.weight, self.bias)
        return [
            None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)
        ]


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


def _shifted(block: slice, group: range) -> slice:
    return slice(block.start - group.start, block.stop - group.start)


def check_finite(state: Tensor, group: range, problem: Problem) -> None:
    """Raise NonFiniteError if a row's logits are NaN or infinite, by the name of the model whose
    they are."""
    names = ("model",) if problem.teacher is None else ("student", "teacher")
    # The fourth moment is about both models.
    for who, is_bad_N in zip(names, ~torch.isfinite(state[:, :3]).all(1), strict=False):
        refuse_rows(is_bad_N, who, group.start)


def refuse_rows(is_bad_N: Tensor, who: str, first: int = 0) -> None:
    """Raise NonFiniteError if any of a model's rows is bad; `first` is the number of the first of
    them."""
    if is_bad_N.any():
        rows = [first + i for i in is_bad_N.nonzero().flatten()[:5].tolist()]
        raise NonFiniteError(
            f"the {who}'s logits are NaN or infinite in rows {rows} of the loss tokens; a "
            "vocabulary is cut with vocab_size, not masked with -inf"
        )
