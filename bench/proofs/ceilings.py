"""The ceilings of `audit`: bytes moved, rows read twice, narrow accesses, shared memory, compiled variants.

Example 1 is EncoderNet3d(64, [3, 3, 3, 3, 3], in_planes=3). Nothing here needs triton.
"""

from __future__ import annotations

from bisect import bisect_right

# Bytes loaded and stored, in whole sectors, over the bytes of x. The keys are (backward, split); the values are for x
# below 1 MB, from 1 to 8 MB, and above 8 MB, with 1 MB = 10⁶ bytes.
SIZE_CLASSES = (1_000_000, 8_000_000)
TRAFFIC = {
    (False, False): (2.3, 2.05, 2.02),
    (False, True): (3.5, 3.15, 3.03),
    (True, False): (3.5, 3.1, 3.03),
    (True, True): (6.0, 5.3, 5.05),
}

# A residual r adds these multiples of the bytes of x, by backward. The forward reads r once, when it writes y. The
# backward reads r once, for the sign of z + r, and writes dr = dz once. A split backward then reads dr instead of dy.
RESIDUAL_TRAFFIC = {False: 1.0, True: 2.0}

# If each program of apply combines the partial results of its rows itself, all programs read them again. That adds so
# much of x, for an x of less than so many bytes.
COMBINED_IN_APPLY, COMBINED_IN_APPLY_BYTES = 0.15, 16_000_000

# The largest cost of a loop that streams x, for bfloat16, channels-last, at least 32 channels and no residual:
# instructions of a thread per element, and barriers per tile, read from sm_90 machine code.
LOOP_CHANNELS = 32
LOOP_INSTRUCTIONS = {
    "forward statistics": 12.0, "forward apply": 10.0, "backward sums": 19.0, "backward apply": 16.0,
}  # fmt: skip
LOOP_BARRIERS = 3

# The longest rows that must be read only once, in positions, by (channels_last, backward).
ONE_PASS_POSITIONS = {(True, False): 1024, (True, True): 512, (False, False): 32768, (False, True): 4096}
# The limit with a residual: in float32, 32,768 positions of x and r spill registers on sm_80 and sm_90.
ONE_PASS_POSITIONS_RESIDUAL = 16384

# The least share of bytes of x that must move in 16-byte accesses, if divisibility allows such accesses.
VECTOR_SHARE = 0.95

# The largest shared memory of a block. The ceilings apply to these targets.
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}

# Compiled variants of Example 1, forward and backward; additional ones for other batch sizes above 1 and other inputs.
VARIANTS, VARIANTS_OTHER_BATCH, VARIANTS_OTHER_SIZE = 40, 0, 6


def traffic_ceiling(
    N: int, C: int, S: int, itemsize: int, backward: bool, split: bool, residual: bool = False, in_apply: bool = False
) -> float:
    """The most bytes that may be moved for x (N, C, S) with `itemsize`-byte elements, over the bytes of x.

    This includes what each row costs in addition to its elements: five float32 in the forward; eleven, and a share of
    the launch that sums over n, in the backward.

    in_apply: the programs of apply combine the partial results of their rows.
    """
    size_class = bisect_right(SIZE_CLASSES, N * C * S * itemsize)
    row_bytes = 44 + 12 / N if backward else 20
    ideal = TRAFFIC[backward, split][size_class] + (RESIDUAL_TRAFFIC[backward] if residual else 0.0)
    if in_apply and N * C * S * itemsize < COMBINED_IN_APPLY_BYTES:
        ideal += COMBINED_IN_APPLY
    return ideal + row_bytes / (S * itemsize)


def one_pass_required(S: int, channels_last: bool, backward: bool, residual: bool = False) -> bool:
    """Whether rows of S positions must be read only once."""
    most = ONE_PASS_POSITIONS[channels_last, backward]
    return (min(most, ONE_PASS_POSITIONS_RESIDUAL) if residual else most) >= S
