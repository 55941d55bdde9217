"""The formula, once: small pure `@triton.jit` functions that the kernels of both layouts and both directions share.

A tile is [BLOCK_S, BLOCK_C]: spatial positions by rows, where a row is one (n, c) of x. In memory a row is either
contiguous, or, channels-last, interleaved with the other channels of its n; only `spread` and `locate` know which.
"""

import triton
import triton.language as tl

STAGES = tl.constexpr(3)  # tiles of the first reading that are on their way or worked on at a time (simulated)


@triton.jit
def spread(first, lane, C, length, CHANNELS_LAST: tl.constexpr):
    """Offsets of row `first`, and of rows first + lane from there, and a row's step, at `length` elements a row.

    x is such a tensor, with S elements a row; the partial results of one kind are another, with an element a chunk.
    """
    if CHANNELS_LAST:
        return first * length, lane, C
    return first * length, lane * length, 1


@triton.jit
def locate(block, chunk, N, C, S, chunk_size, BLOCK_C: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a program works, in a tensor of N·C rows of S elements cut into chunks of `chunk_size`.

    Its rows are first + lane, and an offset is a scalar of 64 bits plus a tensor of 32, which costs few registers.
    Returns first (scalar), lane [BLOCK_C], c, whether the row exists, the offset of the program's first element
    (scalar) and of each row's first from there, the step from one element of a row to the next, and the chunk's size.

    The contiguous axis is written as a multiple of VEC, so that the compiler knows what the plan knows: Triton looks at
    divisibility by 16 only, but rows of 24 bf16 are 16-byte aligned all the same.
    """
    if CHANNELS_LAST:
        C = (C // VEC) * VEC
        blocks = tl.cdiv(C, BLOCK_C)
        first = (block // blocks).to(tl.int64) * C
        lane = (block % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        c = lane
        exists = c < C
    else:
        S = (S // VEC) * VEC
        first = block.to(tl.int64) * BLOCK_C
        lane = tl.arange(0, BLOCK_C)
        c = ((first % C).to(tl.int32) + lane) % C
        exists = first + lane < N * tl.cast(C, tl.int64)
    at, start, step = spread(first, lane, C, S, CHANNELS_LAST)
    before = tl.cast(chunk, tl.int64) * chunk_size
    return first, lane, c, exists, at + before * step, start, step, tl.minimum(chunk_size, S - before).to(tl.int32)


@triton.jit
def parts_tile(first, lane, exists, k0, N, C, chunks, BLOCK_K: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of partial results [BLOCK_K, BLOCK_C] of one kind from chunk k0 on, which exist, and how many are all."""
    at, start, step = spread(first, lane, C, chunks, CHANNELS_LAST)
    offset, there = tile(at + tl.cast(k0, tl.int64) * step, start, step, chunks - k0, exists, BLOCK_K)
    return offset, there, N * tl.cast(C, tl.int64) * chunks


@triton.jit
def parameters(Weight, Bias, Slope, slope, slope_step, c, exists, BLOCK_C: tl.constexpr):
    """weight, bias and slope of channels c in float32: (1, 0) where there is no such parameter, a number for slope."""
    if Weight is None:
        weight = tl.full([BLOCK_C], 1.0, tl.float32)
    else:
        weight = tl.load(Weight + c, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    if Bias is None:
        bias = tl.full([BLOCK_C], 0.0, tl.float32)
    else:
        bias = tl.load(Bias + c, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    if Slope is None:
        a = tl.full([BLOCK_C], 0.0, tl.float32) + slope
    else:
        a = tl.load(Slope + c * slope_step, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    return weight, bias, a


@triton.jit
def statistics(Statistics, first, lane, N, C, exists):
    """mean and rstd of rows: of all rows the means come first, then the rstd, one tensor for both."""
    mean = tl.load(Statistics + first + lane, mask=exists, other=0.0)  # [BLOCK_C]
    rstd = tl.load(Statistics + tl.cast(N, tl.int64) * C + first + lane, mask=exists, other=0.0)  # [BLOCK_C]
    return mean, rstd


@triton.jit
def add_2(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_2(a, b):
    """Two sums down each column of a tile, for one exchange between the threads instead of two."""
    return tl.reduce((a, b), 0, add_2)


@triton.jit
def corrected(m2, excess):
    """M2 without the excess that an inexact mean gave it.

    Exactly 0 where all but rounding is excess, as in a constant row of any value; infinite where M2 overflowed.
    """
    rest = m2 - excess
    return tl.where(m2 == float("inf"), m2, tl.where(rest <= m2 * 2**-17, 0.0, rest))


@triton.jit
def tile_statistics(x, valid, inverse):
    """Mean and M2 = Σ(x − mean)² down each column of a tile, with inverse = 1/count; x is 0 where not valid.

    The mean is corrected once by Σ(x − mean)/count, so that it is the nearest float32 even at mean 1e4; what the
    correction e changes in M2 is exactly −count·e².
    """
    mean = tl.sum(x, axis=0) * inverse
    d = tl.where(valid, x - mean[None, :], 0.0)
    e, m2 = sum_2(d, d * d)
    return mean + e * inverse, corrected(m2, e * (e * inverse))


@triton.jit
def union(mean, second, count, total, M2: tl.constexpr):
    """Mean, corrected once as above, and M2 (by Chan's formula for many) or else sum, of parts of `count` elements."""
    inverse = 1.0 / total
    center = tl.sum(mean * count, axis=0) * inverse
    d = tl.where(count > 0.0, mean - center[None, :], 0.0)
    if M2:
        second += d * d * count
    e, second = sum_2(d * count, second)
    return center + e * inverse, corrected(second, e * (e * inverse)) if M2 else second


@triton.jit
def combined(
    Parts, first, lane, exists, N, C, S, chunks, chunk_size,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """`union` of all chunks of the rows, in a fixed order, from their partial results: of all the means come first."""
    mean = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    last_size = S - (chunks - 1) * tl.cast(chunk_size, tl.int64)
    for k0 in range(0, chunks, BLOCK_K):
        offset, there, all_parts = parts_tile(first, lane, exists, k0, N, C, chunks, BLOCK_K, CHANNELS_LAST)
        means = tl.load(Parts + offset, mask=there, other=0.0)  # [BLOCK_K, BLOCK_C]
        seconds = tl.load(Parts + all_parts + offset, mask=there, other=0.0)  # [BLOCK_K, BLOCK_C]
        k = k0 + tl.arange(0, BLOCK_K)
        size = tl.where(k < chunks - 1, chunk_size, tl.where(k < chunks, last_size, 0)).to(tl.float32)  # [BLOCK_K]
        before = tl.cast(k0, tl.int64) * chunk_size
        more = tl.minimum(S - before, tl.cast(chunk_size, tl.int64) * BLOCK_K).to(tl.float32)
        mean_k, second_k = union(means, seconds, size[:, None], more, M2)
        count += more
        share = more / count
        delta = mean_k - mean
        if M2:
            second_k += delta * (delta * ((count - more) * share))
        mean += delta * share
        second += second_k
    return mean, second


@triton.jit
def tile(at, start, step, size, exists, BLOCK_S: tl.constexpr):
    """Offsets of the tile that begins at `at`, and which of them are of the `size` positions left and of rows."""
    s = tl.arange(0, BLOCK_S)
    return at + (start[None, :] + s[:, None] * step), (s < size)[:, None] & exists[None, :]


@triton.jit
def last_tile(at, start, step, size, exists, BLOCK_S: tl.constexpr):
    """Of `size` positions from `at` on: the tiles, where the last one begins, its positions, and its `tile`."""
    tiles = tl.cdiv(size, BLOCK_S)
    at += (tiles - 1).to(tl.int64) * BLOCK_S * step
    size -= (tiles - 1) * BLOCK_S
    offset, valid = tile(at, start, step, size, exists & (tiles > 0), BLOCK_S)
    return tiles, at, size, offset, valid


@triton.jit
def stream_statistics(X, at, start, step, size, exists, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and M2 of `size` positions of each row, from the offset `at` on.

    Every element of the tile has its own, by Welford's formula and relative to the first element of its row here, so
    that neither an offset of all elements nor one outlier costs accuracy. They meet once, after the loop.
    """
    s = tl.arange(0, BLOCK_S)
    center = tl.load(X + at + start, mask=exists, other=0.0).to(tl.float32)  # [BLOCK_C]
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for t in tl.range(0, tl.cdiv(size, BLOCK_S), num_stages=STAGES):
        offset, valid = tile(at, start, step, size - t * BLOCK_S, exists, BLOCK_S)
        x = tl.load(X + offset, mask=valid, other=0.0).to(tl.float32)
        at += BLOCK_S * step
        share = tl.where(s < size - t * BLOCK_S, 1.0 / (t + 1.0), 0.0)[:, None]  # past the end nothing changes
        d = (x - center[None, :]) - mean
        mean += d * share
        m2 += d * (d * (share * t))
    count = ((size + (BLOCK_S - 1) - s) // BLOCK_S).to(tl.float32)[:, None]
    mean, m2 = union(mean, m2, count, size.to(tl.float32), True)
    return center + mean, m2


@triton.jit
def stream_apply(X, R, Y, ahead, at, tiles, start, step, size, exists, mean, scale, bias, a, BLOCK_S: tl.constexpr):
    """y of `tiles` tiles of each row, the last one first: what was read last is still in a cache.

    ahead: the tile at `at`, of `size` positions. The next is loaded into registers meanwhile: through shared memory,
    as num_stages does it, stores would need another layout.
    """
    for t in range(tiles):
        x = ahead.to(tl.float32)
        offset, valid = tile(at, start, step, size, exists, BLOCK_S)
        at -= BLOCK_S * step
        size += BLOCK_S
        offset_2, valid_2 = tile(at, start, step, size, exists & (t + 1 < tiles), BLOCK_S)
        ahead = tl.load(X + offset_2, mask=valid_2, other=0.0)
        z = plus(normalize(x, mean[None, :], scale[None, :], bias[None, :]), R, offset, valid)
        tl.store(Y + offset, prelu(z, a[None, :]).to(Y.dtype.element_ty), mask=valid)


@triton.jit
def reciprocal_deviation(m2, inverse, eps):
    """rstd = 1/√(M2·inverse + eps), an estimate and a Newton step; 0 where that is 0 (or subnormal), as in torch."""
    variance = m2 * inverse + eps
    estimate = tl.rsqrt(variance)
    refined = estimate + (0.5 * estimate) * (1.0 - (variance * estimate) * estimate)
    return tl.where(variance < 2.0**-126, 0.0, tl.where(variance < float("inf"), refined, estimate))


@triton.jit
def normalize(x, mean, scale, bias):
    """z = (x − mean)·scale + bias with scale = rstd·weight: the one place where it is written."""
    return (x - mean) * scale + bias


@triton.jit
def plus(z, R, offset, valid):
    """z + r, with r laid out as x; z where there is no R."""
    if R is not None:
        z += tl.load(R + offset, mask=valid, other=0.0).to(tl.float32)
    return z


@triton.jit
def prelu(z, slope):
    """z where z > 0, slope·z elsewhere: at exactly 0, and at NaN, the slope branch, as torch does."""
    return tl.where(z > 0.0, z, slope * z)
