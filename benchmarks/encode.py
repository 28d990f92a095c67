"""How much error do scales of one byte leave in q4b32, on normally distributed weights?

A group's scale is one of the few around its largest value over 8 (quantize/encode.py); the best of them is kept. Float16
scales with the best of three divisors are what int4 files held before. Prints root-mean-square error over
root-mean-square weight, and ends with one JSON line.
"""

import json

import numpy as np
from numpy.typing import NDArray

from kimi_lite.quantize import encode

CHOICES = {"one": (-1,), "two": (-1, 0), "four": encode.GRIDS["q4b32"].choices, "eight": tuple(range(-4, 4))}
DIVISORS = (-8.0, -8.8, -7.2)


def by_halves(weight_OI: NDArray[np.float32]) -> float:
    w_Gg = weight_OI.reshape(-1, 32)
    m_G = np.take_along_axis(w_Gg, np.abs(w_Gg).argmax(1, keepdims=True), 1)
    steps = [(m_G / d).astype(np.float16).astype(np.float32) for d in DIVISORS]
    errors = [((np.clip(np.rint(w_Gg / step), -8, 7) * step - w_Gg) ** 2).sum(1) for step in steps]
    return float(np.sqrt(np.min(errors, axis=0).sum() / (w_Gg**2).sum()))


def main() -> None:
    # As large as a trained model's: many bytes' scales are in use.
    weight_OI = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32) * np.float32(0.02)
    errors = {"float16, three": by_halves(weight_OI)}
    for name, choices in CHOICES.items():
        encode.GRIDS["q4b32"] = encode.Grid(1, choices)
        q_OI, scale_OG = encode.to_nearest(weight_OI, "q4b32")
        back_OI = np.repeat(scale_OG.astype(np.float32), 32, 1) * (q_OI.astype(np.float32) - 8)
        errors[name] = float(np.sqrt(((back_OI - weight_OI) ** 2).sum() / (weight_OI**2).sum()))
    for name, error in errors.items():
        print(f"{name:16} {error:.3%}")
    record = {name: round(error, 5) for name, error in errors.items()}
    print(
        json.dumps(
            {"bench": "encode", "layout": "q4b32", "weights": weight_OI.size, "relative_rms_error": record}
        )
    )


if __name__ == "__main__":
    main()
