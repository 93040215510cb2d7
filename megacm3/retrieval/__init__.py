"""The memory bank: encoder, index, neighbours and the sampler that feeds training."""
