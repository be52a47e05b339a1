"""The `triton` backend: fused kernels with the relative bias inside, forward and backward."""

from genrec.attention.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
