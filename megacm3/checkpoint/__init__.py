"""The native checkpoint: logical tensors in safetensors, one manifest, atomic commit."""
