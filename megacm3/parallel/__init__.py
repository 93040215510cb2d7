"""The correctness layer between megatron-core and DeepSpeed."""
