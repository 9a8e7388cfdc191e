"""What rows ask of their tokens, the guesses made from their text, and rows cut short."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn import PageTable, Sampling
from paxattn.engine.drafts import look_up
from paxattn.engine.rules import Rules, log_probabilities
from paxattn.engine.sampling import sample

V = 11


@pytest.fixture
def rows(rng):
    """Logits [5,V], tokens [5,9] and how many are known; two of each row are its prompt."""
    logits = jnp.asarray(rng.normal(size=(5, V)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (5, 9)), jnp.int32)
    return logits, tokens, jnp.asarray([2, 4, 9, 3, 6])


def rules(**fields):
    every = replace(Rules.none(5, 3, 2), prompt=jnp.full(5, 2), most=jnp.full(5, 9))
    return replace(every, **{name: jnp.asarray(value, getattr(every, name).dtype) for name, value in fields.items()})


def test_plain_rows_change_nothing(rows):
    logits, tokens, known = rows
    assert bool(rules().plain(known))
    np.testing.assert_array_equal(rules().apply(logits, tokens, known), logits)


def test_each_row_is_penalized_by_its_own_rule(rows):
    logits, tokens, known = rows
    repetition, presence, frequency = [1.0, 1.5, 0.7, 2.0, 1.0], [0.0, 0.3, -0.2, 0.0, 0.1], [0.0, 0.0, 0.4, 0.5, 0.0]
    mine = rules(repetition=repetition, presence=presence, frequency=frequency)
    assert not bool(mine.plain(known))
    want = np.array(logits)
    for r in range(5):
        text = np.asarray(tokens)[r, : int(known[r])].tolist()
        for token in range(V):
            if token in text:
                want[r, token] *= 1 / repetition[r] if want[r, token] > 0 else repetition[r]
            count = text[2:].count(token)
            want[r, token] -= presence[r] * (count > 0) + frequency[r] * count
    np.testing.assert_allclose(mine.apply(logits, tokens, known), want, rtol=1e-5, atol=1e-6)


def test_biases_and_early_stops(rows):
    logits, tokens, known = rows
    ids, bias = np.full((5, 2), -1), np.zeros((5, 2))
    ids[1], bias[1] = [4, 0], [2.5, -1.0]
    stops = np.full((5, 3), -1)
    stops[:, 0] = 7
    mine = rules(bias_ids=ids, bias=bias, stop_ids=stops, least=[0, 5, 9, 4, 0])
    want = np.array(logits)
    want[1, [4, 0]] += [2.5, -1.0]
    want[[1, 3], 7] = -np.inf
    np.testing.assert_allclose(mine.apply(logits, tokens, known), want)


def test_rows_that_do_not_run_ask_for_nothing(rows):
    _, _, known = rows
    mine = rules(repetition=[2.0] * 5, logprobs=[True] * 5, bias_ids=np.ones((5, 2)), least=[9] * 5)
    mine = replace(mine, sampling=replace(mine.sampling, temperature=jnp.ones(5)))
    assert not bool(mine.plain(known))
    assert bool(mine.of_running(jnp.zeros(5, bool)).plain(known))
    some = mine.of_running(jnp.arange(5) == 3)
    assert some.penalized.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_are_a_softmax(rows, top):
    logits, _, _ = rows
    drawn = jnp.asarray([0, 3, 5, 10, 2])
    want = np.asarray(jax.nn.log_softmax(logits))
    chosen, ids, best = log_probabilities(logits, drawn, jnp.arange(5) == 1, top)
    np.testing.assert_allclose(chosen, want[np.arange(5), np.asarray(drawn)], rtol=1e-5)
    assert ids.shape == best.shape == (5, top)
    for r in range(5):
        np.testing.assert_allclose(best[r], want[r, np.asarray(ids[r])], rtol=1e-5)
        np.testing.assert_allclose(best[r], np.sort(want[r])[::-1][:top], rtol=1e-5)
    assert not np.any(log_probabilities(logits, drawn, jnp.zeros(5, bool), top)[0])


def kept(logits, **options):
    """Which tokens are drawn at all."""
    drawn = jax.vmap(lambda n: sample(logits, Sampling(**options).checked(), n))(jnp.arange(4000))
    return set(np.asarray(drawn).ravel().tolist())


def test_min_p_keeps_what_is_likely_enough():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    assert kept(logits, temperature=1.0, min_p=0.09) == {0, 1, 2, 3}
    assert kept(logits, temperature=1.0, min_p=0.11) == {0, 1, 2}
    assert kept(logits, temperature=1.0, min_p=0.5) == {0, 1}
    assert kept(logits, temperature=1.0, min_p=1.0) == {0}


def test_equal_logits_are_kept_or_dropped_together():
    logits = jnp.asarray([[2.0, 1.0, 2.0, 0.0, -0.0, -1.0]])
    assert kept(logits, temperature=1.0, top_k=1) == {0, 2}
    assert kept(logits, temperature=1.0, top_k=4) == {0, 1, 2, 3, 4}


def test_rows_of_all_kinds_draw_what_they_draw_alone(rng):
    logits = jnp.asarray(rng.normal(size=(6, 50)) * 3, jnp.float32)
    each = [
        Sampling(), Sampling(0.7, seed=1), Sampling(1.0, top_k=3, seed=2), Sampling(1.3, top_p=0.6, seed=3),
        Sampling(0.9, 20, 0.9, 4, 0.05), Sampling(1.0, min_p=0.2, seed=2**32 - 1),
    ]  # fmt: skip
    each = [one.checked() for one in each]
    count, streams = jnp.asarray([0, 5, 2, 9, 1, 3]), jnp.asarray([0, 0, 4, 1, 2, 0])
    together = sample(logits, jax.tree.map(lambda *x: jnp.stack(x), *each), count, streams)
    for r, one in enumerate(each):
        alone = sample(logits[r : r + 1], one, count[r], streams[r : r + 1])
        assert together[r] == alone[0]


def guess(text, ngram, count):
    """By definition: from the latest earlier place of the last tokens."""
    for end in range(len(text) - 2, ngram - 2, -1):
        if text[end - ngram + 1 : end + 1] == text[len(text) - ngram :]:
            return text[end + 1 : end + 1 + count]
    return []


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=3, max_size=3), ngram=st.integers(1, 3))
def test_drafts_follow_the_latest_place_of_the_last_tokens(texts, ngram):
    tokens = np.full((3, 14), 1, np.int32)
    for r, text in enumerate(texts):
        tokens[r, : len(text)] = text
    drafts, count = look_up(jnp.asarray(tokens), jnp.asarray([len(text) for text in texts]), ngram, 4)
    for r, text in enumerate(texts):
        want = guess(text, ngram, 4) if len(text) > ngram else []
        assert np.asarray(drafts)[r, : int(count[r])].tolist() == want


def test_a_row_cut_short_is_as_if_it_had_never_grown(rng):
    before = rng.integers(0, 20, 4)
    table, _ = PageTable.create(40, 4, 4, 8).reserve(jnp.asarray(before))
    grown, ok = table.reserve(jnp.asarray(before + rng.integers(0, 12, 4)))
    assert bool(ok.all())
    cut = grown.truncate(jnp.asarray(before))
    np.testing.assert_array_equal(cut.owners, table.owners)
    assert cut.lens.tolist() == table.lens.tolist()
    assert int(cut.num_free) == int(table.num_free)
    assert sorted(np.asarray(cut.free)[: int(cut.num_free)]) == np.flatnonzero(np.asarray(cut.owners) == 0).tolist()
    assert cut.truncate(jnp.asarray(before + 5)).lens.tolist() == before.tolist()
    assert int(cut.release(jnp.ones(4, bool)).num_free) == 40
