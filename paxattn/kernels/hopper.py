"""What the Hopper kernels share below Pallas: tiles that TMA fills from any row, WGMMA on them, named barriers.

A tile of R rows lies in shared memory as chunks of 64 columns, [chunks, R, 64], each row of a chunk 128 bytes
and swizzled. TMA fills a chunk from any row of the array and puts zeros where the array ends, so no length
needs padding; WGMMA's descriptors step over the chunks.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

CHUNK = 64
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COL = WGMMA.reduce(0)
EVICT_FIRST = 0x12F0000000000000  # what `createpolicy.fractional.L2::evict_first` gives for all of a copy
PLAIN_COPY = re.compile(
    r"@\$0 cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global(?:\.tile)?\.mbarrier::complete_tx::bytes\s+"
    r"\[\$1\], \[\$2, \{[^}]*\}\], \[\$3\];"
)
FIRST_BARRIER = 5  # Mosaic GPU itself uses 0 and one for each of at most four warpgroups


def kernel(body: Any, blocks: int, warpgroups: int, scratch: dict, out_type: Any = ()) -> Any:
    """A kernel of persistent blocks, each with so many consumer warpgroups and one more for TMA."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("cta",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _transforms(width: int) -> tuple[Any, Any]:
    """Of a tile whose rows of `width` elements fill 128 bytes, as WGMMA, loads and stores see it."""
    # mypy takes these classes for abstract.
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]


_TILED = _transforms(CHUNK)


def tile(*shape: int, dtype: Any) -> plgpu.RefUnion:
    """Scratch [..., chunks, R, 128 bytes] under two names: one for TMA, one for WGMMA, loads and stores."""
    tiling, swizzle = _transforms(shape[-1])
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
        plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle)),
    )


def load_tile(source: Any, start: Any, target: Any, barrier: Any) -> None:
    """Copy rows [start, start + R) of source [rows, D] into the tile; `barrier` counts one arrival a chunk."""
    chunks, rows, _ = target.shape
    for i in range(chunks):
        place = pl.ds(start, rows), columns(i, source.shape[-1], start)
        plgpu.copy_gmem_to_smem(source.at[place], target.at[i], barrier)


def load_once(source: Any, target: Any, barrier: Any) -> None:
    """`plgpu.copy_gmem_to_smem` of what is read once, mostly: it leaves the cache before anything else.

    So what the cache has yet to write back can wait, and what was brought near stays. Pallas has no word for it: the
    copy that it issued is replaced by one with the hint (PTX, `cp.async.bulk.tensor`). If a jax issues another one,
    that stays.
    """
    plgpu.copy_gmem_to_smem(source, target, barrier)

    @plgpu.inline_mgpu()
    def with_hint(_):
        *_, copy = ir.InsertionPoint.current.block.operations
        if (operands := operands_of(copy)) is None:
            return
        policy, rank = mgpu.c(EVICT_FIRST, ir.IntegerType.get_signless(64)), len(operands) - 4
        at = ", ".join(f"${i}" for i in range(4, 4 + rank))
        how = "shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        text = f"@$0 cp.async.bulk.tensor.{rank}d.{how} [$1], [$2, {{{at}}}], [$3], ${4 + rank};"
        registers = "b,r,l,r" + ",r" * rank + ",l"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [*operands, policy], text, registers, has_side_effects=True)
        copy.operation.erase()

    with_hint()


def operands_of(copy: Any) -> list[ir.Value] | None:
    """Predicate, target, descriptor, barrier and coordinates of a plain copy to shared memory; of others None."""
    if copy.operation.name == "nvvm.cp.async.bulk.tensor.shared.cluster.global":  # jax 0.11
        plain = not copy.im2colOffsets and copy.multicastMask is None and copy.l2CacheHint is None
        return [copy.predicate, copy.dstMem, copy.tmaDescriptor, copy.mbar, *copy.coordinates] if plain else None
    if copy.operation.name == "llvm.inline_asm" and PLAIN_COPY.fullmatch(copy.asm_string.value.strip()):  # jax 0.12
        return list(copy.operands)
    return None


