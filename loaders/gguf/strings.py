"""Stepping over an array of GGUF strings without looking at every one of them in Python.

A GGUF string is ``uint64 length`` (little endian) followed by ``length`` bytes, so an array of them is a chain: where
the next one starts is known only once this one's length was read. A tokenizer has hundreds of thousands; walking the
chain in Python takes 24 to 32 ms for Gemma's 262,144, the whole budget of opening a model.

The chain can be guessed and then proven, with array operations only. Nearly every length is below 256, so its bytes 1
to 7 are zero. Let ``c`` be all positions, in order, followed by seven zero bytes: every short string's header is among
them, and so may be other bytes. If the walk stands at ``c[i]``, and ``c[j + 1] == c[j] + 8 + length[j]`` for every
``j`` from ``i`` up to a first failure ``b``, then by induction ``c[i] .. c[b]`` are exactly the next headers of the
chain and the one after them starts at ``c[b] + 8 + length[b]``. Nothing is assumed: where the guess fails (a string of
256 bytes or more, a text with zero bytes, an empty string, whose header makes the byte before it look like one) plain
steps go on and the guess is tried again later. Gemma's array takes 5 to 6 ms that way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["StringOverrunError", "skip_strings"]

LENGTH = struct.Struct("<Q")

# Shorter arrays are walked: nothing is to be gained. After a failed link this many steps (30 us) are taken before the
# next try (3 us): contents that break every link were measured within 10% of the plain walk.
PLAIN_STEPS = 256

# 64 to 128 KiB were fastest: temporaries of 128 KiB are where glibc begins to map fresh pages for each, and smaller
# windows pay NumPy's overhead more often (32 KiB: 25% slower; 1 MiB: 80%).
WINDOW_NBYTES = 96 * 1024


class StringOverrunError(Exception):
    """A string of the chain does not end within the file: ``position`` of its header, ``length`` that it claims."""

    def __init__(self, position: int, length: int) -> None:
        super().__init__(position, length)
        self.position = position
        self.length = length


class _Chain:
    """A walk along the headers in one window.

    Attributes:
        start: Where the next header starts in the window, perhaps past its end.
        last: Where the last header that was read starts.
        left: How many strings are still to pass.
    """

    __slots__ = ("last", "left", "start", "window")

    def __init__(self, window: bytes, left: int) -> None:
        self.window = window
        self.start = self.last = 0
        self.left = left

    @property
    def inside(self) -> bool:
        """Whether a string is left, and its header is wholly in the window."""
        return self.left > 0 and self.start <= len(self.window) - LENGTH.size

    def walk(self, most: int) -> None:
        """Take up to ``most`` plain steps."""
        unpack, window = LENGTH.unpack_from, self.window
        start, last, final = self.start, self.last, len(self.window) - LENGTH.size
        left = most = min(most, self.left)
        while left and start <= final:
            last = start
            start += 8 + unpack(window, start)[0]
            left -= 1
        self.start, self.last, self.left = start, last, self.left - (most - left)

    def follow(self, links: _Links) -> None:
        """Take the run of proven links that begins here, if one does."""
        first = int(links.starts.searchsorted(self.start))
        if not self.left or first == len(links.starts) or links.starts[first] != self.start:
            return
        final = int(links.breaks[links.breaks.searchsorted(first)])
        final = min(final, first + self.left - 1)
        self.start, self.last = int(links.nexts[final]), int(links.starts[final])
        self.left -= final - first + 1


class _Links:
    """The headers of short strings that ``window`` may hold, and which of them provably follow each other.

    Attributes:
        starts: (c,) int64, ascending: positions followed by seven zero bytes.
        nexts: (c,) int64: where the string ends whose header would be at ``starts[i]``.
        breaks: int64, ascending: every ``i`` whose ``nexts[i]`` is not ``starts[i + 1]``, and the last ``i``.
    """

    __slots__ = ("breaks", "nexts", "starts")

    def __init__(self, window: bytes) -> None:
        data = np.frombuffer(window, dtype=np.uint8)
        zero = data[1:] == 0
        # Seven zeros in a row by doubling, 1 + 1, 2 + 2, 4 + 3: three passes over bytes instead of seven.
        two = zero[:-1] & zero[1:]
        four = two[:-2] & two[2:]
        seven = four[:-3] & four[3:]
        self.starts: npt.NDArray[np.int64] = np.flatnonzero(seven)
        self.nexts: npt.NDArray[np.int64] = self.starts + (data[self.starts].astype(np.int64) + LENGTH.size)
        broken = np.ones(len(self.starts), dtype=np.bool_)  # the last has no successor here: always the end of a run
        np.not_equal(self.nexts[:-1], self.starts[1:], out=broken[:-1])
        self.breaks: npt.NDArray[np.int64] = np.flatnonzero(broken)


def skip_strings(read: Callable[[int, int], bytes], position: int, count: int, end: int) -> int:
    """The position after ``count`` GGUF strings, the first of which has its header at ``position``.

    Args:
        read: ``read(position, nbytes)`` returns the file's bytes there, fewer than ``nbytes`` only at its end.
        position: Byte offset of the first header.
        count: Number of strings.
        end: No string may pass this byte offset (the file's size).

    Raises:
        StringOverrunError: A string passes ``end``.
    """
    while count:
        # Hardly more than the remaining strings need: a short array must not read what follows it in the file.
        chain = _Chain(read(position, min(WINDOW_NBYTES, max(4096, 16 * count))), count)
        if not chain.inside:
            raise StringOverrunError(position, 0)
        if count <= PLAIN_STEPS:
            chain.walk(count)
        else:
            links = _Links(chain.window)
            while chain.inside:
                chain.follow(links)
                chain.walk(PLAIN_STEPS)  # takes none where the run went up to the window's end
        if position + chain.start > end:
            raise StringOverrunError(position + chain.last, chain.start - chain.last - LENGTH.size)
        position += chain.start
        count = chain.left
    return position
