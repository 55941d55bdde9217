"""Launch plans: pure arithmetic from shapes to block sizes, warps and grid. The launchers obey.

The rule, for x of N·C rows of S elements:
1. *one pass*, where the narrowest slice of channels that moves whole sectors (or one contiguous row) is at most a tile
   of ONE_PASS: one launch holds it on chip and reads x once.
2. *slab*, where such a slice is a sector wide and has at most SLAB_POSITIONS positions: a program streams it twice, the
   second time from L1 or L2. Too few slices to keep a GPU busy are cut into chunks, in two launches. Not backward
   with a residual: dz has to wait in memory.
3. *split*: slices of SLICE_BYTES in chunks. One launch streams x for partial results, another streams it again, which
   combines the partial results of its rows where PARTIALS allows; else a launch between the two does.

Block sizes and compiled kernels depend on C, S, the element size and the layout but never on N: another batch size
compiles nothing. N and the number of SMs decide how many programs, chunks and launches. "Simulated" constants are from
a simulation of sm_90 machine code and were never measured; `fastenc bench tune` compares them on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, isqrt
from typing import Literal

VECTOR_BYTES = 16  # the widest load or store of a thread
SECTOR_BYTES = 32  # the unit in which memory moves

# (elements of a tile, most warps, elements of a thread) of the one-pass kernels by (channels_last, backward): the
# largest that compile for sm_80, sm_90 and sm_100 without spilling. With a residual one tensor more is on chip.
# Threads with half the elements reduce twice as often (simulated), but some with 32 spill.
ONE_PASS = {
    (False, False): (32768, 32, 32), (False, True): (8192, 16, 16),
    (True, False): (16384, 16, 32), (True, True): (8192, 16, 32),
}  # fmt: skip
ONE_PASS_RESIDUAL = {**ONE_PASS, (False, False): (16384, 16, 16)}
SHORTEST_ROW = 8  # rows up to here share one tile height: the deep ends of all volumes compile the same variants
# Contiguous one-pass tiles are widened to this many elements, or the statistics of a few short rows would move mostly
# empty sectors. Channels-last tiles are one 16-byte access for each lane of a warp, if no sector breaks.
SHORT_ROWS_TILE = 2048

# Channels side by side of a thread, forward in one pass: with 8 it reduces twice as often (simulated).
REDUCED_VECTOR = 4

# (elements of a tile, warps) of the kernels that stream x, by backward: four programs of 4 warps fit on an SM
# (simulated). Twice the warps where fewer than 16 bytes lie side by side, and for float32 slabs: they would spill.
STREAM = {False: (4096, 4), True: (2048, 4)}

# Positions of a slab by channels_last; its programs per SM in two launches; the fewest chunks worth two (simulated).
SLAB_POSITIONS = {True: 8192, False: 32768}
SLAB_PROGRAMS_PER_SM, SLAB_CHUNKS = 2, 3

# Width of a split slice: twice the width needs twice the chunks (simulated). Programs per SM of a split launch: those
# that fit at a time.
SLICE_BYTES = 32
PROGRAMS_PER_SM = 4

# What partial results may cost: (from so many bytes of x on, least bytes of a row's chunk, share of x). A chunk costs a
# row up to 72 bytes: partials written and read, parameters loaded. Where apply combines the partials, each program of a
# row reads all of them besides, 8 bytes a chunk: at most that share. Together they keep to the traffic's ceilings.
PARTIALS = ((16_000_000, 1536, 0.01), (8_000_000, 1536, 0.15), (1_000_000, 384, 0.2), (0, 128, 0.3))
# A contiguous row's partials and parameters are single floats, each a sector: about 480 bytes instead of 72.
CONTIGUOUS_CHUNK_FACTOR = 6

# Partials of a kind that a program combines at a time: more take registers from the tile that is on its way meanwhile
# (simulated). With fewer, a row's partials would lie in one warp, whose lanes may then round its sum differently.
COMBINE_TILE = 512
# The tile of the launch that sums over n.
SUM_N_N, SUM_N_C = 16, 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How one direction of the op is launched on x of N·C rows of S elements.

    BLOCK_S, BLOCK_C, num_warps: the tile [positions, rows] of a program, and its warps. VEC: elements by which the
    contiguous axis is known divisible. chunks: pieces a row is cut into. tiles: tiles of a piece. grid: of each launch
    that streams x, programs across the rows and chunks. COMBINE_K: chunks combined at a time. combines_apart: a launch
    of its own does that.
    """

    branch: Literal["one pass", "slab", "split"]
    BLOCK_S: int
    BLOCK_C: int
    VEC: int
    num_warps: int
    chunks: int
    tiles: int
    grid: tuple[int, int]
    COMBINE_K: int
    combines_apart: bool = False


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
    least = least_width(C, itemsize, channels_last)
    rows = max(SHORTEST_ROW, power_of_2(S))
    most, most_warps, per_thread = (ONE_PASS_RESIDUAL if residual else ONE_PASS)[channels_last, backward]
    if rows * least <= most:
        widest = 32 * VECTOR_BYTES // itemsize if channels_last else SHORT_ROWS_TILE
        BLOCK_C = max(least, min(power_of_2(C) if channels_last else widest, widest // rows))
        warps = min(most_warps, max(1, rows * BLOCK_C // (32 * per_thread)))
        VEC = min(VEC, REDUCED_VECTOR) if channels_last and not backward else VEC
        grid = blocks(N, C, BLOCK_C, channels_last), 1
        return Plan("one pass", rows, BLOCK_C, VEC, warps, 1, 1, grid, 1)
    slab = SLAB_POSITIONS[channels_last] >= S and least * itemsize <= SECTOR_BYTES and not (backward and residual)
    tile, num_warps = STREAM[backward]
    if VEC * itemsize < VECTOR_BYTES or (slab and itemsize > 2):
        num_warps *= 2
    BLOCK_C = max(least, min(power_of_2(C), SLICE_BYTES // itemsize)) if channels_last and not slab else least
    BLOCK_S = max(2, tile // BLOCK_C)
    across = blocks(N, C, BLOCK_C, channels_last)
    volume = N * C * S * itemsize
    chunk_bytes, share = next((least, share) for size, least, share in PARTIALS if volume >= size)
    own = max(1, isqrt(int(share * S * itemsize / 8)))
    if slab:
        chunks = min(SLAB_PROGRAMS_PER_SM * sms // across, own)
        if chunks < SLAB_CHUNKS:
            chunks = 1
    else:
        chunk_bytes *= 1 if channels_last else CONTIGUOUS_CHUNK_FACTOR
        chunks = min(PROGRAMS_PER_SM * sms // across, ceil_div(S, max(BLOCK_S, chunk_bytes // itemsize)))
        if volume < PARTIALS[0][0]:
            chunks = min(chunks, own)
    tiles = ceil_div(ceil_div(S, max(1, chunks)), BLOCK_S)
    chunks = ceil_div(S, tiles * BLOCK_S)
    shape = BLOCK_S, BLOCK_C, VEC, num_warps, chunks, tiles, (across, chunks)
    return Plan("slab" if slab else "split", *shape, max(1, COMBINE_TILE // BLOCK_C), chunks > own)
