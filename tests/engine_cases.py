"""What the tests of the engine share: its sizes and kinds, what is asked of one at rest, and a model with a window."""

SIZES = dict(max_seqs=4, max_len=96, page_size=4, num_pages=30, prefill_tokens=16, decode_steps=6)
KINDS = {
    "recompute": {},
    "swap": dict(preemption="swap"),
    "drafts": dict(draft_tokens=3, ngram=1, prefill_tokens=5),
    "no prefixes": dict(prefix_cache=False, prefill_tokens=5),
}
LONGEST = 64  # tokens of a request in the random programs: more than half of the pages


def at_rest(engine):
    """Nothing runs, nobody but the prefix index owns a page."""
    while engine.busy:
        engine.step()
    stats, table = engine.stats(), engine._slots.kv.table
    assert stats.num_free + stats.num_cached == stats.num_pages
    assert int(table.num_free) == stats.num_free
    assert int((table.owners > 0).sum()) == stats.num_cached
    assert not bool((table.lens > 0).any())
    return stats


def collect(engine, updates, got):
    for update in updates:
        got.setdefault((update.id, update.index), []).extend(update.ids)


class Windowed:
    """A model whose layers all have a window."""

    def __init__(self, model, window=8):
        self.model, self.window = model, window

    def __call__(self, params, tokens, positions, kv):
        hidden, kv = self.model(params, tokens, positions, _WindowedKV(kv, self.window))
        return hidden, kv.kv

    def logits(self, params, hidden):
        return self.model.logits(params, hidden)


class _WindowedKV:
    def __init__(self, kv, window):
        self.kv, self.window = kv, window

    def attend(self, layer, q, k, v, **options):
        out, kv = self.kv.attend(layer, q, k, v, window=self.window, **options)
        return out, _WindowedKV(kv, self.window)
