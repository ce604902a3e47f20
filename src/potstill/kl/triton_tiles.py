"""The tile functions as Triton kernels, for GPUs: one program a row, one pass over a tile.

Matrix products stay with the vendor's library; these kernels do everything else without a
temporary. They compute in float32 on float32 tiles, so 16-bit inputs never reach them. Shapes and
notation are those of `potstill.kl.tiles`. With TRITON_INTERPRET=1 in the environment before the
first import they run on a CPU, slowly, which is how they are tested.
"""

# The bodies of kernels are Triton, which only looks like Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

import functools
import math
import os

import triton
import triton.language as tl
from torch import Tensor

from potstill.kl.tiles import STATE_SHAPE, Backend, Terms

# Elements of a block and warps of a program: 32 elements a thread. Above 128, registers spill.
BLOCK, NUM_WARPS = 4096, 4


@triton.jit
def _statistics_kernel(
    z_ptr, y_ptr, state_ptr, num_rows, num_columns, HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lowest = -1e30
    zmax, s_sum, s_z, s_y = lowest, 0.0, 0.0, 0.0
    ymax, t_sum, t_y, t_z = lowest, 0.0, 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        is_there = offsets < num_columns
        z = tl.load(z_ptr + row * num_columns + offsets, mask=is_there, other=lowest)
        ztop = tl.maximum(zmax, tl.max(z, axis=0))
        a = tl.where(is_there, z - ztop, 0.0)
        e = tl.where(is_there, tl.exp(z - ztop), 0.0)
        zshift = zmax - ztop
        zscale = tl.exp(zshift)
        if HAS_TEACHER:
            y = tl.load(y_ptr + row * num_columns + offsets, mask=is_there, other=lowest)
            ytop = tl.maximum(ymax, tl.max(y, axis=0))
            b = tl.where(is_there, y - ytop, 0.0)
            f = tl.where(is_there, tl.exp(y - ytop), 0.0)
            yshift = ymax - ytop
            yscale = tl.exp(yshift)
            s_y = zscale * (s_y + yshift * s_sum) + tl.sum(e * b, axis=0)
            t_y = yscale * (t_y + yshift * t_sum) + tl.sum(f * b, axis=0)
            t_z = yscale * (t_z + zshift * t_sum) + tl.sum(f * a, axis=0)
            t_sum = yscale * t_sum + tl.sum(f, axis=0)
            ymax = ytop
        s_z = zscale * (s_z + zshift * s_sum) + tl.sum(e * a, axis=0)
        s_sum = zscale * s_sum + tl.sum(e, axis=0)
        zmax = ztop
    out = state_ptr + row
    tl.store(out, zmax)
    tl.store(out + num_rows, s_sum)
    tl.store(out + 2 * num_rows, s_z)
    tl.store(out + 3 * num_rows, s_y)
    tl.store(out + 4 * num_rows, ymax)
    tl.store(out + 5 * num_rows, t_sum)
    tl.store(out + 6 * num_rows, t_y)
    tl.store(out + 7 * num_rows, t_z)


@triton.jit
def _log_mixture(ls, lt, log_b, log_rest):
    """log(b p + (1 - b) q) without an exponential that could underflow."""
    of_teacher, of_student = lt + log_b, ls + log_rest
    return tl.maximum(of_teacher, of_student) + tl.log(1 + tl.exp(-tl.abs(of_teacher - of_student)))


@triton.jit
def _mixture_kernel(
    z_ptr, y_ptr, sums_ptr, parts_ptr, num_rows, num_columns, log_b, log_rest, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    student_sum, teacher_sum = tl.load(sums_ptr + row), tl.load(sums_ptr + num_rows + row)
    # Before torch 2.15, torch.compile hands numbers over as float64.
    log_b, log_rest = tl.cast(log_b, tl.float32), tl.cast(log_rest, tl.float32)
    of_teacher, of_student, overlap = 0.0, 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        is_there = offsets < num_columns
        ls = tl.load(z_ptr + row * num_columns + offsets, mask=is_there, other=-1e30) - student_sum
        lt = tl.load(y_ptr + row * num_columns + offsets, mask=is_there, other=-1e30) - teacher_sum
        lm = _log_mixture(ls, lt, log_b, log_rest)
        p, q, m = tl.exp(lt), tl.exp(ls), tl.exp(lm)
        of_teacher += tl.sum(tl.where(is_there, p * (lt - lm) + (m - p), 0.0), axis=0)
        of_student += tl.sum(tl.where(is_there, q * (ls - lm) + (m - q), 0.0), axis=0)
        overlap += tl.sum(tl.where(is_there, tl.exp(ls + (lt - lm)), 0.0), axis=0)
    tl.store(parts_ptr + row, of_teacher)
    tl.store(parts_ptr + num_rows + row, of_student)
    tl.store(parts_ptr + 2 * num_rows + row, overlap)


# Kernels take pointers and sizes one by one.
@triton.jit
def _gradient_kernel(  # noqa: PLR0913
    z_ptr,
    y_ptr,
    sums_ptr,
    coefficients_ptr,
    value_ptr,
    num_rows,
    num_columns,
    log_b,
    log_rest,
    HAS_TEACHER: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SKEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    log_b, log_rest = tl.cast(log_b, tl.float32), tl.cast(log_rest, tl.float32)
    student_sum, teacher_sum = tl.load(sums_ptr + row), tl.load(sums_ptr + num_rows + row)
    f = tl.load(coefficients_ptr + row)
    r = tl.load(coefficients_ptr + num_rows + row)
    h = tl.load(coefficients_ptr + 2 * num_rows + row)
    j = tl.load(coefficients_ptr + 3 * num_rows + row)
    skew = tl.load(coefficients_ptr + 4 * num_rows + row)
    c = tl.load(coefficients_ptr + 5 * num_rows + row)
    value = 0.0
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        is_there = offsets < num_columns
        ls = tl.load(z_ptr + row * num_columns + offsets, mask=is_there, other=-1e30) - student_sum
        q = tl.exp(ls)
        inner = c - h * ls
        if HAS_TEACHER:
            lt = (
                tl.load(y_ptr + row * num_columns + offsets, mask=is_there, other=-1e30)
                - teacher_sum
            )
            p = tl.exp(lt)
            d = lt - ls
            value += tl.sum(
                tl.where(is_there, (f * p - r * q) * d + (f - r) * (q - p), 0.0), axis=0
            )
            inner -= r * d
            if HAS_MIXTURE:
                lm = _log_mixture(ls, lt, log_b, log_rest)
                inner += j * (ls - lm)
                if HAS_SKEW:
                    inner -= skew * tl.exp(lt - lm)
            g = q * inner - f * p
        else:
            g = q * inner
        tl.store(z_ptr + row * num_columns + offsets, g, mask=is_there)
    tl.store(value_ptr + row, value)


def _block(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(num_columns))


def triton_statistics(z_NV: Tensor, y_NV: Tensor | None, scratch=()) -> Tensor:
    """As `tiles.tile_statistics`."""
    num_rows, num_columns = z_NV.shape
    state = z_NV.new_empty(*STATE_SHAPE, num_rows)
    y = z_NV if y_NV is None else y_NV
    _statistics_kernel[(num_rows,)](
        z_NV,
        y,
        state,
        num_rows,
        num_columns,
        HAS_TEACHER=y_NV is not None,
        BLOCK=_block(num_columns),
        num_warps=NUM_WARPS,
    )
    return state


def triton_mixture(
    z_NV: Tensor, y_NV: Tensor, log_sums_2N: Tensor, mixture_weight: float
) -> Tensor:
    """As `tiles.tile_mixture`."""
    num_rows, num_columns = z_NV.shape
    parts, sums = z_NV.new_empty(3, num_rows), log_sums_2N.contiguous()
    logs = math.log(mixture_weight), math.log1p(-mixture_weight)
    _mixture_kernel[(num_rows,)](
        z_NV,
        y_NV,
        sums,
        parts,
        num_rows,
        num_columns,
        *logs,
        BLOCK=_block(num_columns),
        num_warps=NUM_WARPS,
    )
    return parts


def triton_gradient(
    z_NV: Tensor,
    y_NV: Tensor | None,
    log_sums_2N: Tensor,
    coefficients_6N: Tensor | None,
    terms: Terms,
    mixture_weight: float,
    scratch=(),
) -> Tensor:
    """As `tiles.tile_gradient`."""
    num_rows, num_columns = z_NV.shape
    if coefficients_6N is None:
        coefficients_6N = z_NV.new_tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])[:, None].expand(
            6, num_rows
        )
    value = z_NV.new_empty(num_rows)
    _gradient_kernel[(num_rows,)](
        z_NV,
        z_NV if y_NV is None else y_NV,
        log_sums_2N.contiguous(),
        coefficients_6N.contiguous(),
        value,
        num_rows,
        num_columns,
        math.log(mixture_weight),
        math.log1p(-mixture_weight),
        HAS_TEACHER=terms.teacher,
        HAS_MIXTURE=terms.mixture,
        HAS_SKEW=terms.skew,
        BLOCK=_block(num_columns),
        num_warps=NUM_WARPS,
    )
    return value


@functools.cache
def triton_backend(device_type: str) -> Backend:
    """The kernels as a backend. Raises ValueError where they cannot run."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend is "triton" and the tensors are on {device_type!r}; Triton needs a GPU '
            "(or, slowly and for tests alone, TRITON_INTERPRET=1): choose eager or compiled"
        )
    return Backend("triton", triton_statistics, triton_mixture, triton_gradient, 0)
