"""Turns a published checkpoint into GGUF or packed int4 files."""

if __name__ != "kimi_lite.quantize":
    raise ImportError(
        f"import kimi_lite.quantize, not {__name__!r}: this folder ships inside the kimi_lite package"
    )
