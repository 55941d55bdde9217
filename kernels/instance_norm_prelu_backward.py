"""The gradients of y = PReLU(z), z = x̂·weight + bias (+ r), x̂ = (x − mean)·rstd, from dy, x, r, mean and rstd.

With dz = dy·PReLU'(z), and Σ over the S positions of an (n, c):
    dx      = rstd·weight·(dz − (Σdz + x̂·Σdz·x̂)/S)
    dweight = Σₙ Σ dz·x̂,   dbias = Σₙ Σ dz,   dslope = Σₙ Σ_{z ≤ 0} dy·z,   dr = dz
One pass where a row of x and dy fits on chip, split where it does not. No sum is atomic: results are repeatable.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formula import divisible, locate, normalize, parameters, plus, prelu_dslope, prelu_dz, statistics
from .launch import elsewhere, parameters_side_by_side, prepared, side_by_side
from .layout import like, readable
from .plan import COMBINE_WARPS, RELOAD_BLOCK_S, SUM_N_C, SUM_N_N, ceil_div

_RELOAD_BLOCK_S = tl.constexpr(RELOAD_BLOCK_S)


@triton.jit
def tile_terms(x, dy, mean, scale, bias, a, R, base, offset, valid):
    """x − mean, dz and the slope's term of a tile [BLOCK_S, BLOCK_C]; dy is 0 on positions that do not exist."""
    z = plus(normalize(x, mean[None, :], scale[None, :], bias[None, :]), R, base, offset, valid)
    return x - mean[None, :], prelu_dz(dy, z, a[None, :]), prelu_dslope(dy, z)


