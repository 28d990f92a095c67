"""The second engine: llama.cpp's forward pass under our tokenizer, template and sampler.

For machines whose graphics card llama.cpp drives and our kernels do not: Metal, Vulkan, ROCm. `LlamaEngine` keeps
`BaseEngine`'s promises, so that conversations, thinking, sampling, stop strings, budgets and statistics are the same
code. llama.cpp gets tokens and gives logits; it never sees text, and its own samplers and templates stay unused.

Pictures go through our image tower (vision.py), and its rows enter llama.cpp as embeddings. llama.cpp has an image side
of its own for this model, but its rows are others: docs/llama-engine.md has the measurement.

Logits are llama.cpp's: close to our engine's, not the same bits, and they depend a little on how a prompt is cut.

Dimension key:  T tokens of a step   D hidden   V vocabulary
"""

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, KimiLiteError, ModelFileError, UsageError
from kimi_lite.formats.config import TextConfig
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime import kernels
from kimi_lite.runtime.engine import BaseEngine
from kimi_lite.runtime.llama_bindings import ALL_LAYERS, IK_LLAMA, LLAMA
from kimi_lite.runtime.llama_bindings import bindings as open_bindings
from kimi_lite.runtime.model import OnLayer
from kimi_lite.runtime.vision import Place

MOST = 512  # layers or experts that llama.cpp has room for


