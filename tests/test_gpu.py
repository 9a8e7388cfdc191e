"""The shared cases on an NVIDIA GPU: `pytest -m gpu`. float32 is multiplied in float32, not TF32."""

import jax
import pytest
from conftest import TINY
from test_flash_attention import (
    test_float32_equals_the_oracle as test_flash_attention_in_float32,
)
from test_flash_attention import (
    test_low_precision_error_is_at_most_twice_plain_attentions as test_flash_attention_in_low_precision,
)
from test_flash_attention import test_rows_with_nothing_to_see
from test_paged_attention import test_compressed_pages_equal_the_oracle
from test_paged_attention import (
    test_float32_equals_the_oracle as test_paged_attention_in_float32,
)
from test_paged_attention import (
    test_low_precision_error_is_at_most_twice_plain_attentions as test_paged_attention_in_low_precision,
)
from test_sharing import (
    feed,
    log_probs,
    prompt,
    test_a_prompt_is_found_again_and_read_as_if_it_were_computed,
    test_a_row_comes_back_from_the_host_bit_for_bit,
    test_a_window_bounds_the_memory_and_changes_nothing,
    test_beam_search_finds_what_its_definition_finds,
    test_greedy_samples_are_equal,
)
from test_stores import test_attend_over_several_steps_equals_dense_attention

from paxattn import generate

__all__ = [
    "feed",
    "log_probs",
    "prompt",
    "test_a_prompt_is_found_again_and_read_as_if_it_were_computed",
    "test_a_row_comes_back_from_the_host_bit_for_bit",
    "test_a_window_bounds_the_memory_and_changes_nothing",
    "test_attend_over_several_steps_equals_dense_attention",
    "test_beam_search_finds_what_its_definition_finds",
    "test_compressed_pages_equal_the_oracle",
    "test_flash_attention_in_float32",
    "test_flash_attention_in_low_precision",
    "test_greedy_samples_are_equal",
    "test_paged_attention_in_float32",
    "test_paged_attention_in_low_precision",
    "test_rows_with_nothing_to_see",
]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu_in_full_precision():
    assert jax.default_backend() == "gpu"
    with jax.default_matmul_precision("highest"):
        yield


def test_generate_says_on_the_gpu_what_it_says_on_the_cpu(tiny, new_store, rng):
    model, params = tiny
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (3, 40, 1, 17)]

    def run(device):
        with jax.default_device(device):
            there = jax.device_put(params, device)
            store = jax.device_put(new_store(TINY, 4, 64, implementation="xla"), device)
            done = generate(model, there, store, prompts, max_new_tokens=12)
            return [one.ids for one in done]

    assert run(jax.devices("gpu")[0]) == run(jax.devices("cpu")[0])
