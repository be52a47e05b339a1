"""HSTU layers, sequence preprocessing, positions and heads: plain PyTorch modules.

The layers need nothing but torch. The preprocessing reads TorchRec's batches, and is imported when asked for.
"""

from genrec.layers.config import HSTUConfig
from genrec.layers.heads import MLP, L2Norm, MultiTaskHead, SwishLayerNorm, output_norm
from genrec.layers.hstu import HSTULayer, HSTUStack
from genrec.layers.tokens import TokenSequence
from genrec.layers.transformer import SASRecConfig, SASRecStack

__all__ = [
    "MLP",
    "HSTUConfig",
    "HSTULayer",
    "HSTUStack",
    "L2Norm",
    "MultiTaskHead",
    "PreprocessorConfig",
    "SASRecConfig",
    "SASRecStack",
    "SequencePreprocessor",
    "SwishLayerNorm",
    "TokenSequence",
    "output_norm",
]


def __getattr__(name: str) -> object:
    if name in ("PreprocessorConfig", "SequencePreprocessor"):
        from genrec.layers import preprocess

        return getattr(preprocess, name)
    raise AttributeError(f"module 'genrec.layers' has no attribute '{name}'")
