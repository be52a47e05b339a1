"""Triton code of the attention kernels, by concept: tiles, mask, bias, activation, schedule, forward, backward."""