@triton.jit
def tile_dx(centered, dz, scale, mean_dz, slant):
    """dx of a tile [BLOCK_S, BLOCK_C], with mean_dz = Σdz/S and slant = rstd·Σdz·x̂/S of its rows."""
    return scale[None, :] * (dz - mean_dz[None, :] - centered * slant[None, :])


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S"])
def backward_one_pass(
    DY, X, R, DX, DR, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, N, C, S,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """dx, dr and the three sums of BLOCK_C whole rows; DX, DR or Sums is None where nobody asks for it."""
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    row, c, exists, base, start, step, _ = locate(tl.program_id(0), N, C, S, 1, BLOCK_C, CHANNELS_LAST)
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    valid = (s < S)[:, None] & exists[None, :]
    x = tl.load(X + base + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    dy = tl.load(DY + base + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    mean, rstd = statistics(Statistics, row, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    centered, dz, dslope = tile_terms(x, dy, mean, rstd * weight, bias, a, R, base, offset, valid)
    sum_dz = tl.sum(dz, axis=0)
    sum_dz_centered = tl.sum(dz * centered, axis=0)
    if DR is not None:
        tl.store(DR + base + offset, dz.to(DR.dtype.element_ty), mask=valid)
    rows = tl.cast(N, tl.int64) * C
    if Sums is not None:
        if SLOPE_GRAD:
            tl.store(Sums + 2 * rows + row, tl.sum(dslope, axis=0), mask=exists)
        tl.store(Sums + row, sum_dz, mask=exists)
    if BLOCK_S >= _RELOAD_BLOCK_S:
        rstd = tl.load(Statistics + rows + row, mask=exists, other=0.0)  # [BLOCK_C]
        if Weight is not None:
            weight = tl.load(Weight + c, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    sum_dz_xhat = sum_dz_centered * rstd
    if Sums is not None:
        tl.store(Sums + rows + row, sum_dz_xhat, mask=exists)
    if DX is not None:
        dx = tile_dx(centered, dz, rstd * weight, sum_dz / S, rstd * sum_dz_xhat / S)
        tl.store(DX + base + offset, dx.to(DX.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles"])
def backward_sums(
    DY, X, R, DR, Weight, Bias, Slope, slope, slope_step, Statistics, ChunkSums, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """The three sums of one chunk of BLOCK_C rows, laid out as x would be with `chunks` elements a row; and dr."""
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    row, c, exists, base, start, step, chunk = locate(tl.program_id(0), N, C, S, chunks, BLOCK_C, CHANNELS_LAST)
    mean, rstd = statistics(Statistics, row, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    scale = rstd * weight
    first = tl.cast(chunk, tl.int64) * (tiles * BLOCK_S)
    last = tl.minimum(first + tiles * BLOCK_S, S)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_C], tl.float32)
    sum_dslope = tl.zeros([BLOCK_C], tl.float32)
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    for s0 in range(first, last, BLOCK_S):
        at = base + s0 * step
        valid = (s < last - s0)[:, None] & exists[None, :]
        x = tl.load(X + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        dy = tl.load(DY + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        centered, dz, dslope = tile_terms(x, dy, mean, scale, bias, a, R, at, offset, valid)
        if DR is not None:
            tl.store(DR + at + offset, dz.to(DR.dtype.element_ty), mask=valid)
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_xhat += tl.sum(dz * centered, axis=0) * rstd
        if SLOPE_GRAD:
            sum_dslope += tl.sum(dslope, axis=0)
    _, _, exists, base, start, step, chunk = locate(tl.program_id(0), N, C, chunks, chunks, BLOCK_C, CHANNELS_LAST)
    all_chunks = tl.cast(N, tl.int64) * C * chunks
    here = ChunkSums + base + tl.cast(chunk, tl.int64) * step + start
    tl.store(here, sum_dz, mask=exists)
    tl.store(here + all_chunks, sum_dz_xhat, mask=exists)
    if SLOPE_GRAD:
        tl.store(here + 2 * all_chunks, sum_dslope, mask=exists)


@triton.jit(do_not_specialize=["N", "C", "chunks"])
def backward_combine(
    ChunkSums, Sums, N, C, chunks,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One of the three sums (the grid's second axis) of BLOCK_C rows over their chunks, in a fixed order."""
    row, _, exists, base, start, step, _ = locate(tl.program_id(0), N, C, chunks, 1, BLOCK_C, CHANNELS_LAST)
    rows = tl.cast(N, tl.int64) * C
    which = tl.program_id(1)
    ChunkSums += which * rows * chunks
    total = tl.zeros([BLOCK_C], tl.float32)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        valid = (k < chunks)[:, None] & exists[None, :]
        offset = base + start[None, :] + k[:, None] * tl.cast(step, tl.int64)
        part = tl.load(ChunkSums + offset, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_C]
        total += tl.sum(part, axis=0)
    tl.store(Sums + which * rows + row, total, mask=exists)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles"])
def backward_apply(
    DY, X, DX, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx of one chunk of BLOCK_C rows, last chunk first: what was read last is still in L2."""
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, c, exists, base, start, step, chunk = locate(block, N, C, S, chunks, BLOCK_C, CHANNELS_LAST)
    mean, rstd = statistics(Statistics, row, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    mean_dz = tl.load(Sums + row, mask=exists, other=0.0) / S  # [BLOCK_C]
    slant = rstd * tl.load(Sums + tl.cast(N, tl.int64) * C + row, mask=exists, other=0.0) / S  # [BLOCK_C]
    scale = rstd * weight
    first = tl.cast(chunk, tl.int64) * (tiles * BLOCK_S)
    last = tl.minimum(first + tiles * BLOCK_S, S)
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    for s0 in range(first, last, BLOCK_S):
        at = base + s0 * step
        valid = (s < last - s0)[:, None] & exists[None, :]
        x = tl.load(X + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        dy = tl.load(DY + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        centered, dz, _ = tile_terms(x, dy, mean, scale, bias, a, None, at, offset, valid)
        dx = tile_dx(centered, dz, scale, mean_dz, slant)
        tl.store(DX + at + offset, dx.to(DX.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N", "C"])
def backward_sum_n(Sums, Total, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One of the three sums (the grid's second axis) of BLOCK_C channels over n, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    Sums += which * tl.cast(N, tl.int64) * C
    total = tl.zeros([BLOCK_C], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        offset = n.to(tl.int64)[:, None] * C + c[None, :]
        part = tl.load(Sums + offset, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)  # [BLOCK_N, BLOCK_C]
        total += tl.sum(part, axis=0)
    tl.store(Total + which * C + c, total.to(Total.dtype.element_ty), mask=c < C)


def instance_norm_prelu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    statistics: Tensor,
    needs: Sequence[bool] = (True, True, True, True, True),
    in_place: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch the backward of `instance_norm_prelu_forward`, whose x and statistics it takes.

    dy of y's shape; it, the parameters and the statistics of any strides. residual: the forward's. needs: which of dx,
    dweight, dbias, dslope and, with a residual, dr to compute; the others come back None.
    in_place: dx may be written over dy, where their dtypes are one. dx and dr are in x's layout and dtype, the others
    in their parameter's shape and dtype.
    """
    device = x.get_device()
    if elsewhere(device):
        with torch.cuda.device(device):
            return instance_norm_prelu_backward(dy, x, weight, bias, slope, statistics, needs, in_place, residual)
    stride = x.stride()
    launch = prepared(x.shape, stride, x.itemsize, device, True, residual is not None)
    if launch is None:
        return instance_norm_prelu_backward(dy, readable(x), weight, bias, slope, statistics, needs, in_place, residual)
    N, C, S, channels_last, plan, tile = launch
    if dy.stride() != stride:
        dy = like(dy, x)
    weight, bias, pointer, number, slope_step = parameters_side_by_side(weight, bias, slope)
    statistics = side_by_side(statistics)
    wanted = (bias if needs[2] else None, weight if needs[1] else None, pointer if needs[3] else None)
    need_dslope = wanted[2] is not None
    need_sums = need_dslope or wanted[0] is not None or wanted[1] is not None
    # Written over dy, if at all: every program loads all it needs of it ahead of its first store, and no other's part.
    dx = None if not needs[0] else dy if in_place and dy.dtype == x.dtype else torch.empty_like(x)
    dr = None
    if residual is not None:
        residual = like(residual, x)
        if needs[4]:
            dr = torch.empty_like(x)
        elif not plan.one_pass:
            dr = dx  # dz waits there for the launch that turns it into dx
    if dx is None and dr is None and not need_sums:
        return (None,) * (4 if residual is None else 5)
    kinds = 3 if need_dslope else 2
    sums = None
    if need_sums or not plan.one_pass:
        sums = torch.empty(kinds, N * C, dtype=torch.float32, device=x.device)
    if plan.one_pass:
        backward_one_pass[(plan.grid,)](
            dy, x, residual, dx, dr, weight, bias, pointer, number, slope_step, statistics, sums, N, C, S,
            SLOPE_GRAD=need_dslope, **tile,
        )  # fmt: skip
    else:
        chunk_sums = torch.empty(kinds, N * C * plan.chunks, dtype=torch.float32, device=x.device)
        backward_sums[(plan.grid,)](
            dy, x, residual, dr, weight, bias, pointer, number, slope_step, statistics, chunk_sums, N, C, S,
            plan.chunks, plan.tiles, SLOPE_GRAD=need_dslope, **tile,
        )  # fmt: skip
        backward_combine[(plan.combine_grid, kinds)](
            chunk_sums, sums, N, C, plan.chunks,
            BLOCK_K=plan.COMBINE_K, BLOCK_C=plan.COMBINE_C, CHANNELS_LAST=channels_last,
            num_warps=COMBINE_WARPS,
        )  # fmt: skip
        if dx is not None:
            if dr is not None:  # it is dz, which a slope of 1 leaves as it is
                dy, pointer, number, slope_step = dr, None, 1.0, 0
            backward_apply[(plan.grid,)](
                dy, x, dx, weight, bias, pointer, number, slope_step, statistics, sums, N, C, S,
                plan.chunks, plan.tiles, **tile,
            )  # fmt: skip
    dbias = dweight = dslope = None
    if sums is not None and need_sums:
        dbias, dweight, dslope = _parameter_gradients(sums, N, C, wanted)
    if residual is None:
        return dx, dweight, dbias, dslope
    return dx, dweight, dbias, dslope, dr if needs[4] else None


def _parameter_gradients(sums: Tensor, N: int, C: int, wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums (kinds, N·C) over n, and over c for a slope that the channels share, as gradients of `wanted`."""
    dtypes = {parameter.dtype for parameter in wanted if parameter is not None and parameter.numel() == C}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    kinds, total = sums.shape[0], sums
    shared_alone = all(parameter is None or parameter.numel() != C for parameter in wanted)  # summed over n and c below
    if not shared_alone and (N > 1 or dtype != torch.float32):
        total = torch.empty(kinds, C, dtype=dtype, device=sums.device)
        backward_sum_n[(ceil_div(C, SUM_N_C), kinds)](sums, total, N, C, BLOCK_N=SUM_N_N, BLOCK_C=SUM_N_C, num_warps=4)
    found: list[Tensor | None] = []
    for parameter, part in zip_longest(wanted, total.unbind()):
        if parameter is None:
            part = None
        elif parameter.numel() != C:
            part = sums[-1].sum(0, True).to(parameter.dtype)  # of the sums in float32: rounded once
        elif parameter.dtype != part.dtype:
            part = part.to(parameter.dtype)
        found.append(part)
    return found
