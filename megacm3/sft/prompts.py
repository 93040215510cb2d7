"""A fine-tuning document cut into what is given and what shall be answered, for evaluation.

The prompt is exactly what training has put before the answer: where the answer ends the document, the tokens up to it;
where something follows (CM3Leon's questions, whose picture stands behind the answer), the rearranged sequence up to the
tail's first sentinel, as masking the whole answer makes it in training.
"""

from dataclasses import dataclass

import numpy as np

from megacm3.data import cm3
from megacm3.data.documents import IMAGE, Document, Layout, Segment
from megacm3.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What a model is given, and what the document answers."""

    tokens: np.ndarray
    """int64: ids after which the first token (or code) of the answer follows."""
    answer: tuple[Segment, ...]
    """The answer's segments."""
    ends: tuple[int, ...]
    """Ids that end a text answer."""
    infill: bool
    """The answer stands in the tail, behind its sentinel."""


def cut(document: Document, layout: Layout) -> Prompt:
    """The prompt of a document with an answer; what follows its first answer but is no answer is left out.

    layout: with `turns` as the run had it (objective.loss_on = answers, or a chameleon vocabulary).
    Raises DataError for a document without an answer.
    """
    vocabulary = layout.vocabulary
    marked = [i for i, segment in enumerate(document.segments) if segment.answer]
    if not marked:
        raise DataError(f"document {document.doc_id} has no answer; expected one of a fine-tuning store")
    first, last = marked[0], marked[0]
    while last + 1 in marked:
        last += 1
    answer = document.segments[first : last + 1]
    infill = last + 1 < len(document.segments) and vocabulary.sentinels > 0 and not layout.turns
    if not infill:
        document = Document(document.doc_id, document.segments[: last + 1])
    tokens, flags = layout.assemble([document])
    if infill:
        content = flags & ~cm3.is_control(vocabulary)[tokens]
        bounds = np.flatnonzero(np.diff(content.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        spans = bounds[: len(answer)]
        return Prompt(cm3.infill_prompt(tokens, spans, vocabulary), answer, (vocabulary.eoss,), True)
    start = int(np.argmax(flags))
    if answer[0].kind == IMAGE and tokens[start] == vocabulary.boi:
        start += 1
    ends = (vocabulary.eos, vocabulary.end_of_turn) if layout.turns else (vocabulary.eos,)
    return Prompt(tokens[:start], answer, ends, False)
