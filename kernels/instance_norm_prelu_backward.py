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

from .formula import (
    STAGES,
    combined,
    last_tile,
    locate,
    normalize,
    parameters,
    parts_tile,
    plus,
    statistics,
    sum_2,
    tile,
)
from .launch import elsewhere, parameters_side_by_side, prepared, side_by_side
from .layout import like, readable
from .plan import SUM_N_C, SUM_N_N, ceil_div


@triton.jit
def tile_terms(x, dy, R, offset, valid, mean, scale, bias, a):
    """x − mean, dz and the slope's term of a tile [BLOCK_S, BLOCK_C]; dy is 0 on positions that do not exist."""
    x = x.to(tl.float32)
    dy = dy.to(tl.float32)
    z = plus(normalize(x, mean[None, :], scale[None, :], bias[None, :]), R, offset, valid)
    return x - mean[None, :], tl.where(z > 0.0, dy, a[None, :] * dy), tl.where(z > 0.0, 0.0, z * dy)


@triton.jit
def load_2(X, DY, offset, valid):
    return tl.load(X + offset, mask=valid, other=0.0), tl.load(DY + offset, mask=valid, other=0.0)


@triton.jit
def tile_dx(centered, dz, scale, mean_dz, slant):
    """dx of a tile [BLOCK_S, BLOCK_C], with mean_dz = Σdz/S and slant = rstd·Σdz·x̂/S of its rows."""
    return scale[None, :] * (dz - mean_dz[None, :] - centered * slant[None, :])


