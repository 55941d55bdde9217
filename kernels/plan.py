"""Launch plans: pure arithmetic from shapes to block sizes, warps and grid. The launchers obey.

Block sizes depend on C, S, the element size and the layout but never on N, so that another batch size compiles
nothing; N and the number of SMs decide only run-time integers (how many programs, how many chunks a row).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, isqrt

VECTOR_BYTES = 16  # the widest load or store of a thread
SECTOR_BYTES = 32  # the unit in which memory moves

# (elements of a tile, most warps) of the one-pass kernels by (channels_last, backward): the largest that compile for
# sm_80, sm_90 and sm_100 without spilling.
ONE_PASS = {
    (False, False): (32768, 32),
    (False, True): (8192, 16),
    (True, False): (16384, 16),
    (True, True): (16384, 16),
}

# With a residual, which is one tensor more on chip.
ONE_PASS_RESIDUAL = {
    (False, False): (16384, 16),
    (False, True): (8192, 16),
    (True, False): (16384, 16),
    (True, True): (16384, 16),
}

# (elements of a tile, warps) of the kernels that stream x, by (slab, backward).
STREAM = {(False, False): (4096, 4), (False, True): (2048, 4), (True, False): (4096, 8), (True, True): (4096, 8)}
SLAB_POSITIONS = {True: 8192, False: 32768}
SLICE_BYTES = 64
SLAB_OVER, SLAB_UNDER, SLAB_PROGRAMS = 9, 4, 1
STAGES = 3

# Rows of at most this many positions share one tile height: the deep ends of all volumes compile the same variants.
SHORTEST_ROW = 8

# From this many positions on, the one-pass backward reads rstd and weight again (from L1) after its sums: waiting in
# registers, they made the widest tiles spill. Below it, eight more bytes a row would show in the traffic.
RELOAD_BLOCK_S = 512

# Contiguous one-pass tiles are widened to this many elements: with fewer than four short rows to a program, their
# statistics would move mostly empty sectors. Channels-last tiles stay as narrow as whole sectors, and a 16-byte access
# for each lane of a warp, allow: the most programs, two to each of 132 SMs from about 4,000 rows (bfloat16) on.
SHORT_ROWS_TILE = 2048
ELEMENTS_PER_THREAD = 32

# Programs per SM of a split launch.
PROGRAMS_PER_SM = 4

# A chunk's fixed cost is up to 72 bytes a row (partials written and read, parameters loaded): (bytes of x, least bytes
# of a row's chunk) keep it under the excess that each size class allows over the ideal (0.02, 0.13, 0.5 of x).
CHUNK_BYTES = ((8_000_000, 1536), (1_000_000, 256), (0, 128))
# A contiguous row's partials and parameters are single floats, each a sector: about 480 bytes instead of 72.
CONTIGUOUS_CHUNK_FACTOR = 6

# Where apply combines the partials itself, every program of a row reads them all: 8 bytes a chunk. Of x's bytes that
# may be this share, below these many bytes of x and above.
OWN_COMBINE_BYTES, OWN_COMBINE = 16_000_000, (0.15, 0.01)

# Partials of a kind that a program combines at a time.
COMBINE_TILE = 1024
# The tile of the launch that sums over n.
SUM_N_N, SUM_N_C = 16, 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How one direction of the op is launched on x of N·C rows of S elements."""

    branch: str
    BLOCK_S: int
    BLOCK_C: int
    VEC: int
    num_warps: int
    chunks: int
    tiles: int
    grid: int
    COMBINE_K: int
    combines_apart: bool

    @property
    def one_pass(self) -> bool:
        return self.branch == "one pass"


