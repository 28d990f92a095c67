"""`python -m kimi_lite.quantize` is `kimi-lite quantize`."""

import sys

from kimi_lite.__main__ import main

main(["quantize", *sys.argv[1:]])
