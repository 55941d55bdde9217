"""Global and shared memory, with checks that a GPU does not make."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .counts import WARP, Counts
from .faults import Fault
from .parse import Instruction

Array = NDArray[Any]


class Access(NamedTuple):
    """One memory instruction of a batch of programs.

    address: int64, broadcasts to `shape`.
    mask: the lanes that take part, broadcasts to `shape`; None for all.
    size, elements: each lane accesses `elements` elements of `size` bytes.
    shape: (programs, threads).
    programs: (programs, 1), their numbers in the grid.
    """

    address: Array
    mask: Array | None
    size: int
    elements: int
    shape: tuple[int, int]
    programs: Array
    instruction: Instruction

    @property
    def bytes(self) -> int:
        return self.size * self.elements

    def spread(self, values: Array) -> Array:
        """The values of all lanes that take part, as one axis."""
        values = np.broadcast_to(values, self.shape)
        return values.reshape(-1) if self.mask is None else values[np.broadcast_to(self.mask, self.shape)]

    def units(self, address: Array, granule: int) -> Array:
        """The granules that each lane accesses: (lanes, granules)."""
        return (address // granule)[:, None] + np.arange(self.bytes // granule)

    def fault(self, what: str, bad: Array) -> Fault:
        """The Fault for an access. bad: a mask of the lanes that take part, in the order of `spread`."""
        lanes = bad.reshape(len(bad), -1).any(1)
        program = self.spread(self.programs)[lanes][0]
        thread = self.spread(np.arange(self.shape[1]))[lanes][0]
        first = f"the first is thread {thread} of program {program}"
        return Fault(f"{what}: {self.instruction}; {np.count_nonzero(lanes)} lanes, {first}")


def settled(access: Access) -> Access | None:
    """The access with harmless addresses for lanes that do not take part; None if no lane takes part.

    Raises:
        Fault: an address is not a multiple of the access's size.
    """
    if (mask := access.mask) is not None:
        if not mask.any():
            return None
        if mask.all():
            access = access._replace(mask=None)
        else:
            address, mask = np.broadcast_arrays(access.address, mask)
            access = access._replace(address=np.where(mask, address, address.flat[int(mask.argmax())]), mask=mask)
    if (access.address & (access.bytes - 1)).any():
        raise access.fault("misaligned access", access.spread(access.address) % access.bytes != 0)
    return access


@dataclass
class Area:
    """The storage of an argument, bytes [start, end). writers: 0, or 1 + the writing program, for each granule."""

    start: int
    end: int
    granule: int
    reads: list[Access] = field(default_factory=list)
    writers: Array | None = None

    def __post_init__(self) -> None:
        self.origin = self.start // 16 * 16  # an aligned start, for views of wider types
        length = -(-self.end // 16) * 16 - self.origin
        self.memory = np.ctypeslib.as_array((ctypes.c_ubyte * length).from_address(self.origin))
        self.views = {size: self.memory.view(f"u{size}") for size in (1, 2, 4, 8)}

    def holds(self, low: int, high: int) -> bool:
        return self.start <= low and high <= self.end

    def owned(self, access: Access) -> tuple[Array, Array]:
        """The granules that the lanes access, and 1 + the program of each lane."""
        units = access.units(access.spread(access.address) - self.origin, self.granule)
        return units, access.spread(access.programs.astype(np.int32) + 1)[:, None]

    def wrote(self, access: Access) -> None:
        """Record the writers. Raises Fault if another program wrote the same granule."""
        if self.writers is None:
            self.writers = np.zeros(len(self.memory) // self.granule, np.int32)  # pages use memory once accessed
        units, owner = self.owned(access)
        before = self.writers.take(units)
        conflict = (before != 0) & (before != owner)
        if not conflict.any():
            self.writers[units] = owner
            conflict = self.writers.take(units) != owner
        if conflict.any():
            raise access.fault("two programs write one word of global memory", conflict)

    def check_reads(self) -> None:
        """Raises Fault if a program reads what another program writes."""
        if self.writers is not None:
            for access in self.reads:
                units, owner = self.owned(access)
                writer = self.writers.take(units)
                conflict = (writer != 0) & (writer != owner)
                if conflict.any():
                    raise access.fault("a word of global memory that another program writes is read", conflict)


class Global:
    """Global memory: the storages of a launch's arguments."""

    def __init__(self, storages: Iterable[tuple[int, int]], granule: int, counts: Counts) -> None:
        """storages: (address, bytes) of each. granule: bytes of the kernel's smallest access."""
        self.areas = [Area(start, start + length, granule) for start, length in sorted(set(storages)) if length]
        self.counts = counts

    def _places(self, access: Access) -> Iterator[tuple[Area, Access]]:
        """The areas that the lanes access, usually one, each with its lanes."""
        low, high = int(access.address.min()), int(access.address.max()) + access.bytes
        for area in self.areas:
            if area.holds(low, high):
                yield area, access
                return
        left = np.ones(access.shape, bool) if access.mask is None else np.broadcast_to(access.mask, access.shape).copy()
        address = np.broadcast_to(access.address, access.shape)
        for area in self.areas:
            inside = left & (address >= area.start) & (address + access.bytes <= area.end)
            left &= ~inside
            if (here := settled(access._replace(address=address, mask=inside))) is not None:
                yield area, here
        if left.any():
            raise access.fault("global access outside the storages of the launch's arguments", access.spread(left))

    def load(self, access: Access, kind: str = "load") -> list[Array]:
        """The elements of each lane; zeros for lanes that do not take part."""
        dtype = np.dtype(f"u{access.size}")
        found = [np.zeros((1, 1), dtype)] * access.elements
        settled_access = settled(access)
        if settled_access is None:
            return found
        self.counts.request(kind, settled_access.address, settled_access.mask, access.shape)
        for area, part in self._places(settled_access):
            index = (part.address - area.origin) // access.size
            values = [area.views[access.size].take(index + k) for k in range(access.elements)]
            if part is settled_access:
                found = values
            else:
                here = np.True_ if part.mask is None else part.mask
                found = [np.where(here, new, old) for new, old in zip(values, found, strict=True)]
            area.reads.append(part)
        return found

    def store(self, access: Access, values: Sequence[Array]) -> None:
        settled_access = settled(access)
        if settled_access is None:
            return
        self.counts.request("store", settled_access.address, settled_access.mask, access.shape)
        for area, part in self._places(settled_access):
            area.wrote(part)
            index = (part.spread(part.address) - area.origin) // access.size
            for k, value in enumerate(values):
                area.views[access.size][index + k] = part.spread(value)

    def finish(self) -> None:
        """Raises Fault if a program has read what another program wrote."""
        for area in self.areas:
            area.check_reads()


