"""Runs a model: weights, kernels, text model, latent cache, sampling, engine."""

if __name__ != "kimi_lite.runtime":
    raise ImportError(
        f"import kimi_lite.runtime, not {__name__!r}: this folder ships inside the kimi_lite package"
    )
