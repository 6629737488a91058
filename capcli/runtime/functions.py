"""Functions of one number, of as many numbers at once as a vector has. No division where a polynomial does as well.

The polynomials are least squares made minimax (Lawson's algorithm), in 32 bits with the highest power first.
"""

from __future__ import annotations

from collections.abc import Callable

from capcli.runtime.llvm import Vector

NONE, GELU, GELU_TANH, RELU, SILU = range(5)

_LOG2E = 1.44269504
_SHIFT = 12582912.0  # 1.5 · 2²³: adding it leaves no room for a fraction
_LOWEST, _HIGHEST = -125.0, 127.0  # exponents of normal numbers
# (2^f - 1)/f for f from -1/2 to 1/2; 2^f is off by 9.2e-8 of it at most.
_POWER = (0.0013264689, 0.009671506, 0.05550734, 0.24022242, 0.693147)
# log₂(erfc(a/√2)/2) for a from 0 to 12.9, so weighted that a·erfc(a/√2)/2 is off by 1.1e-7 at most.
_LOG_TAIL = (
    *(-7.078205e-07, 3.948096e-05, -0.00078930275, 0.008103917),
    *(-0.053409018, -0.4587963, -1.1511856, -0.9999958),
)
_END_OF_TAIL = 12.9


def power(z: Vector) -> Vector:
    """2ᶻ, of z limited to where neither 0 nor infinity comes out. z = n + f with the nearest whole n."""
    z = z.at_least(_LOWEST).at_most(_HIGHEST)
    shifted = z + _SHIFT
    f = z - (shifted - _SHIFT)
    return (_polynomial(f, _POWER) * f + 1.0) * shifted.power_of_two()


def exponential(x: Vector) -> Vector:
    """eˣ, to 2e-7 of it for x from -1 to 1 and to |x|·2e-7 beyond."""
    return power(x * _LOG2E)


def gelu(x: Vector) -> Vector:
    """x·Φ(x) = max(x, 0) - |x|·erfc(|x|/√2)/2, to 5e-7."""
    size = x.absolute()
    return x.at_least(0.0) - size * power(_polynomial(size.at_most(_END_OF_TAIL), _LOG_TAIL))


def gelu_tanh(x: Vector) -> Vector:
    """x·(1 + tanh u)/2 = x/(1 + e⁻²ᵘ) with u = √(2/π)·(x + 0.044715·x³)."""
    return x / (exponential((x + x * x * x * 0.044715) * -1.5957691216) + 1.0)


def silu(x: Vector) -> Vector:
    """x/(1 + e⁻ˣ)."""
    return x / (exponential(-x) + 1.0)


def relu(x: Vector) -> Vector:
    """max(x, 0)."""
    return x.at_least(0.0)


def _polynomial(x: Vector, coefficients: tuple[float, ...]) -> Vector:
    """By Horner's rule."""
    total = x.like(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


ACTIVATIONS: dict[int, Callable[[Vector], Vector]] = {GELU: gelu, GELU_TANH: gelu_tanh, RELU: relu, SILU: silu}
