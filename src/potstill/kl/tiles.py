"""The work on one tile of logits, in PyTorch: statistics on the way forward, the gradient on the
way back.

A tile is a [N, V] piece of both models' tempered logits, for some rows and some columns of the
vocabulary. Nothing here knows where it came from. Notation: z student logits, y teacher logits, q
and p their softmaxes, A and B their log-sum-exps, F = KL(p || q), R = KL(q || p), H the student's
entropy, m = b p + (1 - b) q.

The same source runs eagerly, where `scratch` tiles keep temporaries in the cache, and through
`torch.compile`, where `scratch` is empty and everything is fused. `potstill.kl.triton_tiles` has
the same functions in Triton.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.kl.definition import log_mixture

# The logit of a column that is not there: its exponential is exactly 0 and its products stay
# finite.
MASKED = -1e30

# A state holds, for each of student and teacher: the maximum m, S = sum exp(. - m), and the first
# moments of its own and of the other model's logits under its weights, centred on both maxima
# (uncentred ones lose 1e-4 at an offset of 1000).
STATE_SHAPE = (2, 4)
# The eager functions work on slices of a tile whose four temporaries stay in a core's cache: 256
# KiB each in float32.
NUM_SCRATCH = 4
SCRATCH_ELEMENTS = 2**16


class Terms(NamedTuple):
    """Which terms a gradient has; known before the tiles, so that nothing is computed for an absent
    one."""

    forward: bool
    reverse: bool
    entropy: bool
    mixture: bool
    skew: bool

    @property
    def teacher(self) -> bool:
        """Whether the gradient depends on the teacher at all."""
        return self.forward or self.reverse or self.mixture


class Backend(NamedTuple):
    """The tile functions, in one of their implementations."""

    name: str
    statistics: Callable[..., Tensor]
    mixture: Callable[..., Tensor]
    gradient: Callable[..., Tensor]
    num_scratch: int


def tile_statistics(z_NV: Tensor, y_NV: Tensor | None, scratch: Sequence[Tensor] = ()) -> Tensor:
    """The state [2, 4, N] of one tile; without a teacher its half is empty."""
    a_out, b_out, e_out, t_out = scratch or (None,) * NUM_SCRATCH
    zmax_N1 = z_NV.amax(-1, keepdim=True)
    a_NV = torch.sub(z_NV, zmax_N1, out=a_out)
    e_NV = torch.exp(a_NV, out=e_out)
    s_sum_N, s_z_N = e_NV.sum(-1), torch.mul(e_NV, a_NV, out=t_out).sum(-1)
    zmax_N = zmax_N1.squeeze(-1)
    if y_NV is None:
        zero_N = torch.zeros_like(s_sum_N)
        return torch.stack(
            [zmax_N, s_sum_N, s_z_N, zero_N, zero_N + MASKED, zero_N, zero_N, zero_N]
        ).unflatten(0, STATE_SHAPE)
    ymax_N1 = y_NV.amax(-1, keepdim=True)
    b_NV = torch.sub(y_NV, ymax_N1, out=b_out)
    s_y_N = torch.mul(e_NV, b_NV, out=t_out).sum(-1)
    f_NV = torch.exp(b_NV, out=e_out)
    t_sum_N, t_y_N = f_NV.sum(-1), torch.mul(f_NV, b_NV, out=b_out).sum(-1)
    t_z_N = torch.mul(f_NV, a_NV, out=a_out).sum(-1)
    ymax_N = ymax_N1.squeeze(-1)
    return torch.stack([zmax_N, s_sum_N, s_z_N, s_y_N, ymax_N, t_sum_N, t_y_N, t_z_N]).unflatten(
        0, STATE_SHAPE
    )


def empty_state(num_rows: int, like: Tensor) -> Tensor:
    """The state of no columns at all: what `merge` leaves out."""
    state = like.new_zeros(*STATE_SHAPE, num_rows)
    state[:, 0] = MASKED
    return state


def merge(*states: Tensor) -> Tensor:
    """One state from those of disjoint sets of columns: of tiles, of splits of a kernel's grid, of
    ranks."""
    parts = torch.stack(states)
    maxima, sums = parts[:, :, 0], parts[:, :, 1]
    merged = torch.empty_like(states[0])
    top = torch.amax(maxima, 0, out=merged[:, 0])
    shift = maxima - top
    scale = shift.exp()
    torch.sum(scale * sums, 0, out=merged[:, 1])
    # The own moment moves with the own maximum, the other with the other model's.
    shifts = torch.stack([shift, shift.flip(1)], 2)
    torch.sum(
        scale[:, :, None] * torch.addcmul(parts[:, :, 2:], shifts, sums[:, :, None]),
        0,
        out=merged[:, 2:],
    )
    return merged


class Moments(NamedTuple):
    """Statistics of each row over the whole vocabulary; the teacher's are meaningless without
    one."""

    student_log_sum_exp: Tensor
    teacher_log_sum_exp: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor


def moments_of(state: Tensor) -> Moments:
    """Statistics [N] from a state [2, 4, N]; absolute error of the KLs about 2e-6 nats in
    float32."""
    (zmax, s_sum, s_z, s_y), (ymax, t_sum, t_y, t_z) = state
    log_s, log_t = s_sum.log(), t_sum.log()
    return Moments(
        zmax + log_s,
        ymax + log_t,
        log_s - s_z / s_sum,
        log_t - t_y / t_sum,
        (t_y - t_z) / t_sum - (log_t - log_s),
        (s_z - s_y) / s_sum - (log_s - log_t),
    )


def tile_mixture(z_NV: Tensor, y_NV: Tensor, log_sums_2N: Tensor, mixture_weight: float) -> Tensor:
    """A tile's part [3, N] of KL(p || m), KL(q || m) and sum p q / m. Leaves the tile as it is.

    Both KLs are in the Bregman form p (lt - lm) - p + m: rounding of the log-sum-exps cancels to
    first order.
    """
    ls_NV, lt_NV = z_NV - log_sums_2N[0][:, None], y_NV - log_sums_2N[1][:, None]
    lm_NV = log_mixture(ls_NV, lt_NV, mixture_weight)
    m_NV = lm_NV.exp()
    of_teacher_N, of_student_N = (
        (log_NV.exp() * (log_NV - lm_NV) + (m_NV - log_NV.exp())).sum(-1)
        for log_NV in (lt_NV, ls_NV)
    )
    return torch.stack([of_teacher_N, of_student_N, (ls_NV + (lt_NV - lm_NV)).exp().sum(-1)])


def tile_forward_kl(z_NV: Tensor, y_NV: Tensor, log_sums_2N: Tensor) -> Tensor:
    """A tile's part [N] of KL(p || q), in float64. Leaves the tile as it is.

    Each term is p (d + exp(-d) - 1) with d = lt - ls. None is negative, and by expm1 it is right
    however small d is, where a difference of cross-entropies, of order 1, is noise of either sign.
    """
    log_s_N1, log_t_N1 = log_sums_2N.double()[:, :, None]
    lt_NV = y_NV.double() - log_t_N1
    d_NV = lt_NV - (z_NV.double() - log_s_N1)
    return (lt_NV.exp() * (d_NV + torch.expm1(-d_NV))).sum(-1)


def tile_gradient(
    z_NV: Tensor,
    y_NV: Tensor | None,
    log_sums_2N: Tensor,
    coefficients_6N: Tensor | None,
    terms: Terms,
    mixture_weight: float,
    scratch: Sequence[Tensor] = (),
) -> Tensor:
    """Write dL/dz over the student's tile and return the tile's part [N] of the KL terms. Clobbers
    the teacher's tile.

    With coefficients (f, r, h, j, d, c) a row, dz = q (c - h ls + r (ls - lt) + j (ls - lm) - d p /
    m) - f p, where c = f - r R - h H - j KL(q || m) + d sum p q / m + ...; None means f = c = 1 and
    nothing else. The returned value is in the Bregman form f (p (lt - ls) - p + q) + r (q (ls - lt)
    - q + p), summed: rounding of A and B cancels to first order, so that it is right where a
    difference of cross-entropies is noise. Divergences from m are not in it.
    """
    d_out, u_out = scratch[:2] or (None, None)
    z_out, y_out = (z_NV, y_NV) if scratch else (None, None)
    ls_NV = torch.sub(z_NV, log_sums_2N[0][:, None], out=z_out)
    if coefficients_6N is None:
        assert y_NV is not None
        lt_NV = torch.sub(y_NV, log_sums_2N[1][:, None], out=y_out)
        d_NV = torch.sub(lt_NV, ls_NV, out=d_out)
        p_NV, q_NV = torch.exp(lt_NV, out=y_out), torch.exp(ls_NV, out=z_out)
        z_NV.copy_(torch.sub(q_NV, p_NV, out=z_out))
        return torch.mul(d_NV, p_NV, out=d_out).sum(-1) + z_NV.sum(-1)
    f, r, h, j, d, c = coefficients_6N[:, :, None]
    extra_NV = -h * ls_NV if terms.entropy else None
    if not terms.teacher:
        q_NV = torch.exp(ls_NV, out=z_out)
        z_NV.copy_(torch.mul(q_NV, c if extra_NV is None else extra_NV.add_(c), out=z_out))
        return torch.zeros_like(log_sums_2N[0])
    assert y_NV is not None
    lt_NV = torch.sub(y_NV, log_sums_2N[1][:, None], out=y_out)
    if terms.mixture:
        lm_NV = log_mixture(ls_NV, lt_NV, mixture_weight)
        gap_NV = j * (ls_NV - lm_NV)
        if terms.skew:
            gap_NV -= d * (lt_NV - lm_NV).exp()
        extra_NV = gap_NV if extra_NV is None else extra_NV + gap_NV
    d_NV = torch.sub(lt_NV, ls_NV, out=d_out)
    p_NV, q_NV = torch.exp(lt_NV, out=y_out), torch.exp(ls_NV, out=z_out)
    value_N = (f - r).squeeze(-1) * torch.sub(q_NV, p_NV, out=u_out).sum(-1)
    fp_NV = torch.mul(p_NV, f, out=y_out)
    value_N += torch.addcmul(fp_NV, q_NV, -r, out=u_out).mul_(d_NV).sum(-1)
    inner_NV = torch.addcmul(c, d_NV, -r, out=d_out)
    if extra_NV is not None:
        inner_NV = inner_NV.add_(extra_NV)
    z_NV.copy_(torch.mul(q_NV, inner_NV, out=z_out).sub_(fp_NV))
    return value_N


def _rows_in_cache(z_NV: Tensor, scratch: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut a tile into slices of rows that fit the scratch buffers; with each, the buffers in its
    shape."""
    num_rows, num_columns = z_NV.shape
    step = min(max(len(scratch[0]) // num_columns, 1), num_rows)
    views = [buffer[: step * num_columns].view(step, num_columns) for buffer in scratch]
    for start in range(0, num_rows, step):
        rest = num_rows - start
        yield slice(start, start + step), views if rest >= step else [view[:rest] for view in views]


def _eager_statistics(z_NV: Tensor, y_NV: Tensor | None, scratch: Sequence[Tensor]) -> Tensor:
    parts = [
        tile_statistics(z_NV[rows], None if y_NV is None else y_NV[rows], views)
        for rows, views in _rows_in_cache(z_NV, scratch)
    ]
    return torch.cat(parts, -1)


def _eager_gradient(
    z_NV, y_NV, log_sums_2N, coefficients_6N, terms, mixture_weight, scratch
) -> Tensor:
    parts = [
        tile_gradient(
            z_NV[rows],
            None if y_NV is None else y_NV[rows],
            log_sums_2N[:, rows],
            None if coefficients_6N is None else coefficients_6N[:, rows],
            terms,
            mixture_weight,
            views,
        )
        for rows, views in _rows_in_cache(z_NV, scratch)
    ]
    return torch.cat(parts)


EAGER = Backend("eager", _eager_statistics, tile_mixture, _eager_gradient, NUM_SCRATCH)


@functools.cache
def compiled_backend() -> Backend:
    """The same functions through `torch.compile`: one fused loop each. Needs a C++ compiler on a
    CPU."""
    functions = (tile_statistics, tile_mixture, tile_gradient)
    return Backend("compiled", *(torch.compile(f, dynamic=True) for f in functions), num_scratch=0)
