"""`Generator`: pictures, captions, answers, fillings and interleaved documents from an exported folder.

generator = Generator.load("runs/quickstart/hf")
pixels = generator.images(["a red apple"], guidance=3.0, seed=0)      # uint8 [prompts, n, s, s, 3]
texts = generator.caption(pixels[:, 0])
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacm3.command import seed_from
from megacm3.data.documents import Document, Segment, image_to_text_prompt, infill_caption_prompt
from megacm3.errors import CheckpointError, ConfigError, DataError
from megacm3.files import read_json
from megacm3.inference.decoder import Decoder
from megacm3.inference.engine import Engine, Event, Request, no_guides
from megacm3.inference.guidance import ClassifierFree, Guidance, Plain, ThreeStream, choose_guidance
from megacm3.inference.modality import Grammar, Modes
from megacm3.inference.pieces import Part, Piece, Prompt, Retrieved, TextWriter, Wish
from megacm3.inference.requests import (
    Mask,
    guides_for,
    image_segment,
    infill,
    open_prompt,
    picture_prompt,
    running_guides,
    text_segment,
)
from megacm3.inference.sampling import Sampling
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary

SIDECAR = "megacm3.json"
SERVED_TEXT = Sampling(0.7, top_p=0.9, repetition_penalty=1.2)
SERVED_IMAGE = Sampling(0.7, top_p=0.9)


class Generator:
    """A model folder ready to decode. Make it with `Generator.load`."""

    def __init__(self, folder: Path, decoder: Decoder, sidecar: dict[str, Any], device: str):
        self.folder, self.decoder, self._device = folder, decoder, device
        self.vocabulary = Vocabulary.from_json(sidecar["vocabulary"])
        self.source: dict[str, Any] = sidecar.get("source", {})
        """Fingerprints of what the model was made from, by role."""
        self.answers: bool = sidecar.get("answers", False)
        """Fine-tuned to answer behind `<end-of-turn>` (objective.loss_on = answers)."""
        self._image_size: int = sidecar["image_size"]
        self.grid: tuple[int, int] = (sidecar["grid"][0], sidecar["grid"][1])
        self.context = min(decoder.architecture.positions, sidecar["sequence_length"])
        rows = decoder.architecture.vocab_size
        if rows < self.vocabulary.size or self.grid[0] * self.grid[1] != self.vocabulary.image_tokens:
            raise CheckpointError(
                f"{folder}: the vocabulary has {self.vocabulary.size} ids and {self.vocabulary.image_tokens} codes a "
                f"picture; the model has {rows} rows, the grid is {self.grid[0]} x {self.grid[1]}"
            )
        self.grammar = Grammar(self.vocabulary, rows, decoder.device)

    @staticmethod
    def load(
        folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, int8: bool = False
    ) -> "Generator":
        """Read an exported folder; `dtype` None means fp32 on CPU, bf16 on CUDA; `int8`: 8-bit matrices (CPU).

        Raises CheckpointError for a folder that is missing or damaged, ConfigError for a device that is not there.
        """
        folder = Path(folder)
        if dtype is None:
            dtype = torch.float32 if device.startswith("cpu") else torch.bfloat16
        decoder = Decoder.load(folder, device, dtype, int8)
        sidecar = read_json(folder / SIDECAR, error=CheckpointError)
        keys = ("vocabulary", "image_size", "grid", "sequence_length")
        missing = [key for key in keys if not isinstance(sidecar, dict) or key not in sidecar]
        if missing:
            raise CheckpointError(f"{folder / SIDECAR} lacks {', '.join(missing)}; use convert_checkpoint.py")
        return Generator(folder, decoder, sidecar, device)

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels. Raises DataError when neither the export nor an image tokenizer says it."""
        return self._image_size or self.image_tokenizer.image_size

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Raises DataError when the folder has none, or one of another size."""
        tokenizer = TextTokenizer.load(self._tokenizer_folder("text_tokenizer", "read or write text"))
        if self.vocabulary.family == "cm3leon" and tokenizer.size != self.vocabulary.text_size:
            raise DataError(
                f"{self.folder / 'text_tokenizer'} has {tokenizer.size} ids; the model has {self.vocabulary.text_size}"
            )
        return tokenizer

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """Raises DataError when the folder has none, or one of another grid or codebook."""
        folder = self._tokenizer_folder("image_tokenizer", "read or make pictures")
        tokenizer = ImageTokenizer.load(folder, self._device)
        found = (tokenizer.image_size, tokenizer.grid, tokenizer.codebook_size)
        # A folder exported without tokenizers says 0 pixels; the grid and the codebook bind what is put there later.
        expected = (self._image_size or tokenizer.image_size, self.grid, self.vocabulary.codebook_size)
        if found != expected:
            raise DataError(f"{folder} has (pixels, grid, codebook) {found}; the model expects {expected}")
        return tokenizer

    def _tokenizer_folder(self, name: str, purpose: str) -> Path:
        if not (self.folder / name).is_dir():
            raise DataError(
                f"{self.folder} has no {name}/, which is needed to {purpose}; "
                "export it from a run that names its tokenizers, or copy the folder there"
            )
        return self.folder / name

    # Pictures

    def images(self, prompts: Sequence[Prompt], **options: Any) -> np.ndarray:
        """Pictures uint8 [prompts, n, s, s, 3]; options as in `image_codes`."""
        codes = self.image_codes(prompts, **options)
        return self._pixels(codes.reshape(-1, codes.shape[-1])).reshape(*codes.shape[:2], *self._pixel_shape)

    def image_codes(self, prompts: Sequence[Prompt], *, n: int = 1, **options: Any) -> np.ndarray:
        """Codes int64 [prompts, n, grid height x width] of pictures that follow the prompts.

        A prompt is a text, or texts and pictures (editing, structure-guided). Options:
        guidance         scale, 3 by default (1 is off), or a Guidance object
        image_guidance   with it three streams: `guidance` for the text, this for the prompt's pictures (editing)
        contrastive_k, contrastive_alpha   CD-K instead of guidance
        temperature 1.0, top_p 0.8 (both CM3Leon's demo), top_k 0 (off), seed 0, n 1
        retrieved        for each prompt the documents to put in front
        A sample depends on its prompt, its number below n and the seed, not on what else is made with it.
        Raises ConfigError, or DataError for a prompt that does not fit the context.
        """
        requests = self._image_requests(prompts, n=n, **options)
        codes = np.zeros((len(requests), self.vocabulary.image_tokens), np.int64)
        for event in self._engine().run(requests):
            if event.kind == "image":
                codes[event.request] = self.vocabulary.codes(np.asarray(event.ids))
        return codes.reshape(len(prompts), n, -1)

    def stream_images(self, prompts: Sequence[Prompt], *, n: int = 1, **options: Any) -> Iterator[Piece]:
        """The pictures of `images` as they grow: a partial picture whenever a row of codes is complete."""
        requests = self._image_requests(prompts, n=n, **options)
        for event in self._engine(self.grid[1]).run(requests):
            yield from self._pieces(event, n)

    def _image_requests(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        guidance: float | Guidance | None = None,
        image_guidance: float | None = None,
        contrastive_k: int | None = None,
        contrastive_alpha: float | None = None,
        temperature: float = 1.0,
        top_p: float = 0.8,
        top_k: int = 0,
        seed: int = 0,
        retrieved: Retrieved | None = None,
    ) -> list[Request]:
        if n < 1:
            raise ConfigError(f"n is {n}; expected 1 or more samples a prompt")
        if guidance is not None and not isinstance(guidance, int | float):
            guide = guidance
        elif image_guidance is not None:
            guide = ThreeStream(image_guidance, 7.5 if guidance is None else guidance)
        else:
            guide = choose_guidance(guidance, contrastive_k, contrastive_alpha)
        sampling = Sampling(temperature, top_k, top_p)
        requests = []
        for prompt, documents in zip(prompts, self._retrieved(retrieved, len(prompts)), strict=True):
            segments = self._segments(prompt)
            ids = tuple(picture_prompt(self.vocabulary, segments, documents, self.answers))
            self._check_room(ids, self.vocabulary.image_tokens)
            guides = guides_for(self.vocabulary, guide, segments, documents)
            requests += [
                Request(ids, Modes.IMAGE, self._seed(seed, j, ids), image=sampling, guidance=guide, guides=guides)
                for j in range(n)
            ]
        return requests

    # Text

    def caption(self, images: np.ndarray, **options: Any) -> list[str]:
        """A text for each picture of uint8 [n, s, s, 3]; by default the best token each time.

        cm3leon fills the masked caption in front of the picture, behind a prompt if there is one (its instruction
        format: "Describe the given picture."); chameleon goes on behind picture and prompt. Options:
        prompt           one text for all pictures, or one for each; "" by default
        temperature 0.0 (the best token), top_p 1.0, top_k 0 (off), repetition_penalty 1.0, seed 0, max_tokens 64
        retrieved        for each picture the documents to put in front
        Raises ConfigError, or DataError for a prompt that does not fit the context.
        """
        return [self._text(ids) for ids in self._collect(self._caption_requests(images, **options))]

    def _caption_requests(
        self,
        images: np.ndarray,
        *,
        prompt: str | Sequence[str] = "",
        retrieved: Retrieved | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[Request]:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if len(prompts) != len(images):
            raise ConfigError(f"{len(prompts)} prompts for {len(images)} pictures; expected one, or one each")
        requests = []
        retrieved = self._retrieved(retrieved, len(images))
        for codes, text, documents in zip(self.encode(images), prompts, retrieved, strict=True):
            ids, mode = self._caption_prompt(codes, text, documents)
            self._check_room(ids, 1)
            requests.append(Request(ids, mode, self._seed(seed, 0, ids), max_tokens=max_tokens, text=sampling))
        return requests

    def _caption_prompt(
        self, codes: np.ndarray, prompt: str, documents: Sequence[Document]
    ) -> tuple[tuple[int, ...], Modes]:
        vocabulary = self.vocabulary
        if vocabulary.sentinels and not self.answers:
            if not prompt:
                return tuple(infill_caption_prompt(vocabulary, codes, documents).tolist()), Modes.INFILL
            question = text_segment(prompt + " ", self.text_tokenizer, strip=False)
            return tuple(infill(vocabulary, [question, Mask("text"), image_segment(codes)], documents)[0]), Modes.INFILL
        text = text_segment(prompt, self.text_tokenizer).tokens if prompt else ()
        return tuple(
            image_to_text_prompt(vocabulary, codes, text, turn=bool(prompt) or self.answers).tolist()
        ), Modes.TEXT

    def infill(
        self,
        parts: Sequence[Part | Mask],
        *,
        max_tokens: int = 64,
        retrieved: Sequence[Document] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Part:
        """What belongs where the one `Mask` stands among texts and pictures: a text, or a picture uint8 [s, s, 3]."""
        sampling = Sampling(temperature, top_k, top_p)
        typed = [part if isinstance(part, Mask) else self._segment(part, strip=False) for part in parts]
        prompt, mask = infill(self.vocabulary, typed, retrieved)
        ids, picture = tuple(prompt), mask.kind == "image"
        self._check_room(ids, self.vocabulary.image_tokens if picture else 1)
        mode, limit = (Modes.IMAGE, None) if picture else (Modes.INFILL, max_tokens)
        seeded = self._seed(seed, 0, ids)
        found = self._collect([Request(ids, mode, seeded, max_tokens=limit, image=sampling, text=sampling)])[0]
        return self._pixels(self.vocabulary.codes(np.asarray(found))[None])[0] if picture else self._text(found)

    def complete(self, prompts: Sequence[Prompt], **options: Any) -> list[list[Part]]:
        """Texts and pictures that follow each prompt, until the model ends the sample; options as in `stream`."""
        parts: list[list[Part]] = [[] for _ in prompts]
        for piece in self.stream(prompts, **options):
            mine = parts[piece.prompt]
            if piece.kind == "text" and mine and isinstance(mine[-1], str):
                mine[-1] += piece.text
            elif piece.kind == "text":
                mine.append(piece.text)
            elif piece.kind == "image":
                assert piece.pixels is not None
                mine.append(piece.pixels)
        return parts

    def stream(self, prompts: Sequence[Prompt], *, partial: bool = False, **options: Any) -> Iterator[Piece]:
        """Interleaved texts and pictures as they come; defaults are those of Chameleon's server. Options:

        images           true by default; false for texts only
        guidance         scale inside pictures, 3 by default (1 is off)
        text, image      a Sampling for each modality
        max_tokens       most tokens to draw, None (all that the context holds) by default; seed 0
        retrieved        for each prompt the documents to put in front
        partial: a picture also comes whenever a row of its codes is complete.
        """
        return self._stream(self._open_requests(prompts, **options), partial)

    def _stream(self, requests: Sequence[Request], partial: bool) -> Iterator[Piece]:
        writers = [TextWriter(self.text_tokenizer) for _ in requests]
        for event in self._engine(self.grid[1] if partial else None).run(requests):
            yield from self._pieces(event, 1, writers)

    def _open_requests(
        self,
        prompts: Sequence[Prompt],
        *,
        images: bool = True,
        guidance: float = 3.0,
        text: Sampling = SERVED_TEXT,
        image: Sampling = SERVED_IMAGE,
        max_tokens: int | None = None,
        seed: int = 0,
        retrieved: Retrieved | None = None,
    ) -> list[Request]:
        requests = []
        guide: Guidance = Plain() if guidance == 1 else ClassifierFree(guidance)
        for prompt, documents in zip(prompts, self._retrieved(retrieved, len(prompts)), strict=True):
            ids = tuple(open_prompt(self.vocabulary, self._segments(prompt), documents))
            self._check_room(ids, 1)
            guides = running_guides(self.vocabulary, guide, documents) if images else no_guides
            mode = Modes.INTERLEAVED if images else Modes.TEXT
            seeded = self._seed(seed, 0, ids)
            requests.append(Request(ids, mode, seeded, max_tokens, image, text, guide if images else Plain(), guides))
        return requests

    def mixed(self, wishes: Sequence[Wish], *, partial: bool = False) -> Iterator[Piece]:
        """Pictures, captions and completions made in one batch; `Piece.prompt` is the wish's number.

        Each comes out as from `images`, `caption` or `complete` alone, up to the rounding of products of other shapes.
        """
        return self._stream([self._request_of(wish) for wish in wishes], partial)

    def _request_of(self, wish: Wish) -> Request:
        prompt: Prompt = [wish.prompt] if isinstance(wish.prompt, np.ndarray) else wish.prompt
        try:
            if wish.kind == "image":
                return self._image_requests([prompt], n=1, **wish.options)[0]
            if wish.kind == "complete":
                return self._open_requests([prompt], **wish.options)[0]
            if wish.kind == "caption" and isinstance(wish.prompt, np.ndarray):
                return self._caption_requests(wish.prompt[None], **wish.options)[0]
        except TypeError as fault:
            named = ", ".join(wish.options)
            raise ConfigError(f"a wish of kind {wish.kind} with the options {named}: {fault}") from fault
        found = f"{wish.kind} for a {type(wish.prompt).__name__}"
        raise ConfigError(f"a wish of kind {found}; expected image, complete, or caption of a picture")

    # Shared parts

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Codes int64 [n, grid] of pictures uint8 [n, s, s, 3]."""
        return self.image_tokenizer.encode(np.array(images)).numpy()

    def _segments(self, prompt: Prompt) -> list[Segment]:
        return [self._segment(part) for part in ([prompt] if isinstance(prompt, str) else prompt)]

    def _segment(self, part: Part, *, strip: bool = True) -> Segment:
        if isinstance(part, str):
            return text_segment(part, self.text_tokenizer, strip=strip)
        return image_segment(self.encode(part[None])[0])

    def _retrieved(self, retrieved: Retrieved | None, count: int) -> Retrieved:
        if retrieved is not None and len(retrieved) != count:
            raise ConfigError(f"retrieved has {len(retrieved)} lists of documents for {count} prompts")
        return [()] * count if retrieved is None else retrieved

    def _seed(self, seed: int, sample: int, ids: tuple[int, ...]) -> int:
        return seed_from("sample", seed, sample, ids)

    def _check_room(self, ids: tuple[int, ...], needed: int) -> None:
        if len(ids) + needed > self.context:
            raise DataError(
                f"the prompt with its retrieved documents has {len(ids)} tokens and at least {needed} must follow; the "
                f"model's context is {self.context}; shorten the prompt or take fewer --documents"
            )

    def _engine(self, report_every: int | None = None) -> Engine:
        return Engine(self.decoder, self.grammar, self.context, report_every=report_every)

    def _collect(self, requests: Sequence[Request]) -> list[list[int]]:
        ids: list[list[int]] = [[] for _ in requests]
        for event in self._engine().run(requests):
            ids[event.request] += event.ids
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return self.text_tokenizer.decode(ids).strip()

    @property
    def _pixel_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, 3

    def _pixels(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [n, s, s, 3], in batches of 64."""
        blocks = [self.image_tokenizer.decode(codes[i : i + 64]).numpy() for i in range(0, len(codes), 64)]
        return np.concatenate(blocks)

    def _pieces(self, event: Event, n: int, writers: Sequence[TextWriter] = ()) -> Iterator[Piece]:
        prompt, sample = divmod(event.request, n)
        if event.kind == "text":
            text = writers[event.request].add(event.ids)
            if text:
                yield Piece(prompt, sample, "text", text)
            return
        rest = writers[event.request].flush() if writers else ""
        if rest:
            yield Piece(prompt, sample, "text", rest)
        if event.kind == "done":
            yield Piece(prompt, sample, "done", event.reason)
            return
        codes = self.vocabulary.codes(np.asarray(event.ids))
        # What is missing is filled with the first code, as Chameleon's viewer shows partial pictures.
        whole = np.concatenate([codes, np.full(self.vocabulary.image_tokens - len(codes), codes[0])])
        kind = "image" if event.kind == "image" else "partial"
        yield Piece(prompt, sample, kind, pixels=self._pixels(whole[None])[0], rows=len(codes) // self.grid[1])
