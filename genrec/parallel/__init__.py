"""The strategy that shards tables with TorchRec and dense layers with Megatron-Core."""
