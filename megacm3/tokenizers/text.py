"""The text tokenizer: sentencepiece BPE whose ids are the vocabulary's text ids.

Only `<unk>` (id 0, never produced, since bytes fall back to the 256 byte pieces) is not ordinary text: there are no
bos, eos or pad pieces, so that no caption can produce a special id. The normaliser is the identity and no space is
added or removed, so that every Unicode string comes back as it was. One character needs help: sentencepiece spells a
space as U+2581, therefore a literal U+2581 is escaped before encoding.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacm3.errors import ConfigError, DataError
from megacm3.files import new_folder, read_manifest, write_manifest

if TYPE_CHECKING:
    from megacm3.tokenizers.chameleon_text import ChameleonBackend
    from megacm3.tokenizers.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

KIND = "text_tokenizer"
MODEL = "text.model"
BYTE_PIECES = 256
"""Pieces that byte fallback reserves."""
_ESCAPE, _SPACE = "\x1a", "\u2581"
_MAX_LINE = 4096
"""Characters of one training line: sentencepiece drops longer ones, so longer texts are cut into lines."""
_TRAINING_THREADS = 1
"""The trainer's result does not depend on it; most of its time is one thread's anyway."""


def _escape(text: str) -> str:
    return text.replace(_ESCAPE, _ESCAPE + "0").replace(_SPACE, _ESCAPE + "1")


def _unescape(text: str) -> str:
    return text.replace(_ESCAPE + "1", _SPACE).replace(_ESCAPE + "0", _ESCAPE)


class SentencePieceBackend:
    """Encodes and decodes with a sentencepiece model."""

    names: dict[str, int] | None = None
    """Only Chameleon's tokenizer names its image codes."""

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=model)
        self.pieces: int = self._processor.get_piece_size()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode([_escape(text) for text in texts], out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return _unescape(self._processor.decode(ids))


class TextTokenizer:
    """A trained tokenizer. Make it with `TextTokenizer.load`."""

    def __init__(self, backend: "SentencePieceBackend | ChameleonBackend", size: int, fingerprint: str) -> None:
        self._backend = backend
        self.pieces = backend.pieces
        """Ids that have a meaning."""
        self.size = size
        """Ids of the layout; those from `pieces` up to `size` are reserved and never produced."""
        self.fingerprint = fingerprint
        """Fingerprint of the folder that it came from."""

    @staticmethod
    def load(folder: str | Path) -> "TextTokenizer":
        """Read a folder made by `train_text_tokenizer`.

        Raises DataError when it is missing, damaged or of another kind.
        """
        manifest = read_manifest(folder, KIND, verify="sha256")
        try:
            if manifest.settings["format"] == "chameleon":
                from megacm3.tokenizers.chameleon_text import FILE, ChameleonBackend

                backend: Any = ChameleonBackend((Path(folder) / FILE).read_text(encoding="utf-8"))
            else:
                backend = SentencePieceBackend((Path(folder) / MODEL).read_bytes())
            return TextTokenizer(backend, manifest.settings["vocab_size"], manifest.fingerprint)
        except (FileNotFoundError, KeyError, RuntimeError) as fault:
            raise DataError(f"{folder} is not a text tokenizer: {fault}") from fault

    @property
    def family(self) -> str:
        """Family of the vocabulary that it belongs to: chameleon or cm3leon."""
        return "cm3leon" if self._backend.names is None else "chameleon"

    def vocabulary(self, codebook_size: int, image_tokens: int) -> "Vocabulary":
        """The vocabulary of a run with this tokenizer: Chameleon's by the file's names, else CM3Leon's layout."""
        from megacm3.tokenizers.vocabulary import Vocabulary

        if self._backend.names is not None:
            return Vocabulary.chameleon(self.size, codebook_size, image_tokens, self._backend.names)
        return Vocabulary.cm3leon(self.size, codebook_size, image_tokens=image_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises DataError for text that is no Unicode (a lone surrogate)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        try:
            for text in texts:
                text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise DataError(f"text holds a lone surrogate and is not Unicode: {fault}") from fault
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; reserved ids give nothing. Raises DataError for an id outside [0, size)."""
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.size]
        if outside:
            raise DataError(f"id {outside[0]} is not a text id; expected 0..{self.size - 1}")
        return self._backend.decode([i for i in ids if i < self.pieces])


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = _escape(text)
        for start in range(0, len(text), _MAX_LINE):
            yield text[start : start + _MAX_LINE]


def finished(output: str | Path, settings: dict[str, Any], inputs: dict[str, str], *, overwrite: bool = False) -> bool:
    """Whether `output` was made already from these inputs and settings (format, vocab_size, max_lines).

    Raises DataError when it was made from others, unless `overwrite`.
    """
    if not Path(output).exists() or (Path(output).is_dir() and not any(Path(output).iterdir())):
        return False
    manifest = read_manifest(output, KIND, verify="sha256")
    wanted = settings | inputs
    found = manifest.settings | manifest.inputs
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if not different:
        return True
    if overwrite:
        return False
    name = different[0]
    raise DataError(
        f"{output} exists and was made with another {name} ({str(found.get(name))[:12]} then, {str(wanted[name])[:12]} "
        f"now); give another --output, or --overwrite to replace it"
    )


def train_text_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    max_lines: int = 10_000_000,
    inputs: dict[str, str] | None = None,
    further: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> TextTokenizer:
    """Train on `texts` and write the folder `output` (text.model, manifest.json).

    Digits are split into single pieces, as in CM3Leon's tokenizer patch. When the texts yield fewer pieces than
    `vocab_size`, the rest of the ids is reserved, so that the layout does not depend on the corpus. Of more than
    `max_lines` lines (pieces of at most 4,096 characters) a fixed random sample is taken, by sentencepiece itself.
    `further` settings (what chose the texts) go into the manifest.

    Raises ConfigError when `vocab_size` cannot hold the bytes and characters, DataError when there is no text.
    """
    import io

    import sentencepiece

    if vocab_size < BYTE_PIECES + 2:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: {BYTE_PIECES} byte pieces, <unk> and text need more"
        )
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for line in _lines(texts):
            count += 1
            yield line

    model = io.BytesIO()
    fault_of_input: Exception | None = None

    def guarded() -> Iterator[str]:
        # An exception inside sentencepiece's iterator would come back as an unnamed failure of its own.
        nonlocal fault_of_input
        try:
            yield from counted()
        except Exception as fault:
            fault_of_input = fault

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _MAX_LINE + 1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as fault:
        if fault_of_input is not None:
            raise fault_of_input from None
        if count == 0:
            raise DataError("there is no text to train on: the inputs hold no caption; check --input") from fault
        if "required_chars" in str(fault):
            numbers = str(fault).split("required_chars.")[-1].split(".")[0].strip()
            raise ConfigError(f"--vocab-size is too small for the characters of the text ({numbers} needed)") from fault
        raise
    if fault_of_input is not None:
        raise fault_of_input
    settings = {"format": "sentencepiece", "vocab_size": vocab_size, "max_lines": max_lines, "lines": count}
    settings |= further or {}
    with new_folder(output, replace=overwrite) as folder:
        (folder / MODEL).write_bytes(model.getvalue())
        write_manifest(folder, KIND, settings, inputs or {})
    tokenizer = TextTokenizer.load(output)
    logger.info("text tokenizer: %d pieces of %d ids from %d lines", tokenizer.pieces, vocab_size, count)
    return tokenizer


def save_chameleon(
    text: str, vocab_size: int, output: str | Path, *, settings: dict[str, Any], inputs: dict[str, str], overwrite: bool
) -> TextTokenizer:
    """Write a `tokenizers` JSON of Chameleon's shape as a tokenizer folder of `vocab_size` ids.

    Raises ConfigError when its table has more ids.
    """
    from megacm3.tokenizers.chameleon_text import FILE, ChameleonBackend

    pieces = ChameleonBackend(text).pieces
    if pieces > vocab_size:
        raise ConfigError(f"--vocab-size {vocab_size} is less than the {pieces} ids of the tokenizer")
    with new_folder(output, replace=overwrite) as folder:
        (folder / FILE).write_text(text, encoding="utf-8")
        write_manifest(folder, KIND, settings | {"format": "chameleon", "vocab_size": vocab_size}, inputs)
    return TextTokenizer.load(output)
