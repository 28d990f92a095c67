"""Tolerances with a proof behind them. No test writes a bare atol.

The bound is Higham's (Accuracy and Stability of Numerical Algorithms, 2nd ed., Lemma 3.1): n roundings of unit
roundoff u change a sum of products by at most gamma(n) times the sum of their magnitudes.
"""

import numpy as np
from numpy.typing import NDArray

U32 = 2.0**-24  # unit roundoff of float32, round to nearest
U16 = 2.0**-11  # float16
U_BF16 = 2.0**-8


def gamma(n: int, u: float = U32) -> float:
    """n u / (1 - n u), the factor by which n roundings can change a sum of products."""
    assert n * u < 1, f"{n} roundings of size {u} leave no correct digit"
    return n * u / (1 - n * u)


def assert_dot_close(
    actual_O: NDArray[np.floating],
    weight_OI: NDArray[np.floating],
    x_I: NDArray[np.floating],
    *,
    roundings: int,
) -> None:
    """|computed - exact| <= gamma(n) |W| |x|, where n is the longest chain of roundings in the kernel."""
    exact_O = weight_OI.astype(np.float64) @ x_I.astype(np.float64)
    magnitude_O = np.abs(weight_OI).astype(np.float64) @ np.abs(x_I).astype(np.float64)
    bound_O = np.maximum(gamma(roundings) * magnitude_O, np.finfo(np.float32).tiny)
    used_O = np.abs(actual_O - exact_O) / bound_O
    o = int(used_O.argmax())
    assert used_O[o] <= 1, f"row {o}: got {actual_O[o]!r}, exact {exact_O[o]!r}, {used_O[o]:.2f}x the bound"
