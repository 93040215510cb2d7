"""What a rank really holds: bytes of all distinct tensor storages alive in the process."""

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensor


def live_bytes() -> int:
    """Sum of the sizes of all distinct CPU storages that a tensor in this process refers to."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance would wake lazy proxies of other libraries.
        if not issubclass(type(thing), torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            # What a compiler leaves behind has no storage of its own.
            if tensor is not None and not tensor.is_meta and not isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
