"""Stretches of memory, as contiguous schemes take them."""

from bisect import bisect
from typing import Protocol


class Allocator(Protocol):
    """Stretches of one range of addresses. `free` counts the tokens that nobody has."""

    free: int

    def __init__(self, memory: int) -> None: ...
    def rounded(self, size: int) -> int:
        """What a stretch of `size` really takes."""
        ...

    def take(self, size: int) -> int | None:
        """The start of a stretch, or None where no hole is long enough."""
        ...

    def give(self, start: int, size: int) -> None: ...


class FirstFit:
    """The lowest hole that is long enough; neighbouring holes merge."""

    def __init__(self, memory: int) -> None:
        self.free = memory
        self.holes = [(0, memory)]  # (start, length), by address

    def rounded(self, size: int) -> int:
        return size

    def take(self, size: int) -> int | None:
        for i, (start, length) in enumerate(self.holes):
            if length >= size:
                self.holes[i : i + 1] = [(start + size, length - size)] if length > size else []
                self.free -= size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        self.free += size
        i = bisect(self.holes, (start, 0))
        end = start + size
        first = i
        if i > 0 and sum(self.holes[i - 1]) == start:
            first, start = i - 1, self.holes[i - 1][0]
        if i < len(self.holes) and self.holes[i][0] == end:
            end = sum(self.holes[i])
            i += 1
        self.holes[first:i] = [(start, end - start)]


class Buddy:
    """Powers of two, split in halves on demand; two free halves merge (Knuth 1997, section 2.5). Orca's, in the paper.

    A range that is no power of two starts as the blocks of its binary digits, the largest first.
    """

    def __init__(self, memory: int) -> None:
        self.free = memory
        self.blocks: dict[int, set[int]] = {1 << bit: set() for bit in range(memory.bit_length())}
        start = 0
        for size in reversed(self.blocks):
            if memory & size:
                self.blocks[size].add(start)
                start += size

    def rounded(self, size: int) -> int:
        return next_power_of_two(size)

    def take(self, size: int) -> int | None:
        want = self.rounded(size)
        have = want
        while have in self.blocks and not self.blocks[have]:
            have *= 2
        if have not in self.blocks:
            return None
        start = min(self.blocks[have])
        self.blocks[have].remove(start)
        while have > want:
            have //= 2
            self.blocks[have].add(start + have)
        self.free -= want
        return start

    def give(self, start: int, size: int) -> None:
        size = self.rounded(size)
        self.free += size
        while start ^ size in self.blocks[size]:
            self.blocks[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self.blocks[size].add(start)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


ALLOCATORS: dict[str, type[Allocator]] = {"buddy": Buddy, "first-fit": FirstFit}
