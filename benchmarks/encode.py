"""How much error does each choice of divisors leave in q4g32, on normally distributed weights?

The scale of a group is its largest value over a divisor; of several divisors the best is kept (quantize/encode.py).
Prints root-mean-square error over root-mean-square weight, and ends with one JSON line.
"""

import json

import numpy as np

from kimi_lite.quantize import encode

CHOICES = {"one": (-8.0,), "three": (-8.0, -8.8, -7.2), "sixteen": tuple(np.linspace(-10, -7, 16).tolist())}


def main() -> None:
    weight_OI = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
    errors = {}
    for name, divisors in CHOICES.items():
        encode.DIVISORS = divisors
        q_OI, scale_OG = encode.quantize_q4g32(weight_OI)
        back_OI = np.repeat(scale_OG.astype(np.float32), 32, 1) * (q_OI.astype(np.float32) - 8)
        errors[name] = round(float(np.sqrt(((back_OI - weight_OI) ** 2).mean())), 5)
        print(f"{name:8} {errors[name]:.3%}")
    print(
        json.dumps(
            {"bench": "encode", "layout": "q4g32", "weights": weight_OI.size, "relative_rms_error": errors}
        )
    )


if __name__ == "__main__":
    main()