def columns(chunk: int, width: int, traced: Array) -> Any:
    """The slice of a chunk; where it ends beyond `width`, one that Pallas cannot see through and TMA clips."""
    start = chunk * CHUNK
    return pl.ds(start if start + CHUNK <= width else start + 0 * traced, CHUNK)


def products_t(*pairs: tuple[Any, Any]) -> tuple[Array, ...]:
    """a @ b.T for each pair of a [M, D], a tile or in registers, and a tile b [N, D]: float32 [M, N], in flight until
    `wait`, the first to be done first."""
    shapes = [(a.shape[-2], b.shape[-2]) for a, b in pairs]
    tile = plgpu.RefType(_TILED)

    @plgpu.inline_mgpu(
        arg_types=tuple((WGMMA if isinstance(a, Array) else tile, tile) for a, _ in pairs),
        return_type=tuple(plgpu.ShapeDtypeStruct(shape, jnp.float32, WGMMA) for shape in shapes),
    )
    def issue(_, *pairs):
        # All cleared before the first begins: ptxas lets nothing be written while products are in flight.
        sums = [mgpu.WGMMAAccumulator.zero(*shape) for shape in shapes]
        results = []
        for acc, (a, b) in zip(sums, pairs, strict=True):
            a = a if isinstance(a, mgpu.FragmentedArray) else _rows_first(a)
            results.append(mgpu.wgmma(acc, a, mgpu.memref_transpose(_rows_first(b), (1, 0, 3, 2))).value)
            nvvm.wgmma_commit_group_sync_aligned()
        return tuple(results)

    return issue(*pairs)


def accumulate(acc: Array, p: Array, b: Any) -> Array:
    """acc + p @ b for p [M, N] in registers and a tile b [N, D]; in flight until `wait`."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, plgpu.RefType(_TILED)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, WGMMA),
    )
    def issue(_, acc, p, b):
        out = mgpu.wgmma(mgpu.WGMMAAccumulator.from_registers(acc), p, _rows_first(b))
        nvvm.wgmma_commit_group_sync_aligned()
        return out.value

    return issue(acc, p, b)


def zero() -> Array:
    """0, which the compiler does not know: with it in an index, addresses are formed where they are used.

    Otherwise LLVM keeps the descriptors of a tile that a loop does not change in registers over the whole loop.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def hidden(_):
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return hidden()


def product_tn(a: Any, b: Any) -> Array:
    """a.T @ b of two chunks [N, 64], float32 [64, 64]; in flight until `wait`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_TILED), plgpu.RefType(_TILED)),
        return_type=plgpu.ShapeDtypeStruct((CHUNK, CHUNK), jnp.float32, WGMMA),
    )
    def issue(_, a, b):
        acc = mgpu.wgmma(mgpu.WGMMAAccumulator.zero(CHUNK, CHUNK), mgpu.memref_transpose(a, (1, 0, 3, 2)), b)
        nvvm.wgmma_commit_group_sync_aligned()
        return acc.value

    return issue(a, b)


def _rows_first(b: ir.Value) -> ir.Value:
    """[chunks, R / 8, 1, 8, 64] as WGMMA wants an operand of R rows: [R / 8, chunks, 8, 64], strides kept."""
    return mgpu.memref_transpose(mgpu.memref_slice(b, (slice(None), slice(None), 0)), (1, 0, 2, 3))


def load(tile: Any) -> Array:
    """A tile [chunks, R, 64] in registers, as an operand [R, D] of WGMMA."""
    return jnp.concatenate([tile[i] for i in range(tile.shape[0])], axis=1)


def wait(in_flight: int, *arrays: Array) -> Any:
    """Wait until at most `in_flight` products are; returns `arrays`, which may be read from here on."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,) * len(arrays),
        return_type=tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, WGMMA) for x in arrays),
    )
    def wait_group(_, *arrays):
        nvvm.wgmma_wait_group_sync_aligned(in_flight)
        done = mgpu.optimization_barrier(*arrays)
        return tuple(done) if len(arrays) > 1 else (done,)

    done = wait_group(*arrays)
    return done if len(arrays) > 1 else done[0]


