"""Tiles of 8-bit codes as tiles of float16 on Hopper, sixteen numbers at a time, below Pallas.

Every number of int8 and of float8_e4m3fn is one of float16, and float16 is what takes the fewest instructions to make.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from paxattn.kernels import hopper_pages
from paxattn.kernels.hopper import CHUNK
from paxattn.kernels.hopper_lanes import SCALAR

UNIT = 16  # codes: what a thread takes from shared memory at once, and what shares a scale
AT_ONCE = 4  # units that a thread has in registers
THREADS = 128
REF = plgpu.RefType()

# Two codes of a word as two float16, which are exact. Bytes of int8, 128 added, are put below the exponent of 1024.
TO_HALVES = {
    "int8": (
        "xor.b32 $c, $c, 0x80808080; prmt.b32 $l, $c, 0x64646464, 0x4140; prmt.b32 $h, $c, 0x64646464, 0x4342; "
        "sub.rn.f16x2 $l, $l, bias; sub.rn.f16x2 $h, $h, bias;"
    ),
    "float8_e4m3fn": ("mov.b32 {low, high}, $c; cvt.rn.f16x2.e4m3x2 $l, low; cvt.rn.f16x2.e4m3x2 $h, high;"),
}


def expand_keys(codes: Any, scales: Any, odd: Array, tile: Any) -> None:
    """Codes [R, D], each unit times its scale, to the first columns of a tile of float16, by a warpgroup.

    A row's scales stand one to the right where `odd` is 1. It is -1 where only those of rows 1, 3, .. do, and -2 where
    those of rows 0, 2, .. do.
    """
    dtype, types = codes.dtype, (REF, REF, SCALAR, hopper_pages.TILE)

    @plgpu.inline_mgpu(arg_types=types)
    def issue(_, codes, scales, odd, tile):
        _expand(dtype, codes, tile, scale_of=lambda row, unit: _scale_at(scales, row, unit, odd.registers[()]))

    issue(codes, scales, odd, tile)


def expand_values(codes: Any, first: Array, end: Array, tile: Any) -> None:
    """Codes [R, D] to the first columns of a tile of float16, by a warpgroup. In rows not in [first, end) all numbers
    are finite: 0, or what the codes say where none says NaN."""
    dtype, types = codes.dtype, (REF, SCALAR, SCALAR, hopper_pages.TILE)

    @plgpu.inline_mgpu(arg_types=types)
    def issue(_, codes, first, end, tile):
        first, end = first.registers[()], end.registers[()]
        keep = None if dtype == jnp.int8 else lambda row: _between(first, row, end)
        _expand(dtype, codes, tile, keep=keep)

    issue(codes, first, end, tile)


def load_scale(scales: Any, odd: Array) -> Array:
    """Of each thread's row the one scale, [R, 2] as in `expand_keys`, for `store_scale`."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def issue(_, scales, odd):
        place = _scale_at(scales, _row(scales.type.shape[0]), _c(0), odd.registers[()])
        text = "{ .reg .b16 s; ld.shared.b16 s, [$1]; cvt.u32.u16 $0, s; }"
        value = llvm.inline_asm(_i32(), [place], text, "=r,r,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return issue(scales, odd)


def store_scale(scale: Array, first: Array, end: Array, factor: float, target: Any) -> None:
    """Each thread's scale times a factor to target [R], float32; 0 as in `expand_values`."""

    @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, SCALAR, REF))
    def issue(_, scale, first, end, target):
        row = _row(target.type.shape[0])
        keep = _between(first.registers[()], row, end.registers[()])
        to = arith.addi(_address(target), arith.muli(row, _c(4)))
        text = (
            "{ .reg .b16 s; .reg .f32 x; .reg .pred p; setp.ne.b32 p, $1, 0; cvt.u16.u32 s, $0; cvt.f32.f16 x, s; "
            f"mul.f32 x, x, {factor:.1f}; selp.f32 x, x, 0.0, p; st.shared.f32 [$2], x; }}"
        )
        _asm(text, [scale.registers[()], arith.extui(_i32(), keep), to])

    issue(scale, first, end, target)


def _row(rows: int) -> ir.Value:
    """Of a thread, of so many rows; those that have none left take the last."""
    return arith.minui(_thread(), _c(rows - 1))


