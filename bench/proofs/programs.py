"""The different kinds of programs in a launch, so that the audit counts the bytes of only one program of each kind."""

from __future__ import annotations

import numpy as np

from fastenc.kernels.plan import SECTOR_BYTES, blocks, ceil_div

FLOAT_BYTES = 4  # statistics, sums, partials and usually parameters are float32


def kinds(
    N: int,
    C: int,
    S: int,
    itemsize: int,
    channels_last: bool,
    BLOCK_C: int,
    chunks: int = 1,
    chunk_size: int | None = None,
    combining: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One program number for each kind of programs that move the same, and the number of programs of each kind.

    Each program works on BLOCK_C rows and one chunk of a tensor x (N, C, S). They are numbered chunk by chunk.

    Args:
        chunks, chunk_size: the number of chunks that a row is split into, and the positions of each.
        combining: the programs of the first chunks alone, as in the launch that combines partial results.
    """
    across = blocks(N, C, BLOCK_C, channels_last)
    chunk, p = np.divmod(np.arange(across * chunks), across)
    if channels_last:
        slices = ceil_div(C, BLOCK_C)
        c = p % slices * BLOCK_C
        row, rows = p // slices * C + c, np.minimum(BLOCK_C, C - c)  # row: the first, n·C + c
    else:
        row = p * BLOCK_C
        c, rows = row % C, np.minimum(BLOCK_C, N * C - row)
    chunk_size = S if chunk_size is None else chunk_size
    s = chunk * chunk_size
    first = (row // C * S + s) * C + c if channels_last else row * S + s
    traits = [rows, np.minimum(chunk_size, S - s), chunk == 0, first * itemsize % SECTOR_BYTES]
    if chunks > 1:  # where the partial results of the first row are
        parts = ((row // C * chunks + each) * C + c if channels_last else row * chunks + each for each in (0, chunk))
        traits += [part * FLOAT_BYTES % SECTOR_BYTES for part in parts]
    if rows.max() > 1:
        traits += [at * FLOAT_BYTES % SECTOR_BYTES for at in (row, c)]
        traits.append(np.minimum(rows, C - c))  # channels up to the end of the sample
    table = np.stack(traits)[:, chunk == 0] if combining else np.stack(traits)
    _, numbers, counts = np.unique(table, axis=1, return_index=True, return_counts=True)
    return numbers, counts
