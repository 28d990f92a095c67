"""No test touches the cache of whoever runs it."""

import os
import tempfile

os.environ["KIMI_LITE_IMAGE_CACHE"] = tempfile.mkdtemp(prefix="kimi-lite-tests-")
os.environ["KIMI_LITE_EXPERT_USAGE"] = tempfile.mkdtemp(prefix="kimi-lite-tests-")
os.environ["KIMI_LITE_KERNEL_CACHE"] = tempfile.mkdtemp(prefix="kimi-lite-tests-")
