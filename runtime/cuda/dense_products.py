"""A layer's dense products by PyTorch, between our kernels: from the buffers of a step into the buffers of a step.

What is read is what the kernels wrote, what is written is what they read next, all on one stream. So the kernels of
norms, rotation, attention, routing and routed experts are the same with and without `--gpu-dense`.

Dimension key:  T tokens   D hidden   H heads   V value width   F MLP width
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from kimi_lite.runtime.cuda.halves import GROUP, Shape, Workspace
from kimi_lite.runtime.dense import backend
from kimi_lite.runtime.kernels import Float, Matrix


class Torch(Protocol):
    """What `bnb.TorchOnCard` offers."""

    def queued(self) -> AbstractContextManager[Any]: ...

    def tensor(self, address: int, dtype: str, shape: tuple[int, ...]) -> Any: ...

    def uploaded(self, values: Float) -> Any: ...

    def product(self, matrix: Matrix, address: int) -> Callable[[Any], Any]: ...


class TorchProducts:
    """The products of one layer, or of the head alone."""

    def __init__(
        self, torch: Torch, matrices: Mapping[str, Matrix], at: Mapping[str, int], shape: Shape | None = None
    ) -> None:
        """`at`: the addresses to which the matrices' data was uploaded."""
        self._torch, self._shape = torch, shape
        self._products = {name: torch.product(matrix, at[name]) for name, matrix in matrices.items()}
        self._products["silu"] = backend().silu

    def project(self, w: Workspace, T: int) -> None:
        """q and kv of the normalised rows in `h`."""
        s = self._known
        with self._torch.queued():
            h_TD = self._floats(w, "h", T, s.D)
            self._floats(w, "q", T, s.H * (s.N + s.R)).copy_(self._products["q"](h_TD))
            self._floats(w, "kv", T, s.C + s.R).copy_(self._products["kv_a"](h_TD))

    def output(self, w: Workspace, T: int) -> None:
        """x += o of the rows in `values`, which are int8 in groups of 32."""
        s = self._known
        rows = w.as_rows("values", w.tokens, s.H * s.V)
        with self._torch.queued():
            q_TGg = self._torch.tensor(rows.q, "i1", (T, rows.groups, GROUP))
            scale_TG1 = self._torch.tensor(rows.scale, "f4", (T, rows.groups, 1))
            values_TX = (q_TGg * scale_TG1).reshape(T, s.H * s.V)
            self._floats(w, "x", T, s.D).add_(self._products["o"](values_TX))

    def mlp(self, w: Workspace, T: int, out: int) -> None:
        """The shared MLP of the normalised rows in `h`, float32 [T, D] at `out`."""
        s = self._known
        with self._torch.queued():
            h_TD = self._floats(w, "h", T, s.D)
            both_TF = h_TD.new_empty((T, 2 * s.shared_F))
            both_TF[:, : s.shared_F] = self._products["gate"](h_TD)
            both_TF[:, s.shared_F :] = self._products["up"](h_TD)
            y_TD = self._products["down"](self._products["silu"](both_TF))
            self._torch.tensor(out, "f4", (T, s.D)).copy_(y_TD)

    def logits(self, w: Workspace, rows: int) -> None:
        """Of the normalised last row in `h`."""
        with self._torch.queued():
            h_1D = self._floats(w, "h", 1, w.D)
            self._floats(w, "logits", 1, rows).copy_(self._products["head"](h_1D))

    def run(self, name: str, x_TI: Float) -> Float:
        """One product of rows that the host has, awaited: for the proof."""
        with self._torch.queued():
            return np.asarray(self._products[name](self._torch.uploaded(x_TI)).cpu().numpy())

    def _floats(self, w: Workspace, name: str, n: int, width: int) -> Any:
        return self._torch.tensor(w.at[name], "f4", (n, width))

    @property
    def _known(self) -> Shape:
        assert self._shape is not None, "the head has no halves"
        return self._shape
