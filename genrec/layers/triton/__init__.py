"""The layer backend `triton`: the parts of an HSTU layer outside its attention and its matrix products, fused.

* `norm`: layer norm and group norm, statistics saved.
* `silu`: SiLU and split of the first projection without copies; the gradients put together in one pass.
* `gate`: SiLU of the gate, norm of the attention's output, their product and dropout, in one pass.
* `dropout`: masks that are a function of seed and position.
* `rows`: rows of several tensors to their places in one, and back: concat, split and interleave of jagged tensors.
* `encodings`: scale, position and time encodings and dropout of the tokens in one pass; their tables' gradients.
* `layer`: the two halves of the layer made of these, `TritonLayerOps`.

The matrix products stay with cuBLAS, through the layer's own linear modules.
"""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}); python -m pip install 'genrec[triton]'") from error

from genrec.layers.triton.layer import TritonLayerOps

__all__ = ["TritonLayerOps"]