def fence() -> None:
    """What this thread wrote to shared memory can be read by TMA and WGMMA once a barrier has been passed."""

    @plgpu.inline_mgpu()
    def issue(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    issue()


def wait_for_count(counter: Any, count: Any) -> None:
    """Spin until the int32 in global memory is `count`."""
    text = (
        "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.b32 v, [$0]; setp.ne.b32 p, v, $1; @p bra again; }"
    )
    _with_scalar(counter, count, text)


def set_count(counter: Any, count: Any) -> None:
    """Set the int32 in global memory, after all that this warp has seen done."""
    _with_scalar(counter, count, "st.release.gpu.global.b32 [$0], $1;")


def fetch_add(counter: Any) -> Array:
    """Add 1 to the int32 in global memory, once for this warp -> what it was."""
    text = (
        "{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; mov.b32 $0, 0; "
        "@p atom.global.add.u32 $0, [$1], 1; shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; }"
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)
    )
    def issue(_, counter):
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [mgpu.utils.memref_ptr(counter)], text, "=&r,l", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return issue(counter)


def store_scalar(target: Any, value: Array) -> None:
    """Store an int32 in shared memory from every lane of a warp."""
    _with_scalar(target, value, "st.shared.b32 [$0], $1;", "r,r")


def store_rows(target: Any, x: Array, start: Any, rows: Any) -> None:
    """Store the first `rows` rows of x [R] or [R, D], in the layout of WGMMA, from row `start` of target on.

    Columns that target does not have are left out.
    """
    layout = WGMMA if x.ndim == 2 else ROW

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def store(_, target, x, start, rows):
        index = ir.IndexType.get()
        start, rows = (arith.index_cast(index, scalar.registers[()]) for scalar in (start, rows))
        shape = ir.MemRefType(target.type).shape

        def store_one(value, place):
            exists = arith.cmpi(arith.CmpIPredicate.slt, place[0], rows)
            for column, width in zip(place[1:], shape[1:], strict=True):
                there = arith.cmpi(arith.CmpIPredicate.slt, column, mgpu.c(width, index))
                exists = arith.andi(exists, there)
            with mgpu.utils.when(exists):
                memref.store(value, target, [arith.addi(start, place[0]), *place[1:]])

        x.foreach(store_one)

    store(target, x, jnp.asarray(start, jnp.int32), jnp.asarray(rows, jnp.int32))


def _with_scalar(place: Any, value: Any, text: str, registers: str = "l,r") -> None:
    """Run PTX with the address of an int32 and a value; an address has 64 bits, in shared memory 32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def issue(_, place, value):
        operands = [mgpu.utils.memref_ptr(place), value.registers[()]]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, registers, has_side_effects=True)

    issue(place, jnp.asarray(value, jnp.int32))


def settle(*arrays: Array) -> Any:
    """`arrays` in the registers they stay in: a copy made between products in flight would serialise them."""
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, WGMMA) for x in arrays)
    return plgpu.inline_mgpu(arg_types=(WGMMA,) * len(arrays), return_type=types)(
        lambda _, *arrays: tuple(mgpu.optimization_barrier(*arrays))
    )(*arrays)


def bar_sync(barrier: Any, threads: int) -> None:
    _bar("sync", barrier, threads)


def bar_arrive(barrier: Any, threads: int) -> None:
    _bar("arrive", barrier, threads)


def _bar(kind: str, barrier: Any, threads: int) -> None:
    """PTX named barrier: cheaper than an mbarrier, but it holds one phase."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def bar(_, index):
        text = f"bar.{kind} $0, {threads};"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [index.registers[()]], text, "r", has_side_effects=True)

    bar(jnp.asarray(barrier, jnp.int32))


def apart(run: Any) -> Any:
    """A kernel call, traced by itself: with 32 bits whatever the user has, and without the axes that shard_map varies.

    Mosaic GPU counts in 32 bits, and JAX cannot yet trace a kernel of several warps over varying arrays.
    """

    def traced(*args):
        arrays, tree = jax.tree.flatten(args)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        with jax.enable_x64(False):
            jaxpr, outs = jax.make_jaxpr(lambda *x: run(*jax.tree.unflatten(tree, x)), return_shape=True)(*shapes)
            results = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arrays)
        return jax.tree.unflatten(jax.tree.structure(outs), results)

    return traced
