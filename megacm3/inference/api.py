"""`Generator`: pictures, captions, answers, fillings and interleaved documents from an exported folder.

generator = Generator.load("runs/quickstart/hf")
pixels = generator.images(["a red apple"], guidance=3.0, seed=0)      # uint8 [prompts, n, s, s, 3]
texts = generator.caption(pixels[:, 0])
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.inference.asks import RequestMaker
from megacm3.inference.decoder import Decoder
from megacm3.inference.engine import Engine, Event, Request
from megacm3.inference.modality import Modes
from megacm3.inference.model_folder import ModelFolder
from megacm3.inference.pieces import Part, Piece, Prompt, TextWriter, Wish
from megacm3.inference.requests import Mask


class Generator(ModelFolder):
    """A model folder that generates. Make it with `Generator.load`."""

    def __init__(self, folder: Path, decoder: Decoder, sidecar: dict[str, Any], device: str):
        super().__init__(folder, decoder, sidecar, device)
        self._ask = RequestMaker(self)

    # Pictures

    def images(self, prompts: Sequence[Prompt], **options: Any) -> np.ndarray:
        """Pictures uint8 [prompts, n, s, s, 3]; options as in `image_codes`."""
        codes = self.image_codes(prompts, **options)
        return self.pixels_of(codes.reshape(-1, codes.shape[-1])).reshape(*codes.shape[:2], *self._pixel_shape)

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
        requests = self._ask.images(prompts, n=n, **options)
        codes = np.zeros((len(requests), self.vocabulary.image_tokens), np.int64)
        for event in self._engine().run(requests):
            if event.kind == "image":
                codes[event.request] = self.vocabulary.codes(np.asarray(event.ids))
        return codes.reshape(len(prompts), n, self.vocabulary.image_tokens)

    def stream_images(self, prompts: Sequence[Prompt], *, n: int = 1, **options: Any) -> Iterator[Piece]:
        """The pictures of `images` as they grow: a partial picture whenever a row of codes is complete."""
        requests = self._ask.images(prompts, n=n, **options)
        for event in self._engine(self.grid[1]).run(requests):
            yield from self._pieces(event, n)

    # Text

    def caption(self, images: np.ndarray, **options: Any) -> list[str]:
        """A text for each picture of uint8 [n, s, s, 3]; by default the best token each time.

        cm3leon fills the masked caption in front of the picture, behind a prompt if there is one (its instruction
        format: "Describe the given picture."); chameleon goes on behind picture and prompt. Options:
        prompt           one text for all pictures, or one for each; "" by default
        after            cm3leon: text between the caption and the picture, such as a question's full stop
        temperature 0.0 (the best token), top_p 1.0, top_k 0 (off), repetition_penalty 1.0, seed 0, max_tokens 64
        retrieved        for each picture the documents to put in front
        Raises ConfigError, or DataError for a prompt that does not fit the context.
        """
        return [self._text(ids) for ids in self._collect(self._ask.captions(images, **options))]

    def infill(self, parts: Sequence[Part | Mask], **options: Any) -> Part:
        """What belongs where the one `Mask` stands among texts and pictures: a text, or a picture uint8 [s, s, 3].

        Options: temperature 0.0 (the best token), top_p 1.0, top_k 0 (off), seed 0, max_tokens 64 (of a text),
        retrieved (the documents to put in front).
        """
        request = self._ask.filling(parts, **options)
        found = self._collect([request])[0]
        if request.mode != Modes.IMAGE:
            return self._text(found)
        picture: np.ndarray = self.pixels_of(self.vocabulary.codes(np.asarray(found))[None])[0]
        return picture

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
        return self._stream(self._ask.completions(prompts, **options), partial)

    def _stream(self, requests: Sequence[Request], partial: bool) -> Iterator[Piece]:
        writers = [TextWriter(self.text_tokenizer) for _ in requests]
        for event in self._engine(self.grid[1] if partial else None).run(requests):
            yield from self._pieces(event, 1, writers)

    def mixed(self, wishes: Sequence[Wish], *, partial: bool = False) -> Iterator[Piece]:
        """Pictures, captions and completions made in one batch; `Piece.prompt` is the wish's number.

        Each comes out as from `images`, `caption` or `complete` alone, up to the rounding of products of other shapes.
        """
        return self._stream([self._ask.wish(wish) for wish in wishes], partial)

    # Shared parts

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
        yield Piece(prompt, sample, kind, pixels=self.pixels_of(whole[None])[0], rows=len(codes) // self.grid[1])
