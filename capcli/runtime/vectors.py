"""The inner loops, as vectors of LLVM: sparse rows, small dense products, softmax, and what threads wait with.

numba compiles a plain loop to a third of the speed, because LLVM then guesses which loop to vectorise and keeps sums in
memory. Here the vectors are named: `<T x float>` is one value, four registers of AVX-512 for T = 64, eight of AVX2, or
single numbers where there are no vectors.

Widths are types. `lanes` is a tuple whose length is the number of groups of 16 lanes; its members are never read. A
function that takes it is compiled once for each width, and numba can keep the code on disk, which it cannot for
functions that are made inside others.

Addresses are integers, strides are in bytes. Nothing is checked: `packing` and `arrangement` see to it that indices are
inside.

Letters: T lanes of a vector, one token in each; M rows that a dense product makes at once.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from capcli.runtime import functions, llvm
from capcli.runtime.llvm import FLOAT, GROUP, GROUP_BYTES, I16, I32, I64, Vector, integer

_TRIPLE, _PROCESSOR, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
IS_X86 = _TRIPLE.startswith(("x86", "i386", "i686"))
HAS_AVX512 = "+avx512f" in _FEATURES.split(",")
# M x 16 sums must fit the registers, and enough of them must be under way to hide the latency of an addition.
ROWS_AT_ONCE = 8 if HAS_AVX512 else 4
OUTSIDE = -3.4e38  # the score of a key that a query does not attend to
_GROUP = llvm.of_width(GROUP)
_ADDRESS, _COUNT = types.intp, types.int64


def instructions() -> str:
    """The vectors that code is made for, as people call them."""
    flags, names = _FEATURES.split(","), {"+avx512f": "AVX-512", "+avx2": "AVX2", "+neon": "NEON", "+sse2": "SSE2"}
    return next((name for flag, name in names.items() if flag in flags), _PROCESSOR)


def lanes_of(width: int) -> tuple[int, ...]:
    """The tuple that stands for a width, a multiple of 16."""
    return (0,) * (width // GROUP)


def _of(lanes: Any) -> Any:
    return llvm.of_width(GROUP * len(lanes))


# Products ------------------------------------------------------------------------------------------------------------


@intrinsic
def sparse_row(typing: Any, lanes: Any, x: Any, y: Any, columns: Any, values: Any, count: Any, bias: Any, more: Any):
    """y[T] = bias + Σ_p values[p] · x[columns[p]][T], added to what y holds if `more`.

    x: rows of T floats, aligned to 64 bytes. columns: `count` numbers of 16 bits. values: as many floats. A kept weight
    costs one broadcast, T/16 loads and as many multiply-adds of 16 lanes.
    """
    vector = _of(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, y, columns, values, count, bias, more = arguments
        start = Vector(builder, llvm.splat(builder, vector, bias))
        (start,) = llvm.choice(builder, more, lambda: [llvm.load(builder, y, vector) + start], [start])

        def step(place: Any, sums: list[Vector]) -> list[Vector]:
            column = builder.zext(llvm.element(builder, columns, place, I16), I64)
            weight = llvm.splat(builder, vector, llvm.element(builder, values, place, FLOAT))
            row = llvm.load(builder, builder.add(x, builder.mul(column, integer(4 * vector.count))), vector)
            return [llvm.multiply_add(Vector(builder, weight), row, sums[0])]

        (total,) = llvm.loop(builder, count, [start], step)
        llvm.store(builder, total, y)
        return context.get_dummy_value()

    return types.void(lanes, *[_ADDRESS] * 4, _COUNT, types.float32, types.boolean), generate


@intrinsic
def dense_rows(typing: Any, c: Any, a: Any, b: Any, count: Any, a_row: Any, a_step: Any, b_step: Any, more: Any):
    """c[m][16] = Σ_k a[m · a_row + k · a_step] · b[k · b_step][16] for m < M, added to what c holds if `more`.

    c: M groups of 16 floats, one after the other. a: single floats, each used for 16 lanes. b: groups. All M sums stay
    in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, a, b, count, a_row, a_step, b_step, more = arguments
        places = [builder.add(c, integer(row * GROUP_BYTES)) for row in range(ROWS_AT_ONCE)]
        zeros = [Vector(builder, ir.Constant(_GROUP, [0.0] * GROUP))] * ROWS_AT_ONCE
        sums = llvm.choice(builder, more, lambda: [llvm.load(builder, place, _GROUP) for place in places], zeros)

        def step(place: Any, sums: list[Vector]) -> list[Vector]:
            group = llvm.load(builder, builder.add(b, builder.mul(place, b_step)), _GROUP)
            column = builder.add(a, builder.mul(place, a_step))
            addresses = [builder.add(column, builder.mul(a_row, integer(row))) for row in range(ROWS_AT_ONCE)]
            factors = [builder.load(llvm.pointer(builder, address, FLOAT)) for address in addresses]
            spread = [Vector(builder, llvm.splat(builder, _GROUP, factor)) for factor in factors]
            return [llvm.multiply_add(factor, group, total) for factor, total in zip(spread, sums, strict=True)]

        for place, total in zip(places, llvm.loop(builder, count, sums, step), strict=True):
            llvm.store(builder, total, place)
        return context.get_dummy_value()

    return types.void(*[_ADDRESS] * 3, _COUNT, *[types.intp] * 3, types.boolean), generate