def power_of_2(n: int) -> int:
    """The least power of two ≥ n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def blocks(N: int, C: int, BLOCK_C: int, channels_last: bool) -> int:
    """Programs needed to cover all rows: blocks of channels within an n, or of rows across all n."""
    return N * ceil_div(C, BLOCK_C) if channels_last else ceil_div(N * C, BLOCK_C)


def least_width(C: int, itemsize: int, channels_last: bool) -> int:
    """The narrowest BLOCK_C that moves whole sectors: a slice of channels, or, where C breaks sectors, all of them."""
    if not channels_last:
        return 1
    whole = power_of_2(C)
    sector = SECTOR_BYTES // itemsize
    return min(whole, sector) if C % sector == 0 or sector > C else whole


def make_plan(
    N: int, C: int, S: int, itemsize: int, channels_last: bool, sms: int, backward: bool, residual: bool = False
) -> Plan:
    """The plan for x (N, C, S) of `itemsize`-byte elements on a GPU with `sms` multiprocessors.

    Raises ValueError when a size is not positive: an empty grid must never be launched.
    """
    if min(N, C, S, itemsize, sms) < 1:
        raise ValueError(f"a plan needs positive sizes, got {N=}, {C=}, {S=}, {itemsize=}, {sms=}")
    VEC = gcd(C if channels_last else S, VECTOR_BYTES // itemsize)
    narrow = 1 if VEC * itemsize == VECTOR_BYTES else 2
    least = least_width(C, itemsize, channels_last)
    rows = max(SHORTEST_ROW, power_of_2(S))
    most, most_warps = (ONE_PASS_RESIDUAL if residual else ONE_PASS)[channels_last, backward]
    if rows * least <= most:
        if channels_last:
            BLOCK_C = max(least, min(power_of_2(C), 32 * VECTOR_BYTES // itemsize // rows))
        else:
            BLOCK_C = max(1, SHORT_ROWS_TILE // rows)
        elements = 16 if backward and not channels_last else 32
        num_warps = min(most_warps, max(1, rows * BLOCK_C // (32 * elements)))
        return Plan("one pass", rows, BLOCK_C, VEC, num_warps, 1, 1, blocks(N, C, BLOCK_C, channels_last), 1, False)
    if S <= SLAB_POSITIONS[channels_last] and least * itemsize <= SECTOR_BYTES and not (backward and residual):
        tile, num_warps = STREAM[True, backward]
        num_warps *= narrow
        BLOCK_S = tile // least
        across = blocks(N, C, least, channels_last)
        tiles, chunks = ceil_div(S, BLOCK_S), 1
        if across * SLAB_OVER < sms * SLAB_UNDER:
            tiles = ceil_div(tiles, min(tiles, max(1, SLAB_PROGRAMS * sms // across)))
            chunks = ceil_div(S, tiles * BLOCK_S)
        return Plan(
            "slab", BLOCK_S, least, VEC, num_warps, chunks, tiles, across * chunks, COMBINE_TILE // least, False
        )
    tile, num_warps = STREAM[False, backward]
    num_warps *= narrow
    BLOCK_C = max(least, min(power_of_2(C), SLICE_BYTES // itemsize)) if channels_last else 1
    BLOCK_S = max(1, tile // BLOCK_C)
    across = blocks(N, C, BLOCK_C, channels_last)
    volume = N * C * S * itemsize
    chunk_bytes = next(least_bytes for size, least_bytes in CHUNK_BYTES if volume >= size)
    chunk_bytes *= 1 if channels_last else CONTIGUOUS_CHUNK_FACTOR
    most = max(1, S // max(BLOCK_S, chunk_bytes // itemsize))
    chunks = min(most, max(1, sms * PROGRAMS_PER_SM // across))
    share = OWN_COMBINE[volume >= OWN_COMBINE_BYTES]
    own = max(1, isqrt(int(share * S * itemsize / 8)))
    if volume < OWN_COMBINE_BYTES:
        chunks = min(chunks, own)
    tiles = ceil_div(ceil_div(S, chunks), BLOCK_S)
    chunks = ceil_div(S, tiles * BLOCK_S)
    return Plan(
        "split", BLOCK_S, BLOCK_C, VEC, num_warps, chunks, tiles, across * chunks,
        max(1, COMBINE_TILE // BLOCK_C), chunks > own,
    )  # fmt: skip
