"""HSTU layers, sequence preprocessing, positions and heads: plain PyTorch modules."""
