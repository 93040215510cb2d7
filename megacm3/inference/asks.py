"""What a user asks of a model, as requests of the decoding loop: prompts put together, checked, with their seeds."""

from collections.abc import Sequence

import numpy as np

from megacm3.command import seed_from
from megacm3.data.documents import Document, Segment, image_to_text_prompt, infill_caption_prompt
from megacm3.errors import ConfigError, DataError
from megacm3.inference.engine import Request, no_guides
from megacm3.inference.guidance import ClassifierFree, Guidance, Plain, ThreeStream, choose_guidance
from megacm3.inference.modality import Modes
from megacm3.inference.model_folder import ModelFolder
from megacm3.inference.pieces import Part, Prompt, Retrieved, Wish
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

SERVED_TEXT = Sampling(0.7, top_p=0.9, repetition_penalty=1.2)
SERVED_IMAGE = Sampling(0.7, top_p=0.9)


def _listed(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        raise ConfigError(
            f"prompts is the text {prompts[:40]!r}; expected a list of prompts, such as [{prompts[:40]!r}]"
        )
    return prompts


class RequestMaker:
    """Makes requests for one model; the options are those of `Generator`'s methods."""

    def __init__(self, model: ModelFolder):
        self.model, self.vocabulary = model, model.vocabulary

    def images(
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
        """`n` requests for each prompt, one prompt after the other."""
        if n < 1:
            raise ConfigError(f"n is {n}; expected 1 or more samples a prompt")
        contrastive = contrastive_k is not None or contrastive_alpha is not None
        if contrastive and image_guidance is not None:
            raise ConfigError(
                f"image_guidance {image_guidance} (three streams) and contrastive decoding (two) exclude each other; "
                "leave out --image-guidance or --contrastive-*"
            )
        if guidance is not None and not isinstance(guidance, int | float):
            guide = guidance
        elif image_guidance is not None:
            guide = ThreeStream(image_guidance, 7.5 if guidance is None else guidance)
        else:
            guide = choose_guidance(guidance, contrastive_k, contrastive_alpha)
        sampling = Sampling(temperature, top_k, top_p)
        requests = []
        for prompt, documents in zip(_listed(prompts), self._retrieved(retrieved, len(prompts)), strict=True):
            segments = self._segments(prompt)
            if not segments and guide.streams > 1:
                raise ConfigError("a prompt without text and picture has nothing to guide; give one, or guidance 1")
            ids = tuple(picture_prompt(self.vocabulary, segments, documents, self.model.answers))
            self._check_room(ids, self.vocabulary.image_tokens)
            guides = guides_for(self.vocabulary, guide, segments, documents)
            requests += [
                Request(ids, Modes.IMAGE, self._seed(seed, j, ids), image=sampling, guidance=guide, guides=guides)
                for j in range(n)
            ]
        return requests

    def captions(
        self,
        images: np.ndarray,
        *,
        prompt: str | Sequence[str] = "",
        after: str = "",
        retrieved: Retrieved | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> list[Request]:
        """One request for each picture."""
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if len(prompts) != len(images):
            raise ConfigError(f"{len(prompts)} prompts for {len(images)} pictures; expected one, or one each")
        requests = []
        retrieved = self._retrieved(retrieved, len(images))
        for codes, text, documents in zip(self.model.encode(images), prompts, retrieved, strict=True):
            ids, mode = self.caption_prompt(codes, text, documents, after)
            self._check_room(ids, 1)
            requests.append(Request(ids, mode, self._seed(seed, 0, ids), max_tokens=max_tokens, text=sampling))
        return requests

    def caption_prompt(
        self, codes: np.ndarray, prompt: str, documents: Sequence[Document], after: str = ""
    ) -> tuple[tuple[int, ...], Modes]:
        """The ids in front of a caption, and the mode that ends it; codes [grid height x width] of the picture."""
        vocabulary = self.vocabulary
        if vocabulary.sentinels and not self.model.answers:
            if not prompt:
                return tuple(infill_caption_prompt(vocabulary, codes, documents).tolist()), Modes.INFILL
            # The space before an answer is part of the answer (sft/render.py): none stands before the mask.
            before = text_segment(prompt.rstrip(" "), self.model.text_tokenizer, strip=False)
            behind = [text_segment(after, self.model.text_tokenizer)] if after else []
            parts: list[Segment | Mask] = [before, Mask("text"), *behind, image_segment(codes)]
            return tuple(infill(vocabulary, parts, documents)[0]), Modes.INFILL
        text = text_segment(prompt, self.model.text_tokenizer).tokens if prompt else ()
        turn = bool(prompt) or self.model.answers
        return tuple(image_to_text_prompt(vocabulary, codes, text, turn, documents).tolist()), Modes.TEXT

    def filling(
        self,
        parts: Sequence[Part | Mask],
        *,
        max_tokens: int = 64,
        retrieved: Sequence[Document] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Request:
        """The request for what the one `Mask` stands for; its mode is IMAGE when that is a picture."""
        sampling = Sampling(temperature, top_k, top_p)
        typed = [part if isinstance(part, Mask) else self._segment(part, strip=False) for part in parts]
        prompt, mask = infill(self.vocabulary, typed, retrieved)
        ids, picture = tuple(prompt), mask.kind == "image"
        self._check_room(ids, self.vocabulary.image_tokens if picture else 1)
        mode, limit = (Modes.IMAGE, None) if picture else (Modes.INFILL, max_tokens)
        return Request(ids, mode, self._seed(seed, 0, ids), max_tokens=limit, image=sampling, text=sampling)

    def completions(
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
        """One request for each prompt."""
        requests = []
        guide: Guidance = Plain() if guidance == 1 else ClassifierFree(guidance)
        for prompt, documents in zip(_listed(prompts), self._retrieved(retrieved, len(prompts)), strict=True):
            ids = tuple(open_prompt(self.vocabulary, self._segments(prompt), documents))
            self._check_room(ids, 1)
            guides = running_guides(self.vocabulary, guide, documents) if images else no_guides
            mode = Modes.INTERLEAVED if images else Modes.TEXT
            seeded = self._seed(seed, 0, ids)
            requests.append(Request(ids, mode, seeded, max_tokens, image, text, guide if images else Plain(), guides))
        return requests

    def wish(self, wish: Wish) -> Request:
        """The request of one wish; raises ConfigError for a kind or options that there are not."""
        prompt: Prompt = [wish.prompt] if isinstance(wish.prompt, np.ndarray) else wish.prompt
        try:
            if wish.kind == "image":
                return self.images([prompt], n=1, **wish.options)[0]
            if wish.kind == "complete":
                return self.completions([prompt], **wish.options)[0]
            if wish.kind == "caption" and isinstance(wish.prompt, np.ndarray):
                return self.captions(wish.prompt[None], **wish.options)[0]
        except TypeError as fault:
            named = ", ".join(wish.options)
            raise ConfigError(f"a wish of kind {wish.kind} with the options {named}: {fault}") from fault
        found = f"{wish.kind} for a {type(wish.prompt).__name__}"
        raise ConfigError(f"a wish of kind {found}; expected image, complete, or caption of a picture")

    def _segments(self, prompt: Prompt) -> list[Segment]:
        return [self._segment(part) for part in ([prompt] if isinstance(prompt, str) else prompt)]

    def _segment(self, part: Part, *, strip: bool = True) -> Segment:
        if isinstance(part, str):
            return text_segment(part, self.model.text_tokenizer, strip=strip)
        return image_segment(self.model.encode(part[None])[0])

    def _retrieved(self, retrieved: Retrieved | None, count: int) -> Retrieved:
        if retrieved is not None and len(retrieved) != count:
            raise ConfigError(f"retrieved has {len(retrieved)} lists of documents for {count} prompts")
        return [()] * count if retrieved is None else retrieved

    def _seed(self, seed: int, sample: int, ids: tuple[int, ...]) -> int:
        return seed_from("sample", int(seed), sample, ids)

    def _check_room(self, ids: tuple[int, ...], needed: int) -> None:
        if len(ids) + needed > self.model.context:
            raise DataError(
                f"the prompt with its retrieved documents has {len(ids)} tokens and at least {needed} must follow; the "
                f"model's context is {self.model.context}; shorten the prompt or take fewer --documents"
            )
