"""Chameleon's text tokenizer: a `tokenizers` JSON whose table holds text, image codes by name, and special tokens.

The released file is read, and one of the same shape can be trained. Whatever the file says, text never becomes a
special or an image id: added tokens are taken out before encoding, and names that have no merges stay out of reach.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.vocabulary import Vocabulary, image_name

FILE = "tokenizer.json"
_CODES, _RESERVED = 8192, 514
"""Image codes, and reserved names up to <reserved08707> (id 8711), of the released table."""


def special_names() -> list[str]:
    """The names of ids 0..8711 of the released table, in order."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *(image_name(code) for code in range(_CODES)), "<eoss>", "<racm3:break>"]
    return names + [f"<reserved{n:05d}>" for n in range(_CODES + 2, _CODES + 2 + _RESERVED)]


class ChameleonBackend:
    """Encodes and decodes with a `tokenizers` JSON."""

    def __init__(self, text: str) -> None:
        """Raises DataError when `text` is no BPE tokenizer with every image code's name."""
        import tokenizers

        try:
            tree = json.loads(text)
            names = dict(tree["model"]["vocab"])
            names |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
            tree["added_tokens"], tree["post_processor"] = [], None
            tree["padding"] = tree["truncation"] = None
            # With ignore_merges a word that equals a name would become that name's id.
            tree["model"]["ignore_merges"] = False
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
        except (KeyError, TypeError, ValueError) as fault:
            raise DataError(f"not a BPE tokenizer of the package tokenizers: {fault}") from fault
        except Exception as fault:
            # The package raises bare Exception for a JSON that it does not understand.
            raise DataError(f"the package tokenizers cannot read it: {fault}") from fault
        self.names: dict[str, int] = names
        """Every name and its id."""
        self.pieces = max(names.values()) + 1

    def vocabulary(self, size: int, codebook_size: int, image_tokens: int) -> Vocabulary:
        """The run's vocabulary by the file's own names."""
        return Vocabulary.chameleon(size, codebook_size, image_tokens, self.names)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def train_chameleon(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE tokenizer of Chameleon's shape as JSON: its special and image names first, digits split.

    Raises ConfigError when `vocab_size` cannot hold the names and the 256 bytes, DataError when there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    names = special_names()
    if vocab_size < len(names) + 257:
        raise ConfigError(f"--vocab-size {vocab_size} is too small: {len(names)} names and 256 bytes need more")
    tokenizer = Tokenizer(models.BPE())
    digits, as_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += 1
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if count == 0:
        raise DataError("there is no text to train on: the inputs hold no caption; check --input")
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    # The names stay in the table; as added tokens they would be found in users' text.
    tree["added_tokens"] = []
    return json.dumps(tree, ensure_ascii=False)


def read_released(path: str | Path) -> str:
    """The text of a tokenizer JSON. Raises DataError when it is missing, none, or lacks an image code's name."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{path} cannot be read: {fault}") from fault
    try:
        backend = ChameleonBackend(text)
        backend.vocabulary(max(65536, backend.pieces), _CODES, 1024)
    except DataError as fault:
        raise DataError(f"{path}: {fault}") from fault
    return text
