"""What may come next: a small state machine over modalities with one boolean row of the vocabulary a state.

An image has exactly the grid's number of codes, none is begun without room for all of it and its closing token, and a
token that the state forbids is never drawn. cm3leon: `T <break> I <break> T`, where after the closing `<break>` another
image may follow at once; `</s>` ends. chameleon: `T <break> I <eoss> T`, the closing token forced.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from megacm3.tokenizers.vocabulary import IMAGE, Vocabulary


class State(IntEnum):
    """What the next token may be."""

    TEXT = 0
    """text or the end of the sample"""
    OPEN = 1
    """text, the end, or the begin of an image"""
    IMAGE = 2
    """an image code"""
    CLOSE = 3
    """what stands after an image"""
    AFTER = 4
    """cm3leon, behind `<break>`: text or the first code of another image"""
    INFILL = 5
    """text or `<eoss>`, the end of a filled span"""


class Modes(IntEnum):
    """What a request wants."""

    TEXT = 0
    """text until the end of the sample"""
    IMAGE = 1
    """one image (or `codes` codes of one)"""
    INTERLEAVED = 2
    """text and images until the end of the sample"""
    INFILL = 3
    """text until `<eoss>`"""


class Grammar:
    """The states' masks for one vocabulary."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        rows: int | None = None,
        device: torch.device | str = "cpu",
        *,
        turns: bool = False,
    ):
        """`rows`: ids that the model has, at least the vocabulary's; the ones above are padding, never allowed.

        turns: cm3leon too ends an answer by `<end-of-turn>`, as its fine-tuning on answers taught it.
        """
        self.vocabulary = vocabulary
        size = vocabulary.size if rows is None else rows
        assert size >= vocabulary.size
        text = vocabulary.is_text(np.arange(vocabulary.size))
        image = vocabulary.is_image(np.arange(vocabulary.size))
        ends = [vocabulary.eos]
        if vocabulary.family == "chameleon" or turns:
            ends.append(vocabulary.end_of_turn)
        close = [vocabulary.eoi] if vocabulary.family == "chameleon" else [vocabulary.break_, *ends]
        masks = np.zeros((len(State), size), bool)
        for state in (State.TEXT, State.OPEN, State.AFTER, State.INFILL):
            masks[state, : len(text)] = text
        for state in (State.TEXT, State.OPEN):
            masks[state, ends] = True
        masks[State.OPEN, vocabulary.boi] = True
        for state in (State.IMAGE, State.AFTER):
            masks[state, : len(image)] |= image
        masks[State.CLOSE, close] = True
        masks[State.INFILL, vocabulary.eoss] = True
        self.masks = torch.from_numpy(masks).to(device)
        """bool [states, size]"""
        self.image_ids = torch.from_numpy(np.sort(vocabulary.code_to_id)).to(device)
        """int64 [codebook], ascending"""
        self.ends = frozenset(ends)

    def begin(self, mode: Modes, room: int, codes: int | None = None, last: int | None = None) -> "Cursor":
        """A request's start.

        `room` tokens may still come, `codes` of an image when not all of it is wanted; `last` is the prompt's last id.
        """
        state = {
            Modes.TEXT: State.TEXT,
            Modes.IMAGE: State.IMAGE,
            Modes.INTERLEAVED: State.OPEN,
            Modes.INFILL: State.INFILL,
        }[mode]
        if mode == Modes.INTERLEAVED and self.vocabulary.family == "cm3leon" and last == self.vocabulary.break_:
            state = State.AFTER
        left = (self.vocabulary.image_tokens if codes is None else codes) if mode == Modes.IMAGE else 0
        assert left <= room
        return Cursor(self, mode, state, left, room)


@dataclass
class Cursor:
    """Where one request stands."""

    grammar: Grammar
    mode: Modes
    state: State
    codes_left: int
    """Image codes still to come of the image begun."""
    room: int
    """Tokens that may still come."""
    done: str | None = None
    """None while running, then "stop" (an end token), "image" (the one image is complete) or "length" (no room)."""

    @property
    def allowed(self) -> State:
        """The state whose mask holds for the next token, with the room counted."""
        needed = self.grammar.vocabulary.image_tokens + 1  # the codes and what closes them
        if self.state == State.OPEN and self.room < needed + 1:
            return State.TEXT
        if self.state == State.AFTER and self.room < needed:
            return State.TEXT
        return self.state

    @property
    def value_free(self) -> bool:
        """Whether the next state does not depend on which token is drawn (so nobody must wait for its value)."""
        return self.state == State.IMAGE

    def advance(self, token: int | None) -> None:
        """Take the drawn token (None while `value_free`)."""
        assert self.done is None
        self.room -= 1
        vocabulary = self.grammar.vocabulary
        if self.state == State.AFTER and token is not None and vocabulary.kind[token] == IMAGE:
            self.state, self.codes_left = State.IMAGE, vocabulary.image_tokens
        if self.state == State.IMAGE:
            self.codes_left -= 1
            if self.codes_left == 0:
                self.state = State.CLOSE
                if self.mode == Modes.IMAGE:
                    self.done = "image"
        else:
            assert token is not None
            self._take(token)
        if self.done is None and self.room == 0:
            self.done = "length"

    def _take(self, token: int) -> None:
        vocabulary = self.grammar.vocabulary
        if token in self.grammar.ends or (self.state == State.INFILL and token == vocabulary.eoss):
            self.done = "stop"
        elif self.state == State.CLOSE:
            self.state = State.AFTER if vocabulary.family == "cm3leon" else State.OPEN
        elif self.state in (State.OPEN, State.AFTER):
            begins = token == vocabulary.boi
            self.state = State.IMAGE if begins else State.OPEN
            self.codes_left = vocabulary.image_tokens if begins else 0
