"""The inner loops, as vectors of LLVM: sparse rows, small dense products, bits of numbers, and what threads wait with.

numba compiles a plain loop to a third of the speed, because LLVM then guesses which loop to vectorise and keeps sums in
memory. Here the vectors are named: `<T x float>` is one value, and LLVM maps it to the registers that the processor
has, four of AVX-512 for T = 64, eight of AVX2, or single numbers where there are no vectors.

Widths are types. `lanes` is a tuple whose length is the number of groups of 16 lanes; its members are never read. A
function that takes it is compiled once for each width, and numba can keep the code on disk, which it cannot for
functions that are made inside others.

Addresses are integers, strides are in bytes. Nothing is checked: `packing` and `arrangement` see to it that indices are
inside.

Letters: T lanes of a vector, one token in each; M rows that a dense product makes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

GROUP = 16  # lanes
GROUP_BYTES = 4 * GROUP

_FLOAT, _I1, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_TRIPLE, PROCESSOR, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
IS_X86 = _TRIPLE.startswith(("x86", "i386", "i686"))
HAS_AVX512 = "+avx512f" in _FEATURES
# M x 16 sums must fit the registers, and enough of them must be under way to hide the latency of an addition.
ROWS_AT_ONCE = 8 if HAS_AVX512 else 4


def lanes_of(width: int) -> tuple[int, ...]:
    """The tuple that stands for a width, a multiple of 16."""
    return (0,) * (width // GROUP)


def _width(lanes: Any) -> int:
    return GROUP * len(lanes)


# Building blocks -----------------------------------------------------------------------------------------------------


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """The number `index` of an array of `kind` at `address`."""
    return builder.load(builder.gep(_pointer(builder, address, kind), [index]))


def _splat(builder: Any, vector: Any, number: Any) -> Any:
    """The number in every lane."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _load(builder: Any, address: Any, vector: Any) -> Any:
    found = builder.load(_pointer(builder, address, vector))
    found.align = GROUP_BYTES
    return found


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, _pointer(builder, address, value.type)).align = GROUP_BYTES


def _call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call a function of LLVM or of the system by its name."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(known or ir.Function(builder.module, kind, name), arguments)


