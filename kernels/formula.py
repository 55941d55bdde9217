"""The formula, once: small pure `@triton.jit` functions that the kernels of both layouts and both directions share.

A tile is [BLOCK_S, BLOCK_C]: spatial positions by rows, where a row is one (n, c) of x. In memory a row is either
contiguous, or, channels-last, interleaved with the other channels of its n; only `locate` knows which.
"""

import triton
import triton.language as tl


@triton.jit
def locate(
    block,
    N,
    C,
    S,
    chunks,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Where program number `block` works, in a tensor of N·C rows of S elements cut into `chunks` pieces each.

    Returns row = n·C + c, c, whether the row exists, the offset of the block's first row (a scalar, int64) and of each
    row from it (int32, so that a tile costs few registers), the step from one element of a row to the next, and the
    number of the piece. Neighbouring programs are neighbours in memory.
    """
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BLOCK_C)
        chunk = (block // blocks) % chunks
        n = (block // (blocks * chunks)).to(tl.int64)
        c = (block % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = c < C
        row = n * C + c
        base = n * C * S
        start = c
        step = C
    else:
        chunk = block % chunks
        first = (block // chunks).to(tl.int64) * BLOCK_C
        row = first + tl.arange(0, BLOCK_C)
        exists = row < N * tl.cast(C, tl.int64)
        c = ((first % C).to(tl.int32) + tl.arange(0, BLOCK_C)) % C
        base = first * S
        start = tl.arange(0, BLOCK_C) * S
        step = 1
    return row, c, exists, base, start, step, chunk


@triton.jit
def divisible(size, VEC: tl.constexpr):
    """size, which the plan knows to be a multiple of VEC, written so that the compiler knows it too.

    Triton specialises integers on divisibility by 16 only; a row of 24 bf16 is 16-byte aligned all the same.
    """
    return (size // VEC) * VEC


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
def statistics(Statistics, row, N, C, exists):
    """mean and rstd of rows: of all rows the means come first, then the rstd, one tensor for both."""
    mean = tl.load(Statistics + row, mask=exists, other=0.0)  # [BLOCK_C]
    rstd = tl.load(Statistics + tl.cast(N, tl.int64) * C + row, mask=exists, other=0.0)  # [BLOCK_C]
    return mean, rstd


@triton.jit
def corrected(m2, excess):
    """M2 without the excess that an inexact mean gave it.

    Exactly 0 where all but rounding is excess, as in a constant row of any value; infinite where M2 overflowed.
    """
    rest = m2 - excess
    return tl.where(m2 == float("inf"), m2, tl.where(rest <= m2 * 2**-17, 0.0, rest))


@triton.jit
def tile_statistics(x, valid, count):
    """Mean and M2 = Σ(x − mean)² of `count` elements down each column of a tile; x is 0 where not valid.

    The mean is corrected once by Σ(x − mean)/count, so that it is the nearest float32 even at mean 1e4; what the
    correction e changes in M2 is exactly −count·e².
    """
    mean = tl.sum(x, axis=0) / count
    d = tl.where(valid, x - mean[None, :], 0.0)
    e = tl.sum(d, axis=0) / count
    return mean + e, corrected(tl.sum(d * d, axis=0), count * e * e)


@triton.jit
def combined_statistics(mean, m2, count, total):
    """Statistics of the union, down each column, of parts with `count` elements each (Chan's formula for many)."""
    center = tl.sum(mean * count, axis=0) / total
    d = mean - center[None, :]
    e = tl.sum(d * count, axis=0) / total
    return center + e, corrected(tl.sum(tl.where(count > 0.0, m2 + d * d * count, 0.0), axis=0), total * e * e)


@triton.jit
def merge(mean, m2, count, mean_b, m2_b, count_b):
    """Chan's formula for two: (mean, m2) of `count` elements and of `count_b` more, count + count_b > 0."""
    total = count + count_b
    delta = mean_b - mean
    share = count_b / total
    return mean + delta * share, m2 + m2_b + delta * (delta * (count * share)), total


@triton.jit
def reciprocal_deviation(m2, S, eps):
    """rstd = 1/√(M2/S + eps), rounded to nearest at each step; 0 where variance and eps are both 0, as in torch."""
    variance = m2 / S + eps
    return tl.div_rn(1.0, tl.sqrt_rn(tl.where(variance == 0.0, float("inf"), variance)))


@triton.jit
def normalize(x, mean, scale, bias):
    """z = (x − mean)·scale + bias with scale = rstd·weight: the one place where it is written."""
    return (x - mean) * scale + bias


@triton.jit
def plus(z, R, base, offset, valid):
    """z + r, with r laid out as x; z where there is no R."""
    if R is not None:
        z += tl.load(R + base + offset, mask=valid, other=0.0).to(tl.float32)
    return z


@triton.jit
def prelu(z, slope):
    """z where z > 0, slope·z elsewhere: at exactly 0, and at NaN, the slope branch, as torch does."""
    return tl.where(z > 0.0, z, slope * z)


@triton.jit
def prelu_dz(dy, z, slope):
    """∂PReLU/∂z · dy."""
    return tl.where(z > 0.0, dy, slope * dy)


@triton.jit
def prelu_dslope(dy, z):
    """∂PReLU/∂slope · dy."""
    return tl.where(z > 0.0, 0.0, z * dy)