@triton.jit
def halved(terms):
    """Each term of the upper half of a tile plus one of the lower half: the same thread's, so it costs no exchange."""
    return tl.sum(tl.reshape(terms, [2, terms.shape[0] // 2, terms.shape[1]]), axis=0)


@triton.jit
def stream_sums(
    DY, X, R, DR, at, start, step, size, exists, mean, scale, bias, a,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """The mean of dz, Σdz·(x − mean) and the slope's sum of `size` positions of each row, from `at` on; and dr.

    Elements of the tile have their own, which meet once, after the loop; terms past the end are 0. Of dz the mean, so
    that dz that are all alike cost no accuracy.
    """
    mean_dz = tl.zeros([BLOCK_S // 2, BLOCK_C], tl.float32)
    sum_dz_centered = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_dslope = tl.zeros([BLOCK_S // 2, BLOCK_C], tl.float32)
    tiles = tl.cdiv(size, BLOCK_S)
    for t in tl.range(0, tiles, num_stages=STAGES):
        offset, valid = tile(at, start, step, size - t * BLOCK_S, exists, BLOCK_S)
        x, dy = load_2(X, DY, offset, valid)
        centered, dz, dslope = tile_terms(x, dy, R, offset, valid, mean, scale, bias, a)
        at += BLOCK_S * step
        if DR is not None:
            tl.store(DR + offset, dz.to(DR.dtype.element_ty), mask=valid)
        mean_dz += (halved(dz) - mean_dz) * (1.0 / (t + 1.0))
        sum_dz_centered += dz * centered
        if SLOPE_GRAD:
            sum_dslope += halved(dslope)
    mean_dz = tl.sum(mean_dz, axis=0) * (tiles.to(tl.float32) / size.to(tl.float32))
    return mean_dz, tl.sum(sum_dz_centered, axis=0), tl.sum(sum_dslope, axis=0)


@triton.jit
def stream_dx(
    DY, X, DX, x, dy, at, tiles, start, step, size, exists, mean, scale, bias, a, mean_dz, slant, BLOCK_S: tl.constexpr
):  # fmt: skip
    """dx of `tiles` tiles of each row, in the order and the way of `stream_apply`; x and dy: the tile at `at`."""
    for t in range(tiles):
        offset, valid = tile(at, start, step, size, exists, BLOCK_S)
        at -= BLOCK_S * step
        size += BLOCK_S
        next_offset, next_valid = tile(at, start, step, size, exists & (t + 1 < tiles), BLOCK_S)
        next_x, next_dy = load_2(X, DY, next_offset, next_valid)
        centered, dz, _ = tile_terms(x, dy, None, offset, valid, mean, scale, bias, a)
        tl.store(DX + offset, tile_dx(centered, dz, scale, mean_dz, slant).to(DX.dtype.element_ty), mask=valid)
        x, dy = next_x, next_dy


@triton.jit
def store_sums(Sums, first, lane, N, C, exists, sum_dz, sum_dz_xhat, sum_dslope, SLOPE_GRAD: tl.constexpr):
    """The three sums of rows, one after the other."""
    if Sums is not None:
        rows = tl.cast(N, tl.int64) * C
        tl.store(Sums + first + lane, sum_dz, mask=exists)
        tl.store(Sums + rows + first + lane, sum_dz_xhat, mask=exists)
        if SLOPE_GRAD:
            tl.store(Sums + 2 * rows + first + lane, sum_dslope, mask=exists)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S"])
def backward_one_pass(
    DY, X, R, DX, DR, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, N, C, S,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """dx, dr and the three sums of BLOCK_C whole rows; DX, DR or Sums is None if it is not needed."""
    first, lane, c, exists, at, start, step, size = locate(
        tl.program_id(0), 0, N, C, S, BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    mean, rstd = statistics(Statistics, first, lane, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    offset, valid = tile(at, start, step, size, exists, BLOCK_S)
    x, dy = load_2(X, DY, offset, valid)
    centered, dz, dslope = tile_terms(x, dy, R, offset, valid, mean, rstd * weight, bias, a)
    inverse = 1.0 / tl.cast(S, tl.float32)
    sum_dslope = tl.zeros([BLOCK_C], tl.float32)
    if SLOPE_GRAD:
        sum_dz, sum_dslope = sum_2(dz, dslope)
    else:
        sum_dz = tl.sum(dz, axis=0)
    if DR is not None:
        tl.store(DR + offset, dz.to(DR.dtype.element_ty), mask=valid)
    # The mean of dz is corrected once, as that of x is: behind a channel without variance 1/√eps multiplies its error.
    mean_dz = sum_dz * inverse
    e, sum_dz_centered = sum_2(tl.where(valid, dz - mean_dz[None, :], 0.0), dz * centered)
    mean_dz += e * inverse
    store_sums(Sums, first, lane, N, C, exists, mean_dz * size, sum_dz_centered * rstd, sum_dslope, SLOPE_GRAD)
    if DX is not None:
        dx = tile_dx(centered, dz, rstd * weight, mean_dz, rstd * rstd * sum_dz_centered * inverse)
        tl.store(DX + offset, dx.to(DX.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles"])
def backward_sums(
    DY, X, R, DR, Weight, Bias, Slope, slope, slope_step, Statistics, Parts, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """The mean of dz and the other two sums of one chunk of BLOCK_C rows; and dr."""
    chunk = tl.program_id(1)
    first, lane, c, exists, at, start, step, size = locate(
        tl.program_id(0), chunk, N, C, S, tiles * BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    mean, rstd = statistics(Statistics, first, lane, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    mean_dz, sum_dz_centered, sum_dslope = stream_sums(
        DY, X, R, DR, at, start, step, size, exists, mean, rstd * weight, bias, a, BLOCK_S, BLOCK_C, SLOPE_GRAD
    )
    offset, there, all_parts = parts_tile(first, lane, exists, chunk, N, C, chunks, 1, CHANNELS_LAST)
    tl.store(Parts + offset, mean_dz[None, :], mask=there)
    tl.store(Parts + all_parts + offset, (sum_dz_centered * rstd)[None, :], mask=there)
    if SLOPE_GRAD:
        tl.store(Parts + 2 * all_parts + offset, sum_dslope[None, :], mask=there)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles", "parts", "part_tiles", "backwards"])
def backward_combine_apply(
    DY, X, DX, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, Parts, N, C, S,
    chunks, tiles, parts, part_tiles, backwards,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr, SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """dx of one chunk of BLOCK_C rows from combined sums, in the ways of `forward_combine_apply`.

    The mean of dz, which no rounding of its sum shall spoil, is written after the sums.
    """
    block, chunk = tl.program_id(0), tl.program_id(1)
    if backwards:
        block, chunk = tl.num_programs(0) - 1 - block, tl.num_programs(1) - 1 - chunk
    first, lane, c, exists, at, start, step, size = locate(
        block, chunk, N, C, S, tiles * BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    tiles, at, size, first_offset, valid = last_tile(at, start, step, size, exists, BLOCK_S)
    x, dy = load_2(X, DY, first_offset, valid)  # on their way while the partial sums are combined
    mean, rstd = statistics(Statistics, first, lane, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    rows = tl.cast(N, tl.int64) * C
    MeanDz = Sums + (3 if SLOPE_GRAD else 2) * rows
    if parts > 0:
        mean_dz, sum_dz_xhat = combined(
            Parts, first, lane, exists, N, C, S, parts, part_tiles * BLOCK_S, BLOCK_K, BLOCK_C, CHANNELS_LAST, False
        )
        if chunk == 0:
            sum_dslope = tl.zeros([BLOCK_C], tl.float32)
            if SLOPE_GRAD:
                for k0 in range(0, parts, BLOCK_K):
                    offset, there, all_parts = parts_tile(first, lane, exists, k0, N, C, parts, BLOCK_K, CHANNELS_LAST)
                    sum_dslope += tl.sum(tl.load(Parts + 2 * all_parts + offset, mask=there, other=0.0), axis=0)
            store_sums(Sums, first, lane, N, C, exists, mean_dz * S, sum_dz_xhat, sum_dslope, SLOPE_GRAD)
            tl.store(MeanDz + first + lane, mean_dz, mask=exists)
    else:
        mean_dz = tl.load(MeanDz + first + lane, mask=exists, other=0.0)  # [BLOCK_C]
        sum_dz_xhat = tl.load(Sums + rows + first + lane, mask=exists, other=0.0)  # [BLOCK_C]
    slant = rstd * sum_dz_xhat / S
    stream_dx(
        DY, X, DX, x, dy, at, tiles, start, step, size, exists, mean, rstd * weight, bias, a, mean_dz, slant, BLOCK_S
    )


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles", "apply_tiles", "first", "last"])
def backward_slab(
    DY, X, DX, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, Parts, N, C, S,
    chunks, tiles, apply_tiles, first, last,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr, SLOPE_GRAD: tl.constexpr,
):  # fmt: skip
    """Both of these, one after the other, as in `forward_slab`; without a residual, and maybe without dx."""
    if first:
        backward_sums(
            DY, X, None, None, Weight, Bias, Slope, slope, slope_step, Statistics, Parts, N, C, S, chunks, tiles,
            BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST, SLOPE_GRAD,
        )  # fmt: skip
    if last:
        tl.debug_barrier()  # all threads see the partial results
        backward_combine_apply(
            DY, X, DX, Weight, Bias, Slope, slope, slope_step, Statistics, Sums, Parts, N, C, S,
            chunks, apply_tiles, chunks, tiles, 0, BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST, BLOCK_K, SLOPE_GRAD,
        )  # fmt: skip


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
    launch = prepared(x.shape, x.stride(), x.itemsize, device, True, residual is not None)
    if launch is None:
        return instance_norm_prelu_backward(dy, readable(x), weight, bias, slope, statistics, needs, in_place, residual)
    N, C, S, plan, options, combine_options = launch
    one_pass = plan.branch == "one pass"
    dy = like(dy, x)
    weight, bias, pointer, number, slope_step = parameters_side_by_side(weight, bias, slope)
    statistics = side_by_side(statistics)
    wanted = (bias if needs[2] else None, weight if needs[1] else None, pointer if needs[3] else None)
    need_dslope = wanted[2] is not None
    need_sums = need_dslope or wanted[0] is not None or wanted[1] is not None
    # Written over dy, if at all: every program loads all it needs of it before its first store, and no other's part.
    dx = None if not needs[0] else dy if in_place and dy.dtype == x.dtype else torch.empty_like(x)
    dr = None
    if residual is not None:
        residual = like(residual, x)
        if needs[4]:
            dr = torch.empty_like(x)
        elif not one_pass:
            dr = dx  # dz waits there for the launch that turns it into dx
    if dx is None and dr is None and not need_sums:
        return (None,) * (4 if residual is None else 5)
    kinds = 3 if need_dslope else 2
    sums = None
    if need_sums or not one_pass:  # and the mean of dz
        sums = torch.empty(kinds + (not one_pass), N * C, dtype=torch.float32, device=x.device)
    given = weight, bias, pointer, number, slope_step, statistics
    grads = {"SLOPE_GRAD": need_dslope}
    if one_pass:
        backward_one_pass[plan.grid](dy, x, residual, dx, dr, *given, sums, N, C, S, **grads, **options)
    else:
        chunks, tiles = plan.chunks, plan.tiles
        size = N, C, S, chunks, tiles
        parts = torch.empty(kinds * N * C * chunks, dtype=torch.float32, device=x.device)
        out = x if dx is None else dx  # not written without tiles
        if plan.branch == "slab":
            applied = 0 if dx is None else tiles
            for first, second in ((1, 1),) if chunks == 1 else ((1, 0), (0, 1)):
                backward_slab[plan.grid](
                    dy, x, out, *given, sums, parts, *size, applied, first, second, **grads, **combine_options
                )
        else:
            backward_sums[plan.grid](dy, x, residual, dr, *given, parts, *size, **grads, **options)
            if dr is not None:  # it is dz, which a slope of 1 leaves as it is
                dy, given = dr, (weight, bias, None, 1.0, 0, statistics)
            last = dy, x, out, *given, sums, parts
            if dx is None or plan.combines_apart:
                combine = backward_combine_apply[plan.grid[:1]]
                combine(*last, N, C, S, 1, 0, chunks, tiles, 1, **grads, **combine_options)
            if dx is not None:
                combining = 0 if plan.combines_apart else chunks
                backward_combine_apply[plan.grid](*last, *size, combining, tiles, 1, **grads, **combine_options)
    dbias = dweight = dslope = None
    if sums is not None and need_sums:
        dbias, dweight, dslope = _parameter_gradients(sums[:kinds], N, C, wanted)
    if residual is None:
        return dx, dweight, dbias, dslope
    return dx, dweight, dbias, dslope, dr if needs[4] else None


def _parameter_gradients(sums: Tensor, N: int, C: int, wanted: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums (kinds, N·C) over n, and over c for a slope that the channels share, as gradients of `wanted`."""
    dtypes = {parameter.dtype for parameter in wanted if parameter is not None and parameter.numel() == C}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    kinds, total = sums.shape[0], sums
    if dtypes and (N > 1 or dtype != torch.float32):  # a shared slope alone is summed over n and c below
        total = torch.empty(kinds, C, dtype=dtype, device=sums.device)
        backward_sum_n[(ceil_div(C, SUM_N_C), kinds)](sums, total, N, C, BLOCK_N=SUM_N_N, BLOCK_C=SUM_N_C, num_warps=4)
    found: list[Tensor | None] = []
    for parameter, gradient in zip_longest(wanted, total.unbind()):
        if parameter is None:
            gradient = None
        elif parameter.numel() != C:
            gradient = sums[-1].sum(0, True).to(parameter.dtype)  # of the sums in float32: rounded once
        elif parameter.dtype != gradient.dtype:
            gradient = gradient.to(parameter.dtype)
        found.append(gradient)
    return found
