"""What lanes and rows do apart on Hopper, below Pallas.

In a kernel a scalar is a register of each thread, and nothing demands that it be the same in all of them. So scalars
that start from `lane()` run as in CUDA, and the functions here are what a warp exchanges. And a row of an array in
registers can be loaded from and stored to a place of its own, or left out.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

SCALAR = plgpu.Layout.WG_SPLAT
LANES = 32
LINE = 128  # bytes, of the cache


def lane() -> Array:
    """The number of this lane in its warp."""
    return _int32("mov.u32 $0, %laneid;")


def warp() -> Array:
    """The number of this warp in its warpgroup."""
    return _int32("{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; and.b32 $0, t, 3; }")


def warp_sum(x: Array) -> Array:
    """The sum of the int32 x over the lanes."""
    return _int32("redux.sync.add.s32 $0, $1, 0xffffffff;", x)


def warp_scan(x: Array) -> Array:
    """The sum of the int32 x over this lane and those below."""
    step = "shfl.sync.up.b32 t|p, $0, {0}, 0, 0xffffffff; @p add.s32 $0, $0, t;"
    steps = " ".join(step.format(1 << i) for i in range(5))
    return _int32("{ .reg .pred p; .reg .b32 t; mov.b32 $0, $1; " + steps + " }", x)


def from_lane(x: Array, source: Array) -> Array:
    """The int32 x that the lane `source` has; each lane may ask another one."""
    return _int32("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", x, source)


def _int32(text: str, *operands: Any) -> Array:
    @plgpu.inline_mgpu(arg_types=(SCALAR,) * len(operands), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def issue(_, *operands):
        i32 = ir.IntegerType.get_signless(32)
        registers = ",".join(["=&r", *("r" for _ in operands)])
        value = llvm.inline_asm(i32, [x.registers[()] for x in operands], text, registers, has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return issue(*(jnp.asarray(x, jnp.int32) for x in operands))


def prefetch(place: Any, size: int = 1) -> None:
    """Have so many bytes from a place in global memory on, of each lane, brought near, line after line."""
    text = " ".join(f"prefetch.global.L2 [$0 + {at}];" for at in range(0, size, LINE))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def issue(_, place):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [mgpu.utils.memref_ptr(place)], text, "l", has_side_effects=True)

    issue(place)


def copy_halves(source: Any, target: Any) -> None:
    """Have a row [n] of 16-bit numbers copied from global to shared memory, of each lane its own; `land_at` says who is
    told when it has come. Where n is odd, a row that begins in the middle of four bytes comes one to the right, so that
    the target has room for n + 1."""
    size = 2 * (source.shape[-1] + source.shape[-1] % 2)
    step = next(step for step in (16, 8, 4) if size % step == 0)
    copies = (f"cp.async.ca.shared.global [$0 + {at}], [from + {at}], {step};" for at in range(0, size, step))
    text = "{ .reg .b64 from; and.b64 from, $1, -4; " + " ".join(copies) + " }"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def issue(_, source, target):
        operands = [mgpu.utils.memref_ptr(target), mgpu.utils.memref_ptr(source)]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, "r,l,~{memory}", has_side_effects=True)

    issue(source, target)


def prepare_landings(landings: Any) -> None:
    """Make a barrier of each two int32 [n, 2] in shared memory, by a warp, for `land_at`.

    Pallas does not tell where its own barriers are.
    """
    inits = " ".join(f"@p mbarrier.init.shared.b64 [$0 + {8 * i}], {LANES};" for i in range(landings.shape[0]))
    first = "{ .reg .b32 lane; .reg .pred p; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; "
    _run(first + inits + " bar.warp.sync 0xffffffff; }", landings)


def land_at(landing: Any) -> None:
    """What all lanes have begun to copy lands here: a phase ends when all of it has come."""
    _run("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", landing)


def wait_until_landed(landing: Any, phase: Array) -> None:
    """Wait for the end of a phase, of which every other one is 0 and every other one 1."""
    text = "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [$0], $1; @!p bra again; }"
    _run(text, landing, phase)


def finish_copies() -> None:
    """Wait for all that this lane copies, without which it must not end."""
    _run("cp.async.wait_all;")


def _run(text: str, *operands: Any) -> None:
    """Run PTX with a place in shared memory and int32 scalars."""
    types = tuple(SCALAR if isinstance(x, Array) else plgpu.RefType() for x in operands)

    @plgpu.inline_mgpu(arg_types=types)
    def issue(_, *operands):
        values = [x.registers[()] if hasattr(x, "registers") else mgpu.utils.memref_ptr(x) for x in operands]
        registers = ",".join([*("r" for _ in values), "~{memory}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), values, text, registers, has_side_effects=True)

    issue(*operands)


def count_arrival(counter: Any) -> Array:
    """Add 1 to the int32 in global memory, once for this warp -> what it was.

    Whoever sees a later number also sees all that this warp, or one that it met at a barrier, wrote before.
    """
    text = (
        "{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; mov.b32 $0, 0; "
        "fence.acq_rel.gpu; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; "
        "shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; bar.warp.sync 0xffffffff; fence.acq_rel.gpu; }"
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def issue(_, counter):
        i32 = ir.IntegerType.get_signless(32)
        place = mgpu.utils.memref_ptr(counter)
        value = llvm.inline_asm(i32, [place], text, "=&r,l,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return issue(counter)


def along(x: Array, shape: tuple[int, int], layout: Any) -> Array:
    """x [M] as [M, D]; for layouts that Pallas does not know, where `lax.broadcast_in_dim` finds none."""
    type_of = plgpu.ShapeDtypeStruct(shape, x.dtype, layout)
    return plgpu.inline_mgpu(arg_types=(layout.reduce(1),), return_type=type_of)(
        lambda _, x: x.broadcast_in_dim(shape, (0,), layout.to_mgpu())
    )(x)


def load_rows(source: Any, rows: Array, layout: Any, width: int | None = None) -> Array:
    """source [N, D] or [N] in global memory at each of rows [M]; a negative one gives whatever row 0 holds.

    `layout` is that of an [M, D]; that of rows is reduced over D. Where a width is given, zeros follow the D columns.
    """
    shape, dtype = (*rows.shape, *source.shape[1:]), source.dtype
    wider = width is not None and width > shape[-1]
    shape = (shape[0], width) if wider else shape
    of_rows, of_all = _layouts(shape, layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), of_rows), return_type=plgpu.ShapeDtypeStruct(shape, dtype, of_all))
    def load(_, source, rows):
        rows = _along(rows, shape, of_all)
        registers = rows.registers.copy()
        element = ir.MemRefType(source.type).element_type
        type_of = ir.VectorType.get((rows.layout.vector_length,), element)
        for at, row, place in _places(rows):
            row = _index(arith.maxsi(row, mgpu.c(0, row.type)))
            if not wider:
                registers[at] = vector.load(type_of, source, [row, *place[1:]])
                continue
            inside = _inside(place[1], source)
            column = arith.select(inside, place[1], mgpu.c(0, place[1].type))
            zeros = vector.broadcast(type_of, mgpu.c(0, element))
            registers[at] = arith.select(inside, vector.load(type_of, source, [row, column]), zeros)
        is_signed = True if jnp.issubdtype(dtype, jnp.signedinteger) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=rows.layout, _is_signed=is_signed)

    return load(source, rows)


def store_rows(target: Any, rows: Array, x: Array, layout: Any) -> None:
    """Store x [M, D] or [M] to target [N, D] or [N] in global memory, each row to its place in rows [M], unless that is
    negative. Columns that the target has not are left out."""
    shape = x.shape
    wider = len(shape) > 1 and shape[1] > target.shape[1]
    of_rows, of_all = _layouts(shape, layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), of_rows, of_all))
    def store(_, target, rows, x):
        rows = _along(rows, shape, of_all)
        for at, row, place in _places(rows):
            there = arith.cmpi(arith.CmpIPredicate.sge, row, mgpu.c(0, row.type))
            there = arith.andi(there, _inside(place[1], target)) if wider else there
            with mgpu.utils.when(there):
                vector.store(x.registers[at], target, [_index(row), *place[1:]])

    store(target, rows, x)


def _layouts(shape: tuple[int, ...], layout: Any) -> tuple[Any, Any]:
    """The layout of a number for each row, and that of what stands in the rows."""
    of_rows = layout.reduce(1)
    return of_rows, layout if len(shape) > 1 else of_rows


def _along(rows: Any, shape: tuple[int, ...], layout: Any) -> Any:
    return rows.broadcast_in_dim(shape, (0,), layout.to_mgpu()) if len(shape) > 1 else rows


def _places(rows: Any) -> Any:
    """Of every register of `rows`, [M] or the same along D: its index, the row in it, and where it is in the array."""
    indices = [at for at, _ in _enumerate(rows.registers)]
    for at, place in zip(indices, rows.layout.thread_idxs(rows.shape), strict=True):
        row = vector.extract(rows.registers[at], dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
        yield at, row, place


def _inside(column: ir.Value, array: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, column, mgpu.c(array.type.shape[1], column.type))


def _enumerate(registers: Any) -> Any:
    at = [0] * registers.ndim
    for x in registers.flat:
        yield tuple(at), x
        for axis in reversed(range(registers.ndim)):
            at[axis] += 1
            if at[axis] < registers.shape[axis]:
                break
            at[axis] = 0


def _index(row: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), row)