# Attention -----------------------------------------------------------------------------------------------------------


@intrinsic
def softmax(typing: Any, scores: Any, count: Any, shares: Any):
    """scores[j][16] = e^(score - highest of its lane) for j < count, and shares[16] = 1 / their sums, 0 if all are
    `OUTSIDE`.

    The highest are found in four interleaved parts; the first row stands in for those that are missing at the end.
    """
    parts = 4

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, shares = arguments

        def row(place: Any) -> Any:
            return builder.add(scores, builder.mul(place, integer(GROUP_BYTES)))

        def higher(place: Any, known: list[Vector]) -> list[Vector]:
            found = []
            for part, one in enumerate(known):
                at = builder.add(builder.mul(place, integer(parts)), integer(part))
                inside = builder.select(builder.icmp_signed("<", at, count), at, integer(0))
                found.append(one.at_least(llvm.load(builder, row(inside), _GROUP)))
            return found

        first = [llvm.load(builder, scores, _GROUP)] * parts
        rounds = builder.sdiv(builder.add(count, integer(parts - 1)), integer(parts))
        a, b, c, d = llvm.loop(builder, rounds, first, higher)
        highest = a.at_least(b).at_least(c.at_least(d))

        def step(place: Any, total: list[Vector]) -> list[Vector]:
            value = functions.exponential(llvm.load(builder, row(place), _GROUP) - highest)
            llvm.store(builder, value, row(place))
            return [total[0] + value]

        (total,) = llvm.loop(builder, count, [highest.like(0.0)], step)
        llvm.store(builder, (1.0 / total).zero_below(highest, 0.99 * OUTSIDE), shares)
        return context.get_dummy_value()

    return types.void(_ADDRESS, _COUNT, _ADDRESS), generate


