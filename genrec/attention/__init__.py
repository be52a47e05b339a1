"""HSTU attention: one op, swappable backends."""

from genrec.attention.ops import attention_spec, hstu_attention
from genrec.attention.registry import UnsupportedAttentionError, registry
from genrec.attention.spec import AttentionMask, AttentionSpec, RelativeBias, time_bucket, time_bucket_edges

__all__ = [
    "AttentionMask",
    "AttentionSpec",
    "RelativeBias",
    "UnsupportedAttentionError",
    "attention_spec",
    "hstu_attention",
    "registry",
    "time_bucket",
    "time_bucket_edges",
]
