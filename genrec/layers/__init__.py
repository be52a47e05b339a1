# ruff: noqa: E402  (the check comes before the first import of torchrec)
"""HSTU layers, sequence preprocessing, positions and heads: plain PyTorch modules."""

from genrec.environment import require_torchrec

require_torchrec()

from genrec.layers.config import HSTUConfig
from genrec.layers.heads import MLP, L2Norm, MultiTaskHead, SwishLayerNorm, output_norm
from genrec.layers.hstu import HSTULayer, HSTUStack
from genrec.layers.preprocess import PreprocessorConfig, SequencePreprocessor
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
