"""One table of ids for text, image codes and special tokens.

CM3Leon (65,536 ids): text [0, 56320) | image [56320, 64512) | special [64512, 65536). The paper gives 56,320 and 8,192
(section 2.1); the 1,024 specials are what is left of 65,536 (inferred). Chameleon: the released table (codes 4..8195,
begin of image 8197, end of image 8196, end of turn 8710), kept as an explicit code -> id table by name.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.files import sha256_json

TEXT, IMAGE, SPECIAL, UNUSED = 0, 1, 2, 3
_FREE_SLOTS = 515
"""Ids from Chameleon's end of image to its placeholder `<image>`: <reservedNNNNN>, which are no text, lie between."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one run. Build it with `cm3leon`, `chameleon` or `from_json`."""

    family: str
    """cm3leon or chameleon."""
    size: int
    """Number of ids."""
    text_size: int
    """Number of text ids (the text tokenizer's size for cm3leon)."""
    codebook_size: int
    """Number of image codes."""
    image_tokens: int
    """Codes in one picture (grid height x width)."""
    special: tuple[tuple[str, int], ...]
    """Name -> id of every special token that has a use."""
    sentinels: int
    """Number of `<sentinel:n>` tokens."""
    image_table: tuple[int, ...] | int
    """Code -> id: the first id where the ids are consecutive, else the whole table."""

    @staticmethod
    def cm3leon(
        text_size: int = 56320,
        codebook_size: int = 8192,
        special_size: int = 1024,
        sentinels: int = 512,
        image_tokens: int = 1024,
    ) -> "Vocabulary":
        """CM3Leon's layout, text | image | special, of any size. Raises ConfigError when the specials do not fit."""
        first = text_size + codebook_size
        names = ["<pad>", "</s>", "<break>", "<eoss>", *(f"<sentinel:{n}>" for n in range(sentinels)), "<end-of-turn>"]
        if sentinels < 1 or len(names) > special_size:
            raise ConfigError(
                f"{sentinels} sentinels need {len(names)} special ids; found special_size = {special_size}"
            )
        special = tuple((name, first + i) for i, name in enumerate(names))
        size = first + special_size
        return Vocabulary("cm3leon", size, text_size, codebook_size, image_tokens, special, sentinels, text_size)

    @staticmethod
    def chameleon(
        size: int = 65536,
        codebook_size: int = 8192,
        image_tokens: int = 1024,
        names: dict[str, int] | None = None,
    ) -> "Vocabulary":
        """Chameleon's layout; `names` is a released tokenizer's name -> id table, by which codes are found.

        Raises DataError when `names` does not hold every code exactly once.
        """
        special = [("<s>", 0), ("<pad>", 1), ("</s>", 2), ("<unk>", 3)]
        if names is None:
            table: tuple[int, ...] | int = 4
            first = 4 + codebook_size
            special += [("<eoss>", first), ("<break>", first + 1), ("<end-of-turn>", first + 514)]
            special.append(("<image>", first + 515))
            if first + 516 > size:
                raise ConfigError(f"{codebook_size} codes and 520 other ids do not fit a vocabulary of {size}")
        else:
            table = _table_by_name(names, codebook_size)
            found = {"<eoss>": "<eoss>", "<break>": "<racm3:break>", "<end-of-turn>": "<reserved08706>"}
            special = [(name, names.get(name, i)) for name, i in special]
            special += [(ours, names[theirs]) for ours, theirs in found.items() if theirs in names]
            # transformers' converter renames a free slot to the placeholder for pictures.
            image = names.get("<image>", names.get("<reserved08707>"))
            special += [("<image>", image)] if image is not None else []
        text_size = size - codebook_size - len(special)
        return Vocabulary("chameleon", size, text_size, codebook_size, image_tokens, tuple(special), 0, table)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Vocabulary":
        """The inverse of `to_json`. Raises DataError when a field is missing."""
        try:
            table = value["image_table"]
            return Vocabulary(
                value["family"],
                value["size"],
                value["text_size"],
                value["codebook_size"],
                value["image_tokens"],
                tuple((name, i) for name, i in value["special"].items()),
                value["sentinels"],
                table if isinstance(table, int) else tuple(table),
            )
        except (KeyError, TypeError, AttributeError) as fault:
            raise DataError(f"the vocabulary table lacks a field: {fault}") from fault

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back."""
        table = self.image_table if isinstance(self.image_table, int) else list(self.image_table)
        plain = {name: getattr(self, name) for name in ("family", "size", "text_size", "codebook_size")}
        return plain | {
            "image_tokens": self.image_tokens,
            "special": dict(self.special),
            "sentinels": self.sentinels,
            "image_table": table,
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the table."""
        return sha256_json(self.to_json())

    @cached_property
    def _special(self) -> dict[str, int]:
        return dict(self.special)

    @property
    def pad(self) -> int:
        """`<pad>`"""
        return self._special["<pad>"]

    @property
    def eos(self) -> int:
        """`</s>`, which both opens and closes a CM3Leon sample."""
        return self._special["</s>"]

    @property
    def bos(self) -> int:
        """`<s>` for chameleon, `</s>` for cm3leon."""
        return self._special.get("<s>", self._special["</s>"])

    @property
    def break_(self) -> int:
        """`<break>`: the change of modality (cm3leon), begin of image (chameleon)."""
        return self._special["<break>"]

    @property
    def boi(self) -> int:
        """What stands before an image."""
        return self._special["<break>"]

    @property
    def eoi(self) -> int:
        """What stands after an image: `<eoss>` for chameleon, `<break>` for cm3leon."""
        return self._special["<eoss>" if self.family == "chameleon" else "<break>"]

    @property
    def eoss(self) -> int:
        """`<eoss>`: the end of an infilled span (cm3leon), end of image (chameleon)."""
        return self._special["<eoss>"]

    @property
    def end_of_turn(self) -> int:
        """What stands between prompt and answer in Chameleon's fine-tuning."""
        return self._special["<end-of-turn>"]

    def sentinel(self, n: int) -> int:
        """`<sentinel:n>`"""
        assert 0 <= n < self.sentinels, f"sentinel {n} of {self.sentinels}"
        return self._special["<sentinel:0>"] + n

    @cached_property
    def kind(self) -> np.ndarray:
        """uint8 [size]: TEXT, IMAGE, SPECIAL or UNUSED for every id."""
        kind = np.full(self.size, TEXT, np.uint8)
        if self.family == "cm3leon":
            kind[self.text_size :] = UNUSED
        else:
            # Ids that an import added stand behind the table's own.
            kind[self.text_size + self.codebook_size + len(self.special) :] = UNUSED
            first, last = self.eoi, self._special.get("<image>", 0)
            if last - first == _FREE_SLOTS:
                kind[first:last] = UNUSED
        kind[self.code_to_id] = IMAGE
        kind[list(self._special.values())] = SPECIAL
        return kind

    @cached_property
    def code_to_id(self) -> np.ndarray:
        """int64 [codebook_size]."""
        if isinstance(self.image_table, int):
            return np.arange(self.image_table, self.image_table + self.codebook_size, dtype=np.int64)
        return np.asarray(self.image_table, np.int64)

    @cached_property
    def id_to_code(self) -> np.ndarray:
        """int64 [size], -1 where the id is not an image code."""
        table = np.full(self.size, -1, np.int64)
        table[self.code_to_id] = np.arange(self.codebook_size)
        return table

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes (any shape, 0..codebook_size-1) -> ids. Raises DataError for a code out of range."""
        codes = np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise DataError(
                f"image codes {codes.min()}..{codes.max()} outside the codebook 0..{self.codebook_size - 1}"
            )
        return self.code_to_id[codes]

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Ids -> codes, -1 where an id is not an image code."""
        return self.id_to_code[np.asarray(ids)]

    def is_image(self, ids: np.ndarray) -> np.ndarray:
        """bool, the shape of `ids`."""
        return self.kind[np.asarray(ids)] == IMAGE

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """bool, the shape of `ids`."""
        return self.kind[np.asarray(ids)] == TEXT

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """bool, the shape of `ids`."""
        return self.kind[np.asarray(ids)] == SPECIAL


def image_name(code: int) -> str:
    """The released spelling of an image code: digits as letters A..J between IMGIMG and Z (57 -> IMGIMGFHZ)."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _table_by_name(names: dict[str, int], codebook_size: int) -> tuple[int, ...]:
    missing = [code for code in range(codebook_size) if image_name(code) not in names]
    if missing:
        raise DataError(f"the tokenizer has no entry {image_name(missing[0])} (code {missing[0]})")
    table = tuple(names[image_name(code)] for code in range(codebook_size))
    if len(set(table)) != codebook_size:
        raise DataError("two image codes share one id in the tokenizer")
    return table