class LlamaEngine(BaseEngine):
    """A standard GGUF file on llama.cpp. Not for two threads at once."""

    chunk = 512  # tokens of a step, as llama.cpp takes them by default

    def __init__(
        self,
        path: Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        bindings: str = LLAMA,
    ) -> None:
        """Load `path` and reserve room for `context` tokens, by default the model's own limit, at most 32768.

        Args:
            gpu_layers: layers that go to the graphics card, the output counting as one; by default all, if llama.cpp
                was built for one.
            bindings: the package to use, `llama_cpp` or `ik_llama_cpp`.

        Raises:
            ModelFileError: the file is missing, damaged, packed, another model's, or llama.cpp refuses it.
            UsageError: the package is missing or too old; a context, thread or layer count that cannot be.
            DoesNotFitError: llama.cpp has no room for the model or for the context.
        """
        self.llama = llama = open_bindings(bindings)
        config, vocab, kv_width = _read(path)
        super().__init__(path, config, vocab, context)
        kernels.set_threads(threads)  # of the image tower too
        n_layers = self._layers_on_card(gpu_layers)
        if bindings == IK_LLAMA:
            _check_ik_sizes(path, config)
        if not n_layers:
            self._check_room(2 * kv_width * config.n_layers * self.context)
        resources, api = ExitStack(), llama.api
        self._release = weakref.finalize(self, resources.close)
        model = self._load(n_layers)
        resources.callback(llama.free_model, model)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.context, self.chunk, self.chunk
        params.n_threads = params.n_threads_batch = kernels.threads()
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise self._no_room(llama.reason())
        resources.callback(api.llama_free, self._context)
        self._text = _Batch(api, self.chunk, 0, resources)
        self._rows = _Batch(api, self.chunk, config.hidden_size, resources)
        if bindings == IK_LLAMA:
            # The fork looks whether a first step of one token is its warm-up, also where there is an embedding instead.
            self.append([0])
            self.rewind(0)

    def step(self, n_left: int) -> int:
        return min(n_left, self.chunk)

    def forward(self, ids: Sequence[int], places: Sequence[Place], on_layer: OnLayer) -> NDArray[np.float32]:
        # A batch of llama.cpp holds tokens or embeddings, so pictures and text take turns.
        for is_text, run in groupby(range(len(ids)), lambda i: places[i] is None):
            at = list(run)
            batch = self._text if is_text else self._rows
            if is_text:
                batch.tokens_T[: len(at)] = [ids[i] for i in at]
            else:
                batch.rows_TD[: len(at)] = [place[0].rows_MD[place[1]] for i in at if (place := places[i])]
            self._decode(batch.filled(len(self.tokens) + at[0], len(at), logits=at[-1] == len(ids) - 1))
        on_layer(self.config.n_layers)
        logits = self.llama.api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.config.vocab_size,)).copy()

    def rewind(self, n: int) -> None:
        super().rewind(n)
        self.llama.forget(self._context, n)  # and what a step left that was interrupted before it was noted

    def _layers_on_card(self, asked: int | None) -> int:
        if asked is not None and asked < 0:
            raise UsageError(f"{asked} layers for the graphics card were asked for; give 0 or more")
        if asked and not self.llama.offloads():
            raise UsageError(
                f"{asked} layers for the graphics card were asked for, but this {self.llama.name} was built without a "
                "graphics backend, or finds no card for it; docs/llama-engine.md says how to build it with one"
            )
        if asked is not None:
            return asked
        return ALL_LAYERS if self.llama.offloads() else 0

    def _load(self, n_layers: int) -> int:
        """llama.cpp's model, with n layers on the graphics card."""
        llama = self.llama
        llama.errors.clear()
        params = llama.api.llama_model_default_params()
        params.n_gpu_layers = n_layers
        model: int | None = llama.api.llama_model_load_from_file(str(self.path).encode(), params)
        if model:
            return model
        if n_layers and "alloc" in llama.reason():
            raise DoesNotFitError(
                f"{self.path}: llama.cpp has no room for it ({llama.reason()}); it has {self.config.n_layers + 1} layers "
                "with the output, give the graphics card fewer with --gpu-layers"
            )
        raise ModelFileError(f"{self.path}: llama.cpp cannot load it ({llama.reason()})")

    def _decode(self, batch: Any) -> None:
        self.llama.errors.clear()
        code = self.llama.api.llama_decode(self._context, batch)
        if code:
            raise KimiLiteError(
                f"llama.cpp stopped at token {len(self.tokens)} with code {code} ({self.llama.reason()}); if the "
                "graphics card is out of memory, give it fewer layers with --gpu-layers, or ask for less --context"
            )

    def _check_room(self, needed: int) -> None:
        """llama.cpp takes and fills the whole cache at once, so what is missing is better said before."""
        free = psutil.virtual_memory().available
        if needed > free:
            raise self._no_room(f"its cache takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def _no_room(self, why: str) -> DoesNotFitError:
        return DoesNotFitError(
            f"{self.path}: llama.cpp has no room for a context of {self.context} tokens ({why}); "
            "ask for less with --context"
        )


class _Batch:
    """A llama_batch of one sequence: tokens, or `width` values of an embedding row in place of each."""

    def __init__(self, api: Any, size: int, width: int, resources: ExitStack) -> None:
        self._raw = raw = api.llama_batch_init(size, width, 1)
        resources.callback(api.llama_batch_free, raw)
        view = np.ctypeslib.as_array
        if width:
            self.rows_TD = view(raw.embd, (size, width))
        else:
            self.tokens_T = view(raw.token, (size,))
        self._positions_T, self._wanted_T = view(raw.pos, (size,)), view(raw.logits, (size,))
        view(raw.n_seq_id, (size,))[:] = 1
        for i in range(size):
            raw.seq_id[i][0] = 0

    def filled(self, start: int, n: int, *, logits: bool) -> Any:
        """The batch for llama_decode: n tokens from position `start` on; with `logits`, those after the last."""
        self._raw.n_tokens = n
        self._positions_T[:n] = np.arange(start, start + n)
        self._wanted_T[:n] = 0
        self._wanted_T[n - 1] = logits
        return self._raw


def _read(path: Path) -> tuple[TextConfig, Vocab, int]:
    """Configuration, vocabulary, and values that llama.cpp caches for a token of one layer.

    Our own reader looks first: it holds every length against the file, and names what is wrong with it.
    """
    file = GgufFile(path)
    if "kimi_lite.packed.version" in file.metadata:
        raise ModelFileError(
            f"{path}: a packed file, which only kimi-lite's own engine reads; give --engine llama.cpp a standard GGUF "
            "(kimi-lite quantize CHECKPOINT model.gguf --to q8_0), or leave --engine out"
        )
    c = TextConfig.from_gguf(file.metadata, str(path))
    vocab = Vocab.from_gguf(file.metadata, str(path))
    if vocab.size != c.vocab_size:
        raise ModelFileError(f"{path}: {vocab.size} tokens are named, but the model has {c.vocab_size}")
    latent = "deepseek2.attention.key_length_mla" in file.metadata
    key, value = c.nope_dim + c.rope_dim, c.value_dim  # in files of before April 2025
    if latent:
        key, value = c.kv_rank + c.rope_dim, c.kv_rank
    # llama.cpp ends the process on these instead of saying what is wrong with them.
    if max(c.n_layers, c.n_experts) > MOST:
        raise ModelFileError(
            f"{path}: {c.n_layers} layers with {c.n_experts} experts; llama.cpp takes at most {MOST} of each"
        )
    for name, expected in (
        ("attention.key_length", key),
        ("attention.value_length", value),
        ("attention.head_count_kv", 1 if latent else c.n_heads),
    ):
        if (found := file.metadata.get(f"deepseek2.{name}")) != expected:
            raise ModelFileError(
                f"{path}: deepseek2.{name} is {found}; llama.cpp needs {expected} here: quantize the model again"
            )
    return c, vocab, key if latent else c.n_heads * (key + value)


def _check_ik_sizes(path: Path, c: TextConfig) -> None:
    """ik_llama.cpp ends the process on other sizes than those of the published models."""
    found = (c.n_layers, c.n_heads % 16, c.kv_rank, c.nope_dim, c.rope_dim, c.value_dim)
    if found != (27, 0, 512, 128, 64, 128):
        raise ModelFileError(
            f"{path}: ik_llama.cpp runs this architecture with 27 layers and heads of 128 + 64 over a latent of 512 "
            f"only; this file has {c.n_layers} layers and {c.nope_dim} + {c.rope_dim} over {c.kv_rank}: use llama.cpp"
        )
