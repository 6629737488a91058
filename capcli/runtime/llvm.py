"""Building blocks of vector code: numbers with the operators of Python that become instructions of LLVM, and loops.

Only types say how wide a vector is; LLVM maps `<T x float>` to the registers that the processor has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir

GROUP = 16  # lanes: one register of AVX-512, two of AVX2, four of SSE or NEON
GROUP_BYTES = 4 * GROUP

FLOAT, I1, I16, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def of_width(width: int) -> Any:
    """The type of `width` floats."""
    return ir.VectorType(FLOAT, width)


def integer(value: int) -> ir.Constant:
    """A whole number, as addresses and indices are."""
    return ir.Constant(I64, value)


@dataclass(frozen=True)
class Vector:
    """Floats side by side. Sums and products may be contracted to one operation, and no other liberty is taken: NaN and
    infinity are kept, and nothing is reordered."""

    builder: Any
    value: Any

    @property
    def type(self) -> Any:
        return self.value.type

    def like(self, number: float | Vector) -> Vector:
        """The number in every lane."""
        if isinstance(number, Vector):
            return number
        return Vector(self.builder, ir.Constant(self.type, [float(np.float32(number))] * self.type.count))

    def __add__(self, other: float | Vector) -> Vector:
        return Vector(self.builder, self.builder.fadd(self.value, self.like(other).value, flags=["contract"]))

    def __sub__(self, other: float | Vector) -> Vector:
        return Vector(self.builder, self.builder.fsub(self.value, self.like(other).value, flags=["contract"]))

    def __mul__(self, other: float | Vector) -> Vector:
        return Vector(self.builder, self.builder.fmul(self.value, self.like(other).value, flags=["contract"]))

    def __truediv__(self, other: float | Vector) -> Vector:
        return Vector(self.builder, self.builder.fdiv(self.value, self.like(other).value))

    def __rtruediv__(self, other: float) -> Vector:
        return self.like(other) / self

    def __neg__(self) -> Vector:
        return Vector(self.builder, self.builder.fneg(self.value))

    def at_least(self, least: float | Vector) -> Vector:
        """The larger of both; NaN stays."""
        bound = self.like(least)
        return self._chosen("<", bound, bound)

    def at_most(self, most: float | Vector) -> Vector:
        """The smaller of both; NaN stays."""
        bound = self.like(most)
        return self._chosen(">", bound, bound)

    def absolute(self) -> Vector:
        """Without its sign; NaN stays."""
        return self._chosen("<", self.like(0.0), -self)

    def zero_below(self, other: Vector, bound: float) -> Vector:
        """0 where the other is below the bound."""
        below = self.builder.fcmp_ordered("<", other.value, self.like(bound).value)
        return Vector(self.builder, self.builder.select(below, self.like(0.0).value, self.value))

    def _chosen(self, how: str, bound: Vector, instead: Vector) -> Vector:
        """`instead` where the comparison with the bound is true, which it never is of NaN."""
        beyond = self.builder.fcmp_ordered(how, self.value, bound.value)
        return Vector(self.builder, self.builder.select(beyond, instead.value, self.value))

    def root(self) -> Vector:
        """The square root."""
        name = f"llvm.sqrt.v{self.type.count}f32"
        return Vector(self.builder, call(self.builder, name, self.type, [self.value]))

    def power_of_two(self) -> Vector:
        """2ⁿ of whole numbers n from -126 to 127, given as n + 1.5 · 2²³, whose last bits are those of n."""
        whole = ir.VectorType(I32, self.type.count)
        bits = self.builder.add(self.builder.bitcast(self.value, whole), ir.Constant(whole, [127] * whole.count))
        shifted = self.builder.shl(bits, ir.Constant(whole, [23] * whole.count))
        return Vector(self.builder, self.builder.bitcast(shifted, self.type))


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def element(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """The number `index` of an array of `kind` at `address`."""
    return builder.load(builder.gep(pointer(builder, address, kind), [index]))


def splat(builder: Any, vector: Any, number: Any) -> Any:
    """The number in every lane."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def load(builder: Any, address: Any, vector: Any) -> Vector:
    """The floats at an aligned address."""
    found = builder.load(pointer(builder, address, vector))
    found.align = GROUP_BYTES
    return Vector(builder, found)


def store(builder: Any, vector: Vector, address: Any) -> None:
    """Put floats at an aligned address."""
    builder.store(vector.value, pointer(builder, address, vector.type)).align = GROUP_BYTES


def call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call a function of LLVM or of the system by its name."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(known or ir.Function(builder.module, kind, name), arguments)


def multiply_add(a: Vector, b: Vector, c: Vector) -> Vector:
    """a·b + c, as one operation where the processor has one."""
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return Vector(a.builder, call(a.builder, name, a.type, [a.value, b.value, c.value]))


def choice(builder: Any, flag: Any, stored: Callable[[], list[Vector]], fresh: list[Vector]) -> list[Vector]:
    """`stored()` if the flag is set, else `fresh`."""
    before = builder.block
    loading, joined = builder.append_basic_block("stored"), builder.append_basic_block("joined")
    builder.cbranch(flag if flag.type == I1 else builder.trunc(flag, I1), loading, joined)
    builder.position_at_end(loading)
    values = stored()
    builder.branch(joined)
    builder.position_at_end(joined)
    return [_phi(builder, [(a, loading), (b, before)]) for a, b in zip(values, fresh, strict=True)]


def loop(
    builder: Any, count: Any, state: list[Vector], step: Callable[[Any, list[Vector]], list[Vector]]
) -> list[Vector]:
    """`state` after `step(p, state)` for each p below `count`; it stays in registers."""
    before = builder.block
    body, done = builder.append_basic_block("body"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, integer(0)), body, done)
    builder.position_at_end(body)
    place = builder.phi(I64)
    inside = [builder.phi(vector.type) for vector in state]
    new = step(place, [Vector(builder, phi) for phi in inside])
    following = builder.add(place, integer(1))
    place.add_incoming(integer(0), before)
    place.add_incoming(following, body)
    for phi, first, later in zip(inside, state, new, strict=True):
        phi.add_incoming(first.value, before)
        phi.add_incoming(later.value, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, done)
    builder.position_at_end(done)
    return [_phi(builder, [(a, before), (b, body)]) for a, b in zip(state, new, strict=True)]


def _phi(builder: Any, incoming: list[tuple[Vector, Any]]) -> Vector:
    """The vector of the block that one comes from."""
    phi = builder.phi(incoming[0][0].type)
    for vector, block in incoming:
        phi.add_incoming(vector.value, block)
    return Vector(builder, phi)
