"""A small example, told step by step."""

from scripts.paging.pool import PagePool

NAMES = "ABCDE"  # of the requests


class Tour:
    """A handful of requests in a small pool, told step by step."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.told = 0
        print(f"{num_pages} pages of {page_size} tokens")

    def tell(self, what: str) -> None:
        pool = self.pool
        self.told += 1
        print(f"\n{self.told}. {what}")
        for row, pages in sorted(pool.rows.items()):
            print(f"     {NAMES[row]}  {pool.lens[row]:2} tokens  pages {' '.join(map(str, pages))}")
        print(f"     free: {' '.join(map(str, sorted(pool.free))) or 'none'}")
        shared = [f"{page} ({owners} owners)" for page, owners in enumerate(pool.owners) if owners > 1]
        if shared:
            print(f"     shared: {', '.join(shared)}")

    def admit(self, row: int, tokens: int) -> None:
        need = counted(self.pool.pages(tokens))
        if self.pool.reserve(row, tokens):
            self.tell(f"admit {NAMES[row]}: a prompt of {tokens} tokens takes {need}")
        else:
            self.tell(f"{NAMES[row]} waits: a prompt of {tokens} tokens needs {need}, more than are free")

    def grow(self, row: int, tokens: int) -> None:
        before = len(self.pool.rows[row])
        for _ in range(tokens):
            while not self.pool.reserve(row, self.pool.lens[row] + 1):
                latest = max(self.pool.rows)
                self.pool.release([latest])
                self.tell(f"no page is left for {NAMES[row]}: {NAMES[latest]}, the latest, gives way")
        self.tell(f"{NAMES[row]} grew by {tokens} tokens and took {counted(len(self.pool.rows[row]) - before)}")

    def fork(self, src: int, dst: int) -> None:
        copies = self.pool.fork(src, dst)
        assert copies is not None, "the example has room for this fork"
        shared = counted(len(self.pool.rows[dst]) - len(copies))
        copied = "".join(f"; page {old}, not full, is copied to {new}, as both will write it" for old, new in copies)
        self.tell(f"fork {NAMES[src]} into {NAMES[dst]}: {shared} shared{copied}")

    def admit_with_prefix(self, src: int, dst: int, prefix: int, tokens: int) -> None:
        found = self.pool.share_prefix(src, dst, prefix)
        self.pool.reserve(dst, tokens)
        self.tell(
            f"admit {NAMES[dst]}: {tokens} tokens, the first {prefix} as {NAMES[src]}'s; "
            f"{found} of them fill whole pages, which are shared"
        )

    def finish(self, *rows: int) -> None:
        before = self.pool.num_free
        self.pool.release(rows)
        freed = counted(self.pool.num_free - before)
        self.tell(f"finish {' and '.join(NAMES[row] for row in rows)}: {freed} without an owner, free again")


def counted(pages: int) -> str:
    return f"{pages} page{'s' if pages != 1 else ''}"


def show_steps() -> None:
    tour = Tour(num_pages=10, page_size=4)
    a, b, c, d, e = range(5)
    tour.admit(a, 7)
    tour.admit(b, 5)
    tour.grow(a, 3)
    tour.fork(a, c)
    tour.grow(c, 3)
    tour.admit_with_prefix(a, d, 9, 13)
    tour.admit(e, 11)
    tour.finish(a)
    tour.finish(c)
    tour.admit(e, 11)
    tour.grow(b, 8)
    tour.finish(b, d)
    tour.admit(e, 11)
    tour.finish(e)
