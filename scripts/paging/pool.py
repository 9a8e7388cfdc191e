"""Pages of memory with owners."""

from collections.abc import Iterable


class PagePool:
    """Pages of P tokens with an owner count; rows grow, are released and share. The host's twin of paxattn.PageTable.

    Pages are taken and given back in PageTable's order, so that the two may be compared page by page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = list(range(num_pages))[::-1]
        self.owners = [0] * num_pages
        self.rows: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def reserve(self, row: int, tokens: int) -> bool:
        """Grow a row to hold `tokens`; False, and nothing is changed, where too few pages are left."""
        need = self.pages(tokens) - len(self.rows.get(row, ()))
        if need > self.num_free:
            return False
        self.rows.setdefault(row, []).extend(self._take() for _ in range(need))
        self.lens[row] = tokens
        return True

    def release(self, rows: Iterable[int]) -> None:
        """Drop rows; a page is free when its last owner lets go."""
        freed = []
        for row in rows:
            del self.lens[row]
            for page in self.rows.pop(row):
                self.owners[page] -= 1
                if not self.owners[page]:
                    freed.append(page)
        self.free += sorted(freed)

    def fork(self, src: int, dst: int) -> list[tuple[int, int]] | None:
        """The new row dst shares src's pages. A partly filled last page, which both would write, is copied.

        Returns the copies (from, to), none or one of them; None where there is no page for it.
        """
        row, partial = self.rows[src], self.lens[src] % self.page_size != 0
        if partial and not self.free:
            return None
        self._share(row[: len(row) - partial], dst)
        self.lens[dst] = self.lens[src]
        if not partial:
            return []
        self.rows[dst].append(self._take())
        return [(row[-1], self.rows[dst][-1])]

    def share_prefix(self, src: int, dst: int, tokens: int) -> int:
        """The new row dst starts with src's first tokens, as far as they fill whole pages: how many these are."""
        shared = self.rows[src][: tokens // self.page_size]
        self._share(shared, dst)
        self.lens[dst] = len(shared) * self.page_size
        return self.lens[dst]

    def _take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def _share(self, pages: list[int], dst: int) -> None:
        self.rows[dst] = list(pages)
        for page in pages:
            self.owners[page] += 1