def _multiply_add(builder: Any, vector: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, as one operation where the processor has one."""
    return _call(builder, f"llvm.fmuladd.v{vector.count}f32", vector, [a, b, c])


def _is_true(builder: Any, flag: Any) -> Any:
    return flag if flag.type == _I1 else builder.trunc(flag, _I1)


def _started(builder: Any, flag: Any, stored: Callable[[], list[Any]], fresh: list[Any]) -> list[Any]:
    """`stored()` if the flag is set, else `fresh`."""
    before = builder.block
    loading, joined = builder.append_basic_block("stored"), builder.append_basic_block("started")
    builder.cbranch(_is_true(builder, flag), loading, joined)
    builder.position_at_end(loading)
    values = stored()
    builder.branch(joined)
    builder.position_at_end(joined)
    chosen = []
    for value, other in zip(values, fresh, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, loading)
        phi.add_incoming(other, before)
        chosen.append(phi)
    return chosen


def _summed(builder: Any, count: Any, sums: list[Any], step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """`sums` after `step(p, sums)` for each p below `count`; they stay in registers."""
    before = builder.block
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, _constant(0)), body, done)
    builder.position_at_end(body)
    place = builder.phi(_I64)
    inside = [builder.phi(value.type) for value in sums]
    new = step(place, inside)
    following = builder.add(place, _constant(1))
    for phi, first, later in zip([place, *inside], [_constant(0), *sums], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)
    builder.position_at_end(done)
    found = []
    for first, later in zip(sums, new, strict=True):
        phi = builder.phi(first.type)
        phi.add_incoming(first, before)
        phi.add_incoming(later, body)
        found.append(phi)
    return found


# Products ------------------------------------------------------------------------------------------------------------


@intrinsic
def sparse_row(typing: Any, lanes: Any, x: Any, y: Any, columns: Any, values: Any, count: Any, bias: Any, more: Any):
    """y[T] = bias + Σ_p values[p] · x[columns[p]][T], added to what y holds if `more`.

    x: rows of T floats, aligned to 64 bytes. columns: `count` numbers of 16 bits. values: as many floats. A kept weight
    costs one broadcast, T/16 loads and as many multiply-adds of 16 lanes.
    """
    width = _width(lanes)
    vector = ir.VectorType(_FLOAT, width)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, y, columns, values, count, bias, more = arguments
        start = _splat(builder, vector, bias)
        (start,) = _started(builder, more, lambda: [builder.fadd(_load(builder, y, vector), start)], [start])

        def step(place: Any, sums: list[Any]) -> list[Any]:
            column = builder.zext(_at(builder, columns, place, _I16), _I64)
            weight = _splat(builder, vector, _at(builder, values, place, _FLOAT))
            row = _load(builder, builder.add(x, builder.mul(column, _constant(4 * width))), vector)
            return [_multiply_add(builder, vector, weight, row, sums[0])]

        (total,) = _summed(builder, count, [start], step)
        _store(builder, total, y)
        return context.get_dummy_value()

    address = types.intp
    return types.void(lanes, *[address] * 4, types.int64, types.float32, types.boolean), generate


@intrinsic
def dense_rows(typing: Any, c: Any, a: Any, b: Any, count: Any, a_row: Any, a_step: Any, b_step: Any, more: Any):
    """c[m][16] = Σ_k a[m · a_row + k · a_step] · b[k · b_step][16] for m < M, added to what c holds if `more`.

    c: M groups of 16 floats, one after the other. a: single floats, each used for 16 lanes. b: groups. All M sums stay
    in registers.
    """
    vector = ir.VectorType(_FLOAT, GROUP)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, a, b, count, a_row, a_step, b_step, more = arguments
        places = [builder.add(c, _constant(row * GROUP_BYTES)) for row in range(ROWS_AT_ONCE)]
        zeros = [ir.Constant(vector, [0.0] * GROUP)] * ROWS_AT_ONCE
        sums = _started(builder, more, lambda: [_load(builder, place, vector) for place in places], zeros)

        def step(place: Any, sums: list[Any]) -> list[Any]:
            group = _load(builder, builder.add(b, builder.mul(place, b_step)), vector)
            column = builder.add(a, builder.mul(place, a_step))
            new = []
            for row, total in enumerate(sums):
                address = builder.add(column, builder.mul(a_row, _constant(row)))
                factor = _splat(builder, vector, builder.load(_pointer(builder, address, _FLOAT)))
                new.append(_multiply_add(builder, vector, factor, group, total))
            return new

        for place, total in zip(places, _summed(builder, count, sums, step), strict=True):
            _store(builder, total, place)
        return context.get_dummy_value()

    address = types.intp
    return types.void(address, address, address, types.int64, *[types.intp] * 3, types.boolean), generate


@intrinsic
def power_of_two(typing: Any, shifted: Any):
    """2ⁿ of a whole number n from -126 to 127, given as the float n + 1.5 · 2²³, whose last bits are those of n."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.add(builder.bitcast(arguments[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 23)), _FLOAT)

    return types.float32(types.float32), generate


# Threads -------------------------------------------------------------------------------------------------------------


@intrinsic
def fetch_add(typing: Any, address: Any, number: Any):
    """Add to the counter at an address; returns what it was before. No other thread comes between."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], _I64), arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def current(typing: Any, address: Any):
    """The counter at an address as other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], _I64), "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def pause(typing: Any):
    """Tell an x86 processor that this thread only waits; nothing on others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if IS_X86:
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing: Any):
    """Let another thread have the processor, where the system has a call for it that needs no library."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            _call(builder, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), generate


def instructions() -> str:
    """The vectors that this processor has, as people call them."""
    names = {"+avx512f": "AVX-512", "+avx2": "AVX2", "+avx": "AVX", "+sse2": "SSE2", "+neon": "NEON"}
    by_cpu = {"haswell": "AVX2"}
    return next((name for flag, name in names.items() if flag in _FEATURES.split(",")), by_cpu.get(PROCESSOR, "vectors"))
