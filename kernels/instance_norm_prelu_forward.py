"""y = PReLU((x − mean)·rstd·weight + bias + r), with mean and rstd of each (n, c) over its S positions; r is optional.

One pass where a row fits on chip: x is read once, y written once. Split where it does not: partial statistics of each
chunk, one tiny launch that combines them, and a second reading of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formula import (
    combined_statistics,
    divisible,
    locate,
    merge,
    normalize,
    parameters,
    plus,
    prelu,
    reciprocal_deviation,
    statistics,
    tile_statistics,
)
from .launch import elsewhere, parameters_side_by_side, prepared, side_by_side
from .layout import like, readable
from .plan import COMBINE_WARPS, ceil_div


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S"])
def forward_one_pass(
    X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, N, C, S, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Statistics, normalisation and activation of BLOCK_C whole rows."""
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    row, c, exists, base, start, step, _ = locate(tl.program_id(0), N, C, S, 1, BLOCK_C, CHANNELS_LAST)
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    valid = (s < S)[:, None] & exists[None, :]
    x = tl.load(X + base + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    mean, m2 = tile_statistics(x, valid, S)
    rstd = reciprocal_deviation(m2, S, eps)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    z = plus(normalize(x, mean[None, :], (rstd * weight)[None, :], bias[None, :]), R, base, offset, valid)
    tl.store(Y + base + offset, prelu(z, a[None, :]).to(Y.dtype.element_ty), mask=valid)
    tl.store(Statistics + row, mean, mask=exists)
    tl.store(Statistics + tl.cast(N, tl.int64) * C + row, rstd, mask=exists)


@triton.jit(do_not_specialize=["N", "C", "S", "chunks", "tiles"])
def forward_statistics(
    X, Center, Mean, M2, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of one chunk of BLOCK_C rows, laid out as x would be with `chunks` elements a row.

    The mean is kept as the chunk's first element and the distance from it, so that merging rounds small numbers.
    """
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    _, _, exists, base, start, step, chunk = locate(tl.program_id(0), N, C, S, chunks, BLOCK_C, CHANNELS_LAST)
    first = tl.cast(chunk, tl.int64) * (tiles * BLOCK_S)
    last = tl.minimum(first + tiles * BLOCK_S, S)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    at = base + first * step
    center = tl.load(X + at + start, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    for s0 in range(first, last, BLOCK_S):
        at = base + s0 * step
        valid = (s < last - s0)[:, None] & exists[None, :]
        x = tl.load(X + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        size = tl.minimum(last - s0, BLOCK_S).to(tl.float32)
        tile_mean, tile_m2 = tile_statistics(tl.where(valid, x - center[None, :], 0.0), valid, size)
        mean, m2, count = merge(mean, m2, count, tile_mean, tile_m2, size)
    _, _, exists, base, start, step, chunk = locate(tl.program_id(0), N, C, chunks, chunks, BLOCK_C, CHANNELS_LAST)
    at = base + tl.cast(chunk, tl.int64) * step
    tl.store(Center + at + start, center, mask=exists)
    tl.store(Mean + at + start, mean, mask=exists)
    tl.store(M2 + at + start, m2, mask=exists)


@triton.jit(do_not_specialize=["N", "C", "S", "chunks", "chunk_size"])
def forward_combine(
    ChunkCenter, ChunkMean, ChunkM2, Statistics, N, C, S, chunks, chunk_size, eps,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """mean and rstd of BLOCK_C rows from their chunks' statistics, in a fixed order."""
    row, _, exists, base, start, step, _ = locate(tl.program_id(0), N, C, chunks, 1, BLOCK_C, CHANNELS_LAST)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    center = tl.load(ChunkCenter + base + start, mask=exists, other=0.0)  # [BLOCK_C]
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offset = base + start[None, :] + k[:, None] * tl.cast(step, tl.int64)
        valid = (k < chunks)[:, None] & exists[None, :]
        rest = S - k.to(tl.int64) * chunk_size
        size = tl.maximum(tl.minimum(rest, chunk_size), 0).to(tl.float32)  # [BLOCK_K]
        total = tl.sum(size, axis=0)
        chunk_center = tl.load(ChunkCenter + offset, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_C]
        chunk_mean = tl.load(ChunkMean + offset, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_C]
        chunk_m2 = tl.load(ChunkM2 + offset, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_C]
        tile_mean, tile_m2 = combined_statistics(
            chunk_center - center[None, :] + chunk_mean, chunk_m2, size[:, None], total
        )
        mean, m2, count = merge(mean, m2, count, tile_mean, tile_m2, total)
    tl.store(Statistics + row, center + mean, mask=exists)
    tl.store(Statistics + tl.cast(N, tl.int64) * C + row, reciprocal_deviation(m2, S, eps), mask=exists)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles"])
def forward_apply(
    X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y of one chunk of BLOCK_C rows, last chunk first: what was read last is still in L2."""
    if CHANNELS_LAST:
        C = divisible(C, VEC)
    else:
        S = divisible(S, VEC)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, c, exists, base, start, step, chunk = locate(block, N, C, S, chunks, BLOCK_C, CHANNELS_LAST)
    mean, rstd = statistics(Statistics, row, N, C, exists)
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    scale = rstd * weight
    first = tl.cast(chunk, tl.int64) * (tiles * BLOCK_S)
    last = tl.minimum(first + tiles * BLOCK_S, S)
    s = tl.arange(0, BLOCK_S)
    offset = start[None, :] + s[:, None] * step
    for s0 in range(first, last, BLOCK_S):
        at = base + s0 * step
        valid = (s < last - s0)[:, None] & exists[None, :]
        x = tl.load(X + at + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
        z = plus(normalize(x, mean[None, :], scale[None, :], bias[None, :]), R, at, offset, valid)
        tl.store(Y + at + offset, prelu(z, a[None, :]).to(Y.dtype.element_ty), mask=valid)


def instance_norm_prelu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | float,
    eps: float,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch y = PReLU(norm(x)), or PReLU(norm(x) + residual).

    x (N, C, *spatial) of float32, bfloat16 or float16, S ≥ 2 positions, N, C ≥ 1; weight, bias (C,) or None; slope
    (C,), (1,) or a number; dtype of y, x's where None. in_place: y may be written over x, where their dtypes are one.
    statistics: what an earlier launch on the same x returned; y is then the same to the bit, and a row that is split is
    read once. residual: of x's shape, any strides. Returns y, in x's layout where that is readable, and the statistics
    (2, N·C) in float32: mean and rstd of each (n, c). Parameters and statistics may have any strides.
    """
    device = x.get_device()
    if elsewhere(device):
        with torch.cuda.device(device):
            return instance_norm_prelu_forward(x, weight, bias, slope, eps, dtype, in_place, statistics, residual)
    launch = prepared(x.shape, x.stride(), x.itemsize, device, False, residual is not None)
    if launch is None:
        return instance_norm_prelu_forward(readable(x), weight, bias, slope, eps, dtype, in_place, statistics, residual)
    N, C, S, channels_last, plan, tile = launch
    if in_place and (dtype is None or dtype == x.dtype):
        y = x  # every program loads all it needs of it ahead of its first store, and no other's part
    else:
        y = torch.empty_like(x) if dtype is None else torch.empty_like(x, dtype=dtype)
    if residual is not None:
        residual = like(residual, x)
    eps = float(eps)  # numpy's float32 is none of the arguments that triton takes
    known = statistics is not None
    if statistics is None:
        statistics = torch.empty(2, N * C, dtype=torch.float32, device=x.device)
    else:
        statistics = side_by_side(statistics)
    weight, bias, pointer, number, slope_step = parameters_side_by_side(weight, bias, slope)
    if plan.one_pass:
        forward_one_pass[(plan.grid,)](
            x, residual, y, weight, bias, pointer, number, slope_step, statistics, N, C, S, eps, **tile
        )
        return y, statistics
    if not known:
        # Each 16-byte aligned, whatever N, so that one compiled variant serves.
        parts = torch.empty((3, 4 * ceil_div(N * C * plan.chunks, 4)), dtype=torch.float32, device=x.device).unbind()
        forward_statistics[(plan.grid,)](x, *parts, N, C, S, plan.chunks, plan.tiles, **tile)
        forward_combine[(plan.combine_grid,)](
            *parts, statistics, N, C, S, plan.chunks, plan.tiles * plan.BLOCK_S, eps,
            BLOCK_K=plan.COMBINE_K, BLOCK_C=plan.COMBINE_C, CHANNELS_LAST=channels_last,
            num_warps=COMBINE_WARPS,
        )  # fmt: skip
    forward_apply[(plan.grid,)](
        x, residual, y, weight, bias, pointer, number, slope_step, statistics, N, C, S, plan.chunks, plan.tiles, **tile
    )
    return y, statistics
