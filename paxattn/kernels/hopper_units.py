"""Units of sixteen numbers on Hopper, below Pallas: a row of an array [128, 16] is one, and a thread has all of it.

Neighbouring lanes have the units of a head. What needs all numbers of a head is exchanged by shuffles.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from paxattn.kernels.hopper_codes import UNIT
from paxattn.kernels.hopper_lanes import LANES

ROWS = 128
UNITS = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, UNIT), (LANES, UNIT))), (-4,), (-2,), -1)
EACH = UNITS.reduce(1)  # of a number for each unit
TO_INTEGER = 1.5 * 2**23  # What is added to this is rounded to an integer, and its last byte is that of one.
SIGN = (  # of what a lane has itself, beside what it gets
    "{{ .reg .b32 l; .reg .pred p; mov.u32 l, %laneid; and.b32 l, l, {}; setp.eq.u32 p, l, 0; "
    "selp.f32 $0, 1.0, -1.0, p; }}"
)


def turn(x: Array, block: int) -> Array:
    """x [128, 16] times a Hadamard matrix, of blocks of so many numbers in neighbouring lanes, as `codes.rotate` has it
    but for the factor."""

    @plgpu.inline_mgpu(arg_types=(UNITS,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, UNITS))
    def issue(_, x):
        numbers = _numbers(x)
        for stride in (1, 2, 4, 8):
            for low in range(UNIT):
                if not low & stride:
                    a, b = numbers[low], numbers[low | stride]
                    numbers[low], numbers[low | stride] = arith.addf(a, b), arith.subf(a, b)
        for stride in _strides(block // UNIT):
            sign = _asm(SIGN.format(stride), [], ir.F32Type.get())
            numbers = [math.fma(own, sign, mgpu.utils.shfl_bfly(own, stride)) for own in numbers]
        return _array(_vector(numbers, ir.F32Type.get()), UNITS, x.shape)

    return issue(x)


def largest(x: Array) -> Array:
    """Of each unit of x [128, 16] the largest magnitude; NaN where there is one."""
    return _reduced(lambda numbers: _tree(arith.maximumf, [math.absf(n) for n in numbers]), x)


def over_lanes_sum(x: Array, lanes: int) -> Array:
    """x [128] summed over so many neighbouring lanes, in each of them to the same bits."""
    return _over_lanes(arith.addf, x, lanes)


def over_lanes_max(x: Array, lanes: int) -> Array:
    """The largest of x [128] over so many neighbouring lanes; NaN where there is one."""
    return _over_lanes(arith.maximumf, x, lanes)


def sums(x: Array, inverse: Array, dtype: Any) -> tuple[Array, Array]:
    """Of each unit of x [128, 16] times its `inverse`, as the dtype has it: the sum of squares, and of products with x.

    No product is larger than the dtype's largest number, but for rounding.
    """
    one = plgpu.ShapeDtypeStruct(inverse.shape, jnp.float32, EACH)

    @plgpu.inline_mgpu(arg_types=(UNITS, EACH), return_type=(one, one))
    def issue(_, x, inverse):
        numbers, [factor] = _numbers(x), _numbers(inverse)
        rounded = _rounded(numbers, factor, dtype)
        results = []
        for others in (rounded, numbers):
            total = arith.mulf(rounded[0], others[0])
            for a, b in zip(rounded[1:], others[1:], strict=True):
                total = math.fma(a, b, total)
            results.append(_array(_vector([total], ir.F32Type.get()), EACH, inverse.shape))
        return tuple(results)

    return issue(x, inverse)


def codes(x: Array, inverse: Array, dtype: Any) -> Array:
    """x [128, 16] times each unit's `inverse`, as the dtype has it; of NaN int8 has something."""

    @plgpu.inline_mgpu(arg_types=(UNITS, EACH), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, UNITS))
    def issue(_, x, inverse):
        numbers, [factor] = _numbers(x), _numbers(inverse)
        words = [_word(numbers[i : i + 4], factor, dtype) for i in range(0, UNIT, 4)]
        kind = ir.VectorType.get((UNIT,), mgpu.utils.dtype_to_ir_type(dtype))
        packed = vector.bitcast(kind, _vector(words, ir.IntegerType.get_signless(32)))
        return _array(packed, UNITS, x.shape, is_signed=True if dtype == jnp.int8 else None)

    return issue(x, inverse)


