"""What the paged decode kernel reads first, brought to the cache by the kernel that runs before it.

While many queries are worked on, memory has nothing to do: at the end of that the first keys and values of each
worker can be on their way already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from paxattn.kernels import gpu_paged_plan, hopper_lanes
from paxattn.kernels.hopper_lanes import LANES

BYTES = 128 * 1024  # a worker, of 16-bit numbers: together two thirds of the L2 cache. Of more it keeps no more.


@dataclass(frozen=True)
class Following:
    """The call of `gpu_paged_decode` that follows, by as many blocks of the grid."""

    problem: gpu_paged_plan.Problem
    config: gpu_paged_plan.Config
    blocks: int

    @property
    def keys(self) -> int:
        """How many of a worker are brought near."""
        return BYTES // (2 * 2 * self.problem.head_dim)

    def bring_near(self, k, v, page_table, kv_lens, cu_q_lens, skipped, wait: Callable[[], None]) -> None:
        """By a warp of each block of the kernel before, for the workers of that block; k, v [N,P,K,D].

        All that takes long to find out is found out before `wait`.
        """
        each, cta = self.config.warpgroups, lax.axis_index("cta")
        plan = gpu_paged_plan.Plan(self.problem, self.config, self.blocks * each, kv_lens, cu_q_lens, skipped)
        found = [self._first_of(plan, cta * each + i, page_table) for i in range(each)]
        wait()
        for head, places in found:
            for there, page, offset in places:

                @pl.when(there & (cta < self.blocks))
                def _(page=page, offset=offset, head=head):
                    for x in (k, v):
                        hopper_lanes.prefetch(x.at[page, offset, head], 2 * self.problem.head_dim)

    def _first_of(self, plan: gpu_paged_plan.Plan, worker, page_table) -> tuple[Array, list[tuple[Array, Any, Array]]]:
        """A worker's first head and, for its first keys, one a lane, whether there is one, its page and place."""
        item, size, block = plan.start(worker), jnp.int32(self.problem.page_size), self.config.block
        begin = jnp.maximum(item.block * block, item.begin)
        end = jnp.minimum((item.block + item.blocks) * block, item.kv_len)
        places = []
        for start in range(0, self.keys, LANES):
            key = begin + start + hopper_lanes.lane()
            page = page_table[item.row, lax.div(jnp.minimum(key, jnp.maximum(end - 1, 0)), size)]
            places.append((key < end, page, lax.rem(key, size)))
        return item.head * self.problem.abreast, places
