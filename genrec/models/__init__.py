"""LightningModules for HSTU ranking and retrieval, and the baselines that they are compared with."""