def _expand(dtype: Any, codes: ir.Value, tile: ir.Value, scale_of: Any = None, keep: Any = None) -> None:
    rows, width = codes.type.shape
    (row_bytes, _), _ = codes.type.get_strides_and_offset()
    units = rows * (width // UNIT)
    base, to = _address(codes), _address(tile)
    boxes_a_row = tile.type.shape[1]
    taken = [
        # Threads that have none left do the last one again.
        arith.minui(arith.addi(_thread(), _c(start)), _c(units - 1))
        for start in range(0, units, THREADS)
    ]
    if width % (2 * CHUNK) == 0:
        taken = [_apart(at, width // UNIT) for at in taken]
    for i in range(0, len(taken), AT_ONCE):
        places = []
        for at in taken[i : i + AT_ONCE]:
            row, unit = arith.divui(at, _c(width // UNIT)), arith.remui(at, _c(width // UNIT))
            source = arith.addi(arith.muli(row, _c(row_bytes)), arith.muli(unit, _c(UNIT)))
            place = [arith.addi(base, source), *_halves_at(to, row, unit, boxes_a_row)]
            extra = [scale_of(row, unit)] if scale_of else [arith.extui(_i32(), keep(row))] if keep else []
            places.append(place + extra)
        text = _text(dtype, len(places), scale_of is not None, keep is not None)
        _asm(text, [x for place in places for x in place])


def _apart(unit: ir.Value, units_a_row: int) -> ir.Value:
    """Which unit a thread takes instead, in rows of an even number of boxes.

    Shared memory serves eight threads at a time. Units that stand alike in two boxes of a row go to the same banks, in
    rows next to each other to different ones. So those of odd boxes change places with those of the row next to theirs.
    """
    odd = arith.andi(arith.divui(unit, _c(CHUNK // UNIT)), _c(1))
    return arith.xori(unit, arith.muli(odd, _c(units_a_row)))


def _text(dtype: Any, count: int, scaled: bool, kept: bool) -> str:
    """PTX that expands `count` units. All are loaded before the first is stored, or each would wait for the one before.

    Operands of each unit: the address of the codes, those of both halves of the result, and the scale's address or
    whether the unit is kept, if either is told.
    """
    each = 4 if scaled or kept else 3
    lines = [
        f".reg .b32 c<{4 * count}>, x<{8 * count}>, s<{count}>, bias; .reg .b16 t<{count}>, low, high;",
        f".reg .pred p<{count}>; mov.b32 bias, 0x64806480;",
    ]
    for i in range(count):
        code, extra = 4 * i, each * i + 3
        lines.append(f"ld.shared.v4.b32 {{c{code}, c{code + 1}, c{code + 2}, c{code + 3}}}, [${each * i}];")
        lines += [f"ld.shared.b16 t{i}, [${extra}];"] if scaled else []
        lines += [f"setp.ne.b32 p{i}, ${extra}, 0;"] if kept else []
    for i in range(count):
        lines += [f"mov.b32 s{i}, {{t{i}, t{i}}};"] if scaled else []
        for j in range(4 * i, 4 * i + 4):
            lines += [f"selp.b32 c{j}, c{j}, 0, p{i};"] if kept else []
            halves = TO_HALVES[jnp.dtype(dtype).name]
            lines.append(halves.replace("$c", f"c{j}").replace("$l", f"x{2 * j}").replace("$h", f"x{2 * j + 1}"))
            lines += [f"mul.rn.f16x2 x{x}, x{x}, s{i};" for x in (2 * j, 2 * j + 1)] if scaled else []
        for half in range(2):
            of_half = ", ".join(f"x{8 * i + 4 * half + n}" for n in range(4))
            lines.append(f"st.shared.v4.b32 [${each * i + 1 + half}], {{{of_half}}};")
    return "{ " + " ".join(lines) + " }"


def _halves_at(tile: ir.Value, row: ir.Value, unit: ir.Value, boxes_a_row: int) -> list[ir.Value]:
    """Where the two sixteen bytes of a unit stand in a tile of boxes of 8 rows of 128 swizzled bytes."""
    box_bytes, row_bytes, in_box = hopper_pages.BOX * 2 * CHUNK, 2 * CHUNK, arith.andi(row, _c(hopper_pages.BOX - 1))
    units_a_row = CHUNK // UNIT
    box = arith.muli(arith.divui(row, _c(hopper_pages.BOX)), _c(boxes_a_row))
    box = arith.addi(box, arith.divui(unit, _c(units_a_row)))
    start = arith.addi(tile, arith.addi(arith.muli(box, _c(box_bytes)), arith.muli(in_box, _c(row_bytes))))
    first = arith.muli(arith.remui(unit, _c(units_a_row)), _c(2))
    pieces = [arith.xori(arith.addi(first, _c(half)), in_box) for half in range(2)]
    return [arith.addi(start, arith.muli(piece, _c(16))) for piece in pieces]


def _scale_at(scales: ir.Value, row: ir.Value, unit: ir.Value, odd: ir.Value) -> ir.Value:
    width = scales.type.shape[1]
    alternating = arith.cmpi(arith.CmpIPredicate.slt, odd, _c(0))
    other = arith.andi(arith.subi(row, arith.addi(odd, _c(1))), _c(1))
    shift = arith.select(alternating, other, odd)
    index = arith.addi(arith.muli(row, _c(width)), arith.addi(unit, shift))
    return arith.addi(_address(scales), arith.muli(index, _c(2)))


def _between(first: ir.Value, row: ir.Value, end: ir.Value) -> ir.Value:
    low = arith.cmpi(arith.CmpIPredicate.sge, row, first)
    return arith.andi(low, arith.cmpi(arith.CmpIPredicate.slt, row, end))


def _thread() -> ir.Value:
    """In its warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), _c(THREADS))


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(ref))


def _asm(text: str, operands: list[ir.Value]) -> None:
    registers = ",".join(["r"] * len(operands) + ["~{memory}"])
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, registers, has_side_effects=True)


def _c(value: int) -> ir.Value:
    return mgpu.c(value, _i32())


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)