@dataclass
class Copy:
    """An asynchronous copy that has not arrived: row (program), warp, group, granules and 32-bit words of each lane."""

    row: Array
    warp: Array
    group: Array
    units: Array
    words: Array
    values: Array

    def only(self, lanes: Array) -> Copy:
        return Copy(*(part[lanes] for part in vars(self).values()))


class Shared:
    """The shared memory of a batch of programs, a row each.

    writer, reader: epoch·64 + warp of the last writer and reader of each granule. Barriers separate epochs, and warp 63
        means several warps.
    flying: whether an asynchronous copy to a granule has not arrived.
    """

    SEVERAL = 63

    def __init__(self, programs: int, size: int, granule: int) -> None:
        self.size, self.granule = size, granule
        self.row_bytes = -(-max(size, 1) // 16) * 16
        memory = np.full(programs * self.row_bytes, 0xFF, np.uint8)
        self.views = {size: memory.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.writer, self.reader = (np.full(len(memory) // granule, -64, np.int32) for _ in range(2))
        self.flying = np.zeros(len(memory) // granule, np.int8)
        self.epoch = np.zeros((programs, 1), np.int32)
        self.groups = np.zeros((programs, 1), np.int32)  # committed so far
        self.copies: list[Copy] = []

    def _located(self, access: Access) -> tuple[Array, Array, Array]:
        """For the lanes that take part: byte addresses in all rows, granules, and stamps epoch·64 + warp."""
        address = access.spread(access.address)
        outside = (address < 0) | (address + access.bytes > self.size)
        if outside.any():
            raise access.fault(f"access outside the {self.size} bytes of shared memory", outside)
        address = address + access.spread(np.arange(access.shape[0])[:, None] * self.row_bytes)
        warp = np.arange(access.shape[1], dtype=np.int32) // WARP
        return address, access.units(address, self.granule), access.spread(self.epoch * 64 + warp)[:, None]

    def _same_epoch(self, stamps: Array, mine: Array) -> Array:
        return (stamps >> 6 == mine >> 6) & (stamps != mine)

    def _written_by_others(self, access: Access, units: Array, stamp: Array, what: str) -> None:
        if self.flying.take(units).any():
            raise access.fault(
                f"{what} of shared memory whose asynchronous copy has not arrived", self.flying[units] > 0
            )
        race = self._same_epoch(self.writer.take(units), stamp)
        if race.any():
            raise access.fault(f"{what} of shared memory that another warp wrote, without a barrier between", race)

    def load(self, access: Access) -> list[Array]:
        """The elements of each lane; zeros for lanes that do not take part."""
        lane = settled(access)
        if lane is None:
            return [np.zeros((1, 1), np.dtype(f"u{access.size}"))] * access.elements
        address, units, stamp = self._located(lane)
        self._written_by_others(lane, units, stamp, "read")
        if (self.writer.take(units) < 0).any():
            raise lane.fault("read of shared memory that was never written", self.writer[units] < 0)
        others = self._same_epoch(self.reader.take(units), stamp)
        self.reader[units] = np.where(others, stamp | self.SEVERAL, stamp)
        several = (self.reader.take(units) != stamp) | others  # in this instruction, or before it
        if several.any():
            self.reader[units[several]] = np.broadcast_to(stamp | self.SEVERAL, units.shape)[several]
        found = []
        for k in range(access.elements):
            values = self.views[access.size].take(address // access.size + k)
            if lane.mask is None:
                found.append(values.reshape(access.shape))
            else:
                found.append(np.zeros(access.shape, values.dtype))
                found[-1][np.broadcast_to(lane.mask, access.shape)] = values
        return found

    def _to_write(self, access: Access) -> tuple[Access, Array, Array, Array] | None:
        """The settled access and its `_located` places, after the checks of a write; None if no lane takes part."""
        lane = settled(access)
        if lane is None:
            return None
        address, units, stamp = self._located(lane)
        self._written_by_others(lane, units, stamp, "write")
        race = self._same_epoch(self.reader.take(units), stamp)
        if race.any():
            raise lane.fault("write of shared memory that another warp read, without a barrier between", race)
        return lane, address, units, stamp

    def store(self, access: Access, values: Sequence[Array]) -> None:
        if (written := self._to_write(access)) is None:
            return
        lane, address, units, stamp = written
        self.writer[units] = stamp
        view, index = self.views[access.size], address // access.size
        given = [lane.spread(value) for value in values]
        for k, value in enumerate(given):
            view[index + k] = value
        # Warps that hold the same element may all store it if the value is the same. Lanes of one warp may store sums
        # that differ in the last bit, because the compiler can fuse a product with the sum across lanes.
        overwritten = (self.writer.take(units) != stamp).any(1)
        if overwritten.any():
            lost = overwritten & np.any([view.take(index + k) != value for k, value in enumerate(given)], axis=0)
            if lost.any():
                raise lane.fault("two warps write different values to one word of shared memory at once", lost)

    def copy(self, access: Access, values: Sequence[Array]) -> None:
        """Start an asynchronous copy of 32-bit `values`. It arrives when its group is waited for."""
        if (written := self._to_write(access)) is None:
            return
        lane, address, units, stamp = written
        self.flying[units] = 1
        words = (address // 4)[:, None] + np.arange(len(values))
        row = lane.spread(np.arange(access.shape[0])[:, None])
        stacked = np.stack([lane.spread(value) for value in values], axis=1)
        self.copies.append(Copy(row, stamp[:, 0] & 63, self.groups[row, 0], units, words, stacked))

    def commit(self, rows: Array) -> None:
        """End the current group of copies, in the programs of these rows (a mask)."""
        self.groups[rows] += 1

    def wait(self, rows: Array, pending: int | None) -> None:
        """Let all groups except the last `pending` arrive; None for all groups."""
        left = []
        for copy in self.copies:
            arrived = rows[copy.row]
            if pending is not None:
                arrived = arrived & (copy.group < self.groups[copy.row, 0] - pending)
            if not arrived.all():
                left.append(copy.only(~arrived))
            landed = copy.only(arrived)
            self.views[4][landed.words] = landed.values
            self.writer[landed.units] = (self.epoch[landed.row, 0] * 64 + landed.warp)[:, None]
            self.flying[landed.units] = 0
        self.copies = left

    def barrier(self, rows: Array) -> None:
        self.epoch[rows] += 1
