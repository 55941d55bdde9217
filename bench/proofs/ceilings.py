"""What the kernels may cost: bytes moved, launches that must be one, widths, shared memory, compiled variants. Pure."""

from __future__ import annotations

from bisect import bisect_right

# Bytes loaded and stored, in whole sectors, over the bytes of x, by (backward, split) and by the bytes of x: under
# 1 MB, from 1 to 8 MB, over 8 MB, with 1 MB = 10⁶ bytes.
SIZE_CLASSES = (1_000_000, 8_000_000)
TRAFFIC = {
    (False, False): (2.3, 2.05, 2.02),
    (False, True): (3.5, 3.15, 3.03),
    (True, False): (3.5, 3.1, 3.03),
    (True, True): (6.0, 5.3, 5.05),
}

# With a residual r, in bytes of x and by backward, on top. Forward r is read once, where y is written: the statistics
# are of x alone. Backward r is read once, for the sign of z + r, and dr = dz written once; a split backward then reads
# dr in place of dy, and r no more.
RESIDUAL_TRAFFIC = {False: 1.0, True: 2.0}

# Where each program of apply combines its rows' partial results itself, all of them read all again: so much more of x,
# for an x of less than so many bytes.
COMBINED_IN_APPLY, COMBINED_IN_APPLY_BYTES = 0.15, 16_000_000

# Of the loops that stream x, for bfloat16, channels-last, at least 32 channels and no residual: instructions of a
# thread for each of its elements, and barriers for each tile, read from sm_90 machine code.
LOOP_CHANNELS = 32
LOOP_INSTRUCTIONS = {
    "forward statistics": 12.0, "forward apply": 10.0, "backward sums": 19.0, "backward apply": 16.0,
}  # fmt: skip
LOOP_BARRIERS = 3

# Positions up to which a row must be read once, by (channels_last, backward).
ONE_PASS_POSITIONS = {(True, False): 1024, (True, True): 512, (False, False): 32768, (False, True): 4096}
# With a residual no more than this: in float32, 32,768 positions of x and r spill on sm_80 and sm_90.
ONE_PASS_POSITIONS_RESIDUAL = 16384

# Of the streaming accesses' bytes, the least share that moves 16 bytes at a time, where divisibility allows any.
VECTOR_SHARE = 0.95

# Shared memory that a block can have, by target: those that the ceilings are for.
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}

# Compiled variants of Example 1, forward and backward; more for another batch size above 1; more for another volume.
VARIANTS, VARIANTS_OTHER_BATCH, VARIANTS_OTHER_VOLUME = 40, 0, 6


def traffic_ceiling(
    N: int, C: int, S: int, itemsize: int, backward: bool, split: bool, residual: bool = False, in_apply: bool = False
) -> float:
    """The most that may be moved for x (N, C, S) of `itemsize`-byte elements, in bytes of x.

    in_apply: the programs of apply combine the partial results of their rows.

    What every row costs besides its elements comes on top: five float32 forward, eleven and a share of the launch that
    sums over n backward.
    """
    size_class = bisect_right(SIZE_CLASSES, N * C * S * itemsize)
    row_bytes = 44 + 12 / N if backward else 20
    ideal = TRAFFIC[backward, split][size_class] + (RESIDUAL_TRAFFIC[backward] if residual else 0.0)
    if in_apply and N * C * S * itemsize < COMBINED_IN_APPLY_BYTES:
        ideal += COMBINED_IN_APPLY
    return ideal + row_bytes / (S * itemsize)


def one_pass_required(S: int, channels_last: bool, backward: bool, residual: bool = False) -> bool:
    """Whether rows of S positions must be read once."""
    most = ONE_PASS_POSITIONS[channels_last, backward]
    return (min(most, ONE_PASS_POSITIONS_RESIDUAL) if residual else most) >= S


def breaks_sectors(C: int, itemsize: int, channels_last: bool) -> bool:
    """Whether a slice of channels would move partial sectors: such C may be split where others must not."""
    return channels_last and C * itemsize % 32 != 0


def vectors_required(C: int, S: int, itemsize: int, channels_last: bool) -> bool:
    """Whether x's contiguous axis allows 16-byte accesses everywhere."""
    return (C if channels_last else S) * itemsize % 16 == 0


def loops_held(dtype: str, channels_last: bool, C: int, residual: bool) -> bool:
    """Whether the loops that stream x are held to LOOP_INSTRUCTIONS and LOOP_BARRIERS."""
    return dtype == "bfloat16" and channels_last and LOOP_CHANNELS <= C and not residual