@intrinsic
def put(typing: Any, out: Any, out_step: Any, rows: Any, count: Any, shares: Any, first: Any, end: Any):
    """out[d · out_step][16] = rows[d][16] · shares[16] for d < count, in the lanes from `first` to `end` alone."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, out_step, rows, count, shares, first, end = arguments
        whole = ir.VectorType(I32, GROUP)
        lanes = ir.Constant(whole, list(range(GROUP)))
        low, high = (llvm.splat(builder, whole, builder.trunc(bound, I32)) for bound in (first, end))
        inside = builder.and_(builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<", lanes, high))
        share = llvm.load(builder, shares, _GROUP)

        def step(place: Any, _: list[Vector]) -> list[Vector]:
            address = builder.add(out, builder.mul(place, out_step))
            row = llvm.load(builder, builder.add(rows, builder.mul(place, integer(GROUP_BYTES))), _GROUP) * share
            old = llvm.load(builder, address, _GROUP)
            llvm.store(builder, Vector(builder, builder.select(inside, row.value, old.value)), address)
            return []

        llvm.loop(builder, count, [], step)
        return context.get_dummy_value()

    return types.void(_ADDRESS, types.intp, _ADDRESS, _COUNT, _ADDRESS, _COUNT, _COUNT), generate


# Elementwise ---------------------------------------------------------------------------------------------------------


@intrinsic
def activate(typing: Any, lanes: Any, row: Any, activation: Any):
    """row[T] = f(row[T]) with the function of that number; nothing for NONE."""
    vector = _of(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, activation = arguments
        done = builder.append_basic_block("activated")
        switch = builder.switch(activation, done)
        for number, function in functions.ACTIVATIONS.items():
            block = builder.append_basic_block(function.__name__)
            switch.add_case(integer(number), block)
            builder.position_at_end(block)
            llvm.store(builder, function(llvm.load(builder, row, vector)), row)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(lanes, _ADDRESS, _COUNT), generate


@intrinsic
def normalise(typing: Any, lanes: Any, x: Any, y: Any, norm: Any, count: Any, epsilon: Any):
    """y = (x - mean)/√(variance + ε)·scale + shift over the `count` features of each token; x, y [count][T] may be one.

    norm: floats scale [count], then shift [count].
    """
    vector = _of(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, y, norm, count, epsilon = arguments
        zero = Vector(builder, ir.Constant(vector, [0.0] * vector.count))

        def row(address: Any, place: Any) -> Any:
            return builder.add(address, builder.mul(place, integer(4 * vector.count)))

        def spread(number: Any) -> Vector:
            return Vector(builder, llvm.splat(builder, vector, number))

        def parameter(place: Any) -> Vector:
            return spread(llvm.element(builder, norm, place, FLOAT))

        share = 1.0 / spread(builder.sitofp(count, FLOAT))
        (total,) = llvm.loop(builder, count, [zero], lambda p, sums: [sums[0] + llvm.load(builder, row(x, p), vector)])
        mean = total * share

        def square(place: Any, sums: list[Vector]) -> list[Vector]:
            away = llvm.load(builder, row(x, place), vector) - mean
            return [llvm.multiply_add(away, away, sums[0])]

        (squares,) = llvm.loop(builder, count, [zero], square)
        factor = 1.0 / (squares * share + spread(epsilon)).root()

        def write(place: Any, _: list[Vector]) -> list[Vector]:
            scaled = (llvm.load(builder, row(x, place), vector) - mean) * factor
            shift = parameter(builder.add(place, count))
            llvm.store(builder, llvm.multiply_add(scaled, parameter(place), shift), row(y, place))
            return []

        llvm.loop(builder, count, [], write)
        return context.get_dummy_value()

    return types.void(lanes, *[_ADDRESS] * 3, _COUNT, types.float32), generate


# Threads -------------------------------------------------------------------------------------------------------------


@intrinsic
def fetch_add(typing: Any, address: Any, number: Any):
    """Add to the counter at an address; returns what it was before. No other thread comes between."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", llvm.pointer(builder, arguments[0], I64), arguments[1], "seq_cst")

    return types.int64(_ADDRESS, types.int64), generate


@intrinsic
def current(typing: Any, address: Any):
    """The counter at an address as other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(llvm.pointer(builder, arguments[0], I64), "seq_cst", 8)

    return types.int64(_ADDRESS), generate


@intrinsic
def pause(typing: Any):
    """Tell an x86 processor that this thread only waits; nothing on others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if IS_X86:
            llvm.call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing: Any):
    """Let another thread have the processor, where the system has a call for it that needs no library."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if sys.platform != "win32":
            llvm.call(builder, "sched_yield", I32, [])
        return context.get_dummy_value()

    return types.void(), generate
