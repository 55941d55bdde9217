"""y = PReLU((x − mean)·rstd·weight + bias + r), with mean and rstd of each (n, c) over its S positions; r is optional.

One pass where a row fits on chip: x is read once, y written once. Where it does not, partial statistics of each chunk
and a second reading of x: in one launch (slab), two, or, where a third one combines the partial statistics, three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formula import (
    combined,
    last_tile,
    locate,
    normalize,
    parameters,
    parts_tile,
    plus,
    prelu,
    reciprocal_deviation,
    statistics,
    stream_apply,
    stream_statistics,
    tile,
    tile_statistics,
)
from .launch import elsewhere, parameters_side_by_side, prepared, side_by_side
from .layout import like, readable


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S"])
def forward_one_pass(
    X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, N, C, S, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Statistics, normalisation and activation of BLOCK_C whole rows, held on chip."""
    first, lane, c, exists, at, start, step, size = locate(
        tl.program_id(0), 0, N, C, S, BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    offset, valid = tile(at, start, step, size, exists, BLOCK_S)
    x = tl.load(X + offset, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    inverse = 1.0 / tl.cast(S, tl.float32)
    mean, m2 = tile_statistics(x, valid, inverse)
    rstd = reciprocal_deviation(m2, inverse, eps)
    z = plus(normalize(x, mean[None, :], (rstd * weight)[None, :], bias[None, :]), R, offset, valid)
    tl.store(Y + offset, prelu(z, a[None, :]).to(Y.dtype.element_ty), mask=valid)
    tl.store(Statistics + first + lane, mean, mask=exists)
    tl.store(Statistics + tl.cast(N, tl.int64) * C + first + lane, rstd, mask=exists)


@triton.jit(do_not_specialize=["N", "C", "S", "chunks", "tiles"])
def forward_statistics(
    X, Parts, N, C, S, chunks, tiles,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of one chunk of BLOCK_C rows."""
    chunk = tl.program_id(1)
    first, lane, _, exists, at, start, step, size = locate(
        tl.program_id(0), chunk, N, C, S, tiles * BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    mean, m2 = stream_statistics(X, at, start, step, size, exists, BLOCK_S, BLOCK_C)
    offset, there, all_parts = parts_tile(first, lane, exists, chunk, N, C, chunks, 1, CHANNELS_LAST)
    tl.store(Parts + offset, mean[None, :], mask=there)
    tl.store(Parts + all_parts + offset, m2[None, :], mask=there)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles", "parts", "part_tiles", "backwards"])
def forward_combine_apply(
    X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, Parts, N, C, S, chunks, tiles, parts, part_tiles,
    backwards, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y of one chunk of BLOCK_C rows; backwards, the last chunk comes first: what was read last is still in L2.

    The rows' statistics are combined from those of `parts` chunks of `part_tiles` tiles and written, or, without
    parts, read. Without tiles, that is all.
    """
    block, chunk = tl.program_id(0), tl.program_id(1)
    if backwards:
        block, chunk = tl.num_programs(0) - 1 - block, tl.num_programs(1) - 1 - chunk
    first, lane, c, exists, at, start, step, size = locate(
        block, chunk, N, C, S, tiles * BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST
    )
    tiles, at, size, offset, valid = last_tile(at, start, step, size, exists, BLOCK_S)
    ahead = tl.load(X + offset, mask=valid, other=0.0)  # [BLOCK_S, BLOCK_C], on its way while partials are combined
    weight, bias, a = parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C)
    if parts > 0:
        mean, m2 = combined(
            Parts, first, lane, exists, N, C, S, parts, part_tiles * BLOCK_S, BLOCK_K, BLOCK_C, CHANNELS_LAST, True
        )
        rstd = reciprocal_deviation(m2, 1.0 / tl.cast(S, tl.float32), eps)
        tl.store(Statistics + first + lane, mean, mask=exists & (chunk == 0))
        tl.store(Statistics + tl.cast(N, tl.int64) * C + first + lane, rstd, mask=exists & (chunk == 0))
    else:
        mean, rstd = statistics(Statistics, first, lane, N, C, exists)
    stream_apply(X, R, Y, ahead, at, tiles, start, step, size, exists, mean, rstd * weight, bias, a, BLOCK_S)


@triton.jit(do_not_specialize=["slope_step", "N", "C", "S", "chunks", "tiles", "first", "last"])
def forward_slab(
    X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, Parts, N, C, S, chunks, tiles, first, last, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Both of these, one after the other: in one launch, the first and last, with the second reading from L1 or L2."""
    if first:
        forward_statistics(X, Parts, N, C, S, chunks, tiles, BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST)
    if last:
        tl.debug_barrier()  # all threads see the partial results
        forward_combine_apply(
            X, R, Y, Weight, Bias, Slope, slope, slope_step, Statistics, Parts, N, C, S, chunks, tiles, chunks, tiles,
            0, eps, BLOCK_S, BLOCK_C, VEC, CHANNELS_LAST, BLOCK_K,
        )  # fmt: skip


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
    statistics: those that an earlier launch on the same x returned. y is then bitwise the same, and a split row is read
    once. residual: of x's shape, any strides. Returns y, in x's layout where that is readable, and the statistics
    (2, N·C) in float32: mean and rstd of each (n, c). Parameters and statistics may have any strides.
    """
    device = x.get_device()
    if elsewhere(device):
        with torch.cuda.device(device):
            return instance_norm_prelu_forward(x, weight, bias, slope, eps, dtype, in_place, statistics, residual)
    launch = prepared(x.shape, x.stride(), x.itemsize, device, False, residual is not None)
    if launch is None:
        return instance_norm_prelu_forward(readable(x), weight, bias, slope, eps, dtype, in_place, statistics, residual)
    N, C, S, plan, options, combine_options = launch
    if in_place and (dtype is None or dtype == x.dtype):
        y = x  # every program loads all it needs of it before its first store, and no other's part
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
    given = x, residual, y, weight, bias, pointer, number, slope_step, statistics
    if plan.branch == "one pass":
        forward_one_pass[plan.grid](*given, N, C, S, eps, **options)
        return y, statistics
    chunks, tiles = plan.chunks, plan.tiles
    parts = statistics if known else torch.empty(2 * N * C * chunks, dtype=torch.float32, device=x.device)
    size = N, C, S, chunks, tiles
    apply = forward_combine_apply[plan.grid]
    if known:
        apply(*given, parts, *size, 0, 0, 1, eps, **combine_options)
    elif plan.branch == "slab":
        for first, last in ((1, 1),) if chunks == 1 else ((1, 0), (0, 1)):
            forward_slab[plan.grid](*given, parts, *size, first, last, eps, **combine_options)
    else:
        forward_statistics[plan.grid](x, parts, *size, **options)
        if plan.combines_apart:
            combine = forward_combine_apply[plan.grid[:1]]
            combine(*given, parts, N, C, S, 1, 0, chunks, tiles, 1, eps, **combine_options)
        apply(*given, parts, *size, 0 if plan.combines_apart else chunks, tiles, 1, eps, **combine_options)
    return y, statistics
