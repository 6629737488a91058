"""Functions of one number, of as many numbers at once as a vector has."""

from __future__ import annotations

from collections.abc import Callable

from capcli.runtime.llvm import Vector

NONE, GELU, GELU_TANH, RELU, SILU = range(5)

_LOG2E = 1.44269504
_SHIFT = 12582912.0  # 1.5 · 2²³: adding it leaves no room for a fraction
_LN2 = (0.693359375, -2.12194440e-4)  # in two parts, the first with few bits
_EXPONENTIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_LOWEST, _HIGHEST = -87.0, 88.0  # of the exponent, so that the result is a normal number


def exponential(x: Vector) -> Vector:
    """eˣ to 2 units in the last place, of x limited to -87 to 88 (Cephes, expf).

    x = n·ln 2 + r with a whole n, and a polynomial for eʳ.
    """
    x = x.at_least(_LOWEST).at_most(_HIGHEST)
    shifted = x * _LOG2E + _SHIFT
    n = shifted - _SHIFT
    r = x - n * _LN2[0] - n * _LN2[1]
    return (_polynomial(r, _EXPONENTIAL) * r * r + r + 1.0) * shifted.power_of_two()


def gelu(x: Vector) -> Vector:
    """x·Φ(x) = max(x, 0) - |x|·erfc(|x|/√2)/2, erfc by Abramowitz and Stegun 7.1.26: |error| < 1.5e-7."""
    size = x.absolute()
    u = size * 0.70710678
    t = 1.0 / (u * 0.3275911 + 1.0)
    return x.at_least(0.0) - size * (_polynomial(t, _ERFC) * t * 0.5 * exponential(-(u * u)))


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
    """By Horner's rule, the highest power first."""
    total = x.like(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


ACTIVATIONS: dict[int, Callable[[Vector], Vector]] = {GELU: gelu, GELU_TANH: gelu_tanh, RELU: relu, SILU: silu}
