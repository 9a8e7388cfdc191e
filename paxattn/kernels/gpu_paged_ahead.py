"""What the paged decode kernel reads first, brought to the cache by the kernel that runs before it.

While many queries are worked on, memory has nothing to do: at the end of that the first keys and values of each
worker can be on their way already.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from paxattn.kernels import gpu_paged_plan, hopper_lanes
from paxattn.kernels.hopper_lanes import LANES

BYTES = 128 * 1024  # a worker: of two workers a block, two thirds of the L2 cache. Of more it keeps no more.


@dataclass(frozen=True)
class Following:
    """The call of `gpu_paged_decode` that follows, by as many blocks of the grid."""

    problem: gpu_paged_plan.Problem
    config: gpu_paged_plan.Config
    blocks: int

    @property
    def keys(self) -> int:
        """How many keys of a worker are brought near, and as many values."""
        return BYTES // (2 * 2 * self.problem.head_dim)

    @property
    def heads(self) -> int:
        """How many of the workers of a block read neighbouring heads of the same keys; where not all do, the first."""
        each = self.config.warpgroups
        return each if self.problem.team(self.blocks * each) % each == 0 else 1

    def bring_near(self, k, v, page_table, kv_lens, cu_q_lens, skipped) -> None:
        """By a warp of each block of the kernel before, for the workers of that block; k, v [N,P,K,D]."""
        workers, cta = self.blocks * self.config.warpgroups, lax.axis_index("cta")
        plan = gpu_paged_plan.Plan(self.problem, self.config, workers, kv_lens, cu_q_lens, skipped)
        item = plan.start(cta * self.config.warpgroups)
        pl.when((cta < self.blocks) & (item.blocks > 0))(lambda: self._bring(item, k, v, page_table))

    def _bring(self, item: gpu_paged_plan.Item, k, v, page_table) -> None:
        block = self.config.block
        begin = jnp.maximum(item.block * block, item.begin)
        end = jnp.minimum((item.block + item.blocks) * block, item.kv_len)
        # All are looked up before the first is asked for, which waits for nothing then.
        places = [self._place(page_table, item.row, begin + start, end) for start in range(0, self.keys, LANES)]
        for there, page, offset in places:

            @pl.when(there)
            def _(page=page, offset=offset):
                for x in (k, v):
                    row = x.at[page, offset, item.head * self.problem.abreast]
                    hopper_lanes.prefetch(row, 2 * self.problem.head_dim * self.heads)

    def _place(self, page_table, row, start, end) -> tuple[Array, Array, Array]:
        """Of a key in each lane, whether it is before `end`, and its page and place there."""
        key = start + hopper_lanes.lane()
        page = lax.div(jnp.minimum(key, jnp.maximum(end - 1, 0)), jnp.int32(self.problem.page_size))
        entry = page_table[row, jnp.minimum(page, page_table.shape[1] - 1)]
        return key < end, entry, lax.rem(key, jnp.int32(self.problem.page_size))