def _word(four: list[ir.Value], inverse: ir.Value, dtype: Any) -> ir.Value:
    """Four codes, the first in the last byte."""
    if dtype == jnp.int8:
        text = "{ .reg .b32 l, h; prmt.b32 l, $1, $2, 0x0040; prmt.b32 h, $3, $4, 0x0040; prmt.b32 $0, l, h, 0x5410; }"
        operands = [_lifted(n, inverse) for n in four]
    else:
        convert = "cvt.rn.satfinite.e4m3x2.f32"
        text = f"{{ .reg .b16 l, h; {convert} l, $2, $1; {convert} h, $4, $3; mov.b32 $0, {{l, h}}; }}"
        operands = [arith.mulf(n, inverse) for n in four]
    return _asm(text, operands, ir.IntegerType.get_signless(32))


def _rounded(numbers: list[ir.Value], inverse: ir.Value, dtype: Any) -> list[ir.Value]:
    """The codes' values, float32."""
    f32 = ir.F32Type.get()
    if dtype == jnp.int8:
        return [arith.subf(_lifted(n, inverse), mgpu.c(TO_INTEGER, f32)) for n in numbers]
    text = (
        "{ .reg .b16 c, l, h; .reg .b32 t; cvt.rn.satfinite.e4m3x2.f32 c, $3, $2; cvt.rn.f16x2.e4m3x2 t, c; "
        "mov.b32 {l, h}, t; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    )
    scaled, results = [arith.mulf(n, inverse) for n in numbers], []
    for pair in zip(scaled[::2], scaled[1::2], strict=True):
        both = _asm(text, list(pair), llvm.StructType.get_literal([f32, f32]), "=f,=f")
        results += [llvm.extractvalue(f32, both, ir.DenseI64ArrayAttr.get([i])) for i in range(2)]
    return results


def _lifted(number: ir.Value, inverse: ir.Value) -> ir.Value:
    return math.fma(number, inverse, mgpu.c(TO_INTEGER, ir.F32Type.get()))


def _over_lanes(combine: Callable[..., ir.Value], x: Array, lanes: int) -> Array:
    def of_numbers(numbers: list[ir.Value]) -> ir.Value:
        [own] = numbers
        for stride in _strides(lanes):
            own = combine(own, mgpu.utils.shfl_bfly(own, stride))
        return own

    return _reduced(of_numbers, x, EACH)


def _reduced(of_numbers: Callable[[list[ir.Value]], ir.Value], x: Array, layout: Any = UNITS) -> Array:
    """What a function of a thread's numbers gives, [128] float32."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape[:1], jnp.float32, EACH))
    def issue(_, x):
        return _array(_vector([of_numbers(_numbers(x))], ir.F32Type.get()), EACH, x.shape[:1])

    return issue(x)


def _strides(lanes: int) -> list[int]:
    return [1 << i for i in range(lanes.bit_length() - 1)]


def _tree(combine: Callable[..., ir.Value], numbers: list[ir.Value]) -> ir.Value:
    while len(numbers) > 1:
        numbers = [combine(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]


def _numbers(x: Any) -> list[ir.Value]:
    """Of this thread."""
    [register] = x.registers.flat
    places = (ir.DenseI64ArrayAttr.get([i]) for i in range(x.layout.vector_length))
    return [vector.extract(register, dynamic_position=[], static_position=place) for place in places]


def _vector(numbers: list[ir.Value], element: ir.Type) -> ir.Value:
    return vector.from_elements(ir.VectorType.get((len(numbers),), element), numbers)


def _array(register: ir.Value, layout: Any, shape: tuple[int, ...], is_signed: bool | None = None) -> Any:
    layout = layout.to_mgpu()
    registers = mgpu.FragmentedArray.splat(mgpu.c(0, ir.F32Type.get()), shape, layout).registers.copy()
    registers.flat[0] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def _asm(text: str, operands: list[ir.Value], result: ir.Type, outputs: str | None = None) -> ir.Value:
    letter = lambda kind: "f" if kind == ir.F32Type.get() else "r"
    constraints = ",".join([outputs or "=" + letter(result), *(letter(x.type) for x in operands)])
    return llvm.inline_asm(result, operands, text, constraints)
