"""Documents from a memory bank for the front of a prompt, and samples ordered by the bank's CLIP."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacm3.data.documents import Document
from megacm3.data.store import Store
from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.encoder import Encoder


class Retriever:
    """A bank with its store and encoder. Make it with `Retriever.open`."""

    def __init__(self, bank: MemoryBank, store: Store, encoder: Encoder):
        self.bank, self.store, self.encoder = bank, store, encoder

    @staticmethod
    def open(
        bank: str | Path, store: str | Path | None = None, encoder: str | Path | None = None, device: str = "cpu"
    ) -> "Retriever":
        """`store` None: the folder `store` beside the bank; `encoder` None: the bank's own copy.

        Raises DataError when one is missing or the store or encoder is not the bank's.
        """
        opened = MemoryBank.open(bank)
        place = Path(bank).parent / "store" if store is None else Path(store)
        if store is None and not place.is_dir():
            raise ConfigError(f"the bank {bank} was made from a store that is not at {place}; say where with --store")
        documents = Store.open(place)
        if documents.fingerprint != opened.inputs.get("store"):
            raise DataError(
                f"{place} is store {documents.fingerprint[:12]}; the bank {bank} was made from store "
                f"{opened.inputs.get('store', '')[:12]}; give that one with --store"
            )
        if encoder is None:
            return Retriever(opened, documents, opened.encoder(device))
        loaded = Encoder.load(encoder, device)
        opened.check_encoder(loaded)
        return Retriever(opened, documents, loaded)

    def documents(self, prompts: Sequence[str], count: int) -> list[list[Document]]:
        """For each prompt the `count` documents (0-2 in the paper) whose vectors are nearest to its text's."""
        if count < 0:
            raise ConfigError(f"--documents {count}; expected 0 (none) or more")
        if count == 0 or not prompts:
            return [[] for _ in prompts]
        _, ids = self.bank.search(self.encoder.encode_texts(list(prompts)), count)
        return [[self.store.document(int(i)) for i in row if i >= 0] for row in ids]


def rerank(encoder: Encoder, prompt: str, pixels: np.ndarray) -> np.ndarray:
    """int64 [n]: pictures uint8 [n, s, s, 3] by falling inner product with the prompt (CLIP score)."""
    scores = encoder.encode_images(pixels) @ encoder.encode_texts([prompt])[0]
    return np.argsort(-scores, kind="stable")
