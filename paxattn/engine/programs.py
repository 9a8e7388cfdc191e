"""The programs that an engine runs on its slots: compiled ahead, or by jit where one is called that was not."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled, Lowered

from paxattn.engine import edits, memory, program_file
from paxattn.engine.config import EngineConfig
from paxattn.engine.generate import Model
from paxattn.engine.packed import Packed
from paxattn.engine.scheduler import Request
from paxattn.engine.slots import News, Shape, Slots, run
from paxattn.kv.stores import PagedKV
from paxattn.kv.swap import swap_in, swap_out

PREFILL_STEPS = 4  # of a loop: a host that takes longer for a plan than a small model for a step still keeps up


@dataclass(frozen=True, eq=False)
class Programs:
    """A loop of each shape, an edit of each size, and forks. Each takes the slots (donated) and returns new ones.

    Fields:
      model, config: the engine's.
      compiled: all of them or none; loops are known by their shapes, edits by their sizes.
    """

    model: Model
    config: EngineConfig
    compiled: Mapping[Hashable, Compiled] = field(default_factory=dict)

    def choose(self, lacking: Sequence[int], under_way: int) -> tuple[Shape, int, int]:
        """The loop for what rows lack, how many steps of it, and what they feed of prompts at least.

        Args:
          lacking: tokens that the store does not have, of each running row, as last told.
          under_way: how many of prompts are being fed already.
        """
        decode, *mixed = self.config.shapes
        left = sum(n for n in lacking if n > decode.width) - under_way
        if left <= 0:
            return decode, self.config.decode_steps, 0
        # The largest that is filled: places that nobody has a token for cost as much as others, and what is left for
        # the next step does not hold up decode.
        shape = next((shape for shape in reversed(mixed) if shape.prefill <= left), mixed[0])
        # More than one step only while more than these is left for certain, so that the next choice is as good.
        steps = max(1, min(PREFILL_STEPS, self.config.decode_steps, left // (2 * shape.prefill)))
        return shape, steps, min(left, shape.prefill)

    def loop(self, shape: Shape, params: Any, slots: Slots, limit: int, idle: int) -> tuple[Slots, News]:
        """See `slots.run`."""
        program = self.compiled.get(shape) or partial(run, self.model, shape=shape)
        return program(params, slots, np.int32(limit), np.int32(idle))

    def edit(
        self, slots: Slots, drop: Sequence[int], let_go: Sequence[int], admitted: Sequence[edits.Admission]
    ) -> Slots:
        """In as many edits as it takes: rows are emptied, pages let go, and rows admitted."""
        for edit in edits.pack(self._room, slots, drop, let_go, admitted):
            slots = self.compiled.get(len(edit.tokens), edits.apply)(slots, Packed.of(edit))
        return slots

    def fork(self, slots: Slots, forks: Sequence[tuple[Request, list[Request]]]) -> Slots:
        """Requests whose prompts are stored go on, and their twins from there."""
        return self.compiled.get("fork", edits.fork)(slots, *edits.pack_forks(slots, forks))

    def lower(self, shape: Shape, params: Any, slots: Slots) -> Lowered:
        return run.lower(self.model, params, slots, np.int32(0), np.int32(0), shape=shape)

    def workspace(self, params: Any, slots: Slots) -> int:
        """Bytes that the largest loop takes besides what it is given. It is compiled to find out."""
        # On a GPU most of the time would go into trying out kernels, which need about as much as each other.
        quickly = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
        told: Any = self.lower(self.config.shapes[-1], params, slots).compile(quickly).memory_analysis()
        return int(told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes)

    def compile(self, params: Any, slots: Slots, progress: Callable[[int, int], None] | None) -> "Programs":
        """With all of them compiled, for such arguments."""
        made = _compile_all(self._lowered(params, slots), progress, len(self._trees(params, slots)))
        return replace(self, compiled=made)

    def save(self, path: Path, params: Any, slots: Slots) -> None:
        """Write what is compiled to a file.

        Raises:
          ValueError: see `program_file.save`.
        """
        program_file.save(path, self._facts(params, slots), self.compiled)

    def load(self, path: Path, params: Any, slots: Slots) -> "Programs":
        """With those that were saved.

        Raises:
          ValueError: see `program_file.load`.
        """
        loaded = program_file.load(path, self._facts(params, slots), self._trees(params, slots))
        return replace(self, compiled=loaded)

    def rehearse(self, params: Any, slots: Slots) -> Slots:
        """Run each, of no rows: in its first run a GPU is told of a program, which takes as long as many steps.

        Where rows may be swapped, what that takes is compiled, too.
        """
        for shape in self.config.shapes:
            slots, _ = self.compiled[shape](params, slots, np.int32(1), np.int32(0))
        for size in self._room.tokens:
            slots = self.compiled[size](slots, edits.empty(self._room, slots, size))
        slots = jax.block_until_ready(self.compiled["fork"](slots, *edits.pack_forks(slots, [])))
        return replace(slots, kv=_swap_each_size(slots.kv)) if self.config.preemption == "swap" else slots

    @property
    def _room(self) -> edits.Room:
        return edits.Room.of(self.config.max_seqs, self.config.max_len)

    def _lowered(self, params: Any, slots: Slots) -> Iterator[tuple[Hashable, Lowered]]:
        """All by name, those first that take longest to compile."""
        for shape in reversed(self.config.shapes):
            yield shape, self.lower(shape, params, slots)
        for size in self._room.tokens:
            yield size, edits.apply.lower(slots, edits.empty(self._room, slots, size))
        yield "fork", edits.fork.lower(slots, *edits.pack_forks(slots, []))

    def _trees(self, params: Any, slots: Slots) -> dict[Hashable, tuple[Any, Any]]:
        """The structures of what all take and return, by the names of `_lowered`."""

        def trees(result: Any, *args: Any) -> tuple[Any, Any]:
            return jax.tree.structure((args, {})), jax.tree.structure(result)

        leaves: dict[str, Any] = dict.fromkeys(News.__dataclass_fields__, 0)
        told = {shape: trees((slots, News(**leaves)), params, slots, 0, 0) for shape in self.config.shapes}
        edited = {size: trees(slots, slots, edits.empty(self._room, slots, size)) for size in self._room.tokens}
        return told | edited | {"fork": trees(slots, slots, *edits.pack_forks(slots, []))}

    def _facts(self, params: Any, slots: Slots) -> dict[str, str]:
        kinds = jax.tree.map(lambda x: jax.typeof(x).str_short(), params)
        model = f"{type(self.model).__qualname__} {memory.digest(self.model, params)}"
        num_pages = slots.kv.table.num_pages
        return program_file.facts(config=self.config, num_pages=num_pages, model=model, params=kinds)


def _compile_all(
    lowered: Iterable[tuple[Hashable, Lowered]], progress: Callable[[int, int], None] | None, total: int
) -> dict[Hashable, Compiled]:
    """Compile `total` programs by name. Those that come first are compiled while Python lowers the others."""
    with ThreadPoolExecutor(total) as pool:
        under_way = {name: pool.submit(one.compile) for name, one in lowered}
        programs = {}
        for done, (name, one) in enumerate(under_way.items(), 1):
            programs[name] = one.result()
            if progress is not None:
                progress(done, total)
    return programs


def _swap_each_size(kv: PagedKV) -> PagedKV:
    """Swap an empty row of each size out and in, as that compiles what it takes."""
    table = kv.table
    longest = min(table.num_pages, table.page_table.shape[1])
    grow = jax.jit(_grow, donate_argnums=0)
    for count in [*(2**i for i in range(longest.bit_length())), longest]:
        kv = grow(kv, jnp.int32(count * table.page_size))
        kv, swapped = swap_out(kv, 0)
        kv, _ = swap_in(kv, swapped, 0)
        kv, _ = swap_out(kv, 0)
    return kv


def _grow(kv: PagedKV, length: jax.Array) -> PagedKV:
    kv, _ = kv.extend(jnp.zeros(kv.max_seqs, jnp.int32).at[0].set(length), num_tokens=1)
    return kv.end_step()
