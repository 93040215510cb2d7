"""Layouts of samples and prompts."""

import numpy as np
import pytest

from megacm3.data.documents import (
    ANSWER,
    IMAGE,
    TEXT,
    Document,
    Layout,
    Segment,
    image_to_text_prompt,
    infill_caption_prompt,
    rotate,
    text_to_image_prompt,
    unconditional_prompt,
)
from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.vocabulary import Vocabulary

CM3LEON = Vocabulary.cm3leon(text_size=100, codebook_size=8, special_size=20, sentinels=8, image_tokens=2)
CHAMELEON = Vocabulary.chameleon(size=600, codebook_size=8, image_tokens=2)
END, BREAK = CM3LEON.eos, CM3LEON.break_


def text(*ids: int, answer: bool = False) -> Segment:
    return Segment(TEXT, np.array(ids, np.int64), answer)


def image(*codes: int, answer: bool = False) -> Segment:
    return Segment(IMAGE, np.array(codes), answer)


def document(*segments: Segment) -> Document:
    return Document(0, segments)


def tokens(vocabulary: Vocabulary, *documents: Document, turns: bool = False) -> list[int]:
    layout = Layout(vocabulary, turns)
    made, _ = layout.assemble(documents)
    assert made.dtype == np.int64
    assert layout.length([doc.shape for doc in documents]) == len(made)
    return made.tolist()


PAIR = document(text(1, 2), image(3, 4))
OTHER = document(text(5), image(6, 7))
I34, I67 = [103, 104], [106, 107]


def test_pair() -> None:
    assert tokens(CM3LEON, PAIR) == [END, 1, 2, BREAK, *I34, END]


def test_retrieved_documents_stand_in_front_with_breaks_only() -> None:
    expected = [END, 5, BREAK, *I67, BREAK, 5, BREAK, *I67, BREAK, 1, 2, BREAK, *I34, END]
    assert tokens(CM3LEON, OTHER, OTHER, PAIR) == expected


def test_three_retrieved_pairs_of_1024_codes_exceed_4096() -> None:
    vocabulary = Vocabulary.cm3leon()
    pair = ((TEXT, 24), (IMAGE, 1024))
    assert Layout(vocabulary).length([pair] * 4) == 4105 + 4 * 24


def test_text_alone_is_opened_and_closed_too() -> None:
    assert tokens(CM3LEON, document(text(1, 2, 3))) == [END, 1, 2, 3, END]


def test_interleaved_has_one_break_at_each_change() -> None:
    pages = document(text(1), image(3, 4), image(6, 7), text(2), text(3))
    assert tokens(CM3LEON, pages) == [END, 1, BREAK, *I34, BREAK, *I67, BREAK, 2, 3, END]
    begins_with_picture = document(image(3, 4), text(2))
    assert tokens(CM3LEON, begins_with_picture) == [END, *I34, BREAK, 2, END]


def test_chameleon_marks_each_picture() -> None:
    begin, end = CHAMELEON.boi, CHAMELEON.eoi
    codes = CHAMELEON.image_ids(np.array([3, 4])).tolist()
    pages = document(text(500), image(3, 4), image(3, 4), text(501))
    expected = [CHAMELEON.bos, 500, begin, *codes, end, begin, *codes, end, 501, CHAMELEON.eos]
    assert tokens(CHAMELEON, pages) == expected
    assert CHAMELEON.bos != CHAMELEON.eos


def test_rotation_turns_pairs_only() -> None:
    assert tokens(CM3LEON, rotate(PAIR)) == [END, *I34, BREAK, 1, 2, END]
    for other in (document(text(1)), document(image(3, 4), text(1)), document(text(1), image(3, 4), text(2))):
        assert rotate(other) is other
    with_answer = document(text(1), image(3, 4, answer=True))
    assert rotate(with_answer) is with_answer


def test_turns_and_answer_flags_of_chameleons_fine_tuning() -> None:
    turn, end = CHAMELEON.end_of_turn, CHAMELEON.eos
    chat = document(text(500, 501), text(502, answer=True), text(503), text(504, 505, answer=True))
    made, answers = Layout(CHAMELEON, turns=True).assemble([chat])
    assert made.tolist() == [CHAMELEON.bos, 500, 501, turn, 502, turn, 503, turn, 504, 505, end]
    # An answer is learned with what ends it; what opens it belongs to the prompt.
    assert made[answers].tolist() == [502, turn, 504, 505, end]
    drawn = document(text(500), image(3, 4, answer=True))
    made, answers = Layout(CHAMELEON, turns=True).assemble([drawn])
    picture = [CHAMELEON.boi, *CHAMELEON.image_ids(np.array([3, 4])).tolist(), CHAMELEON.eoi]
    assert made.tolist() == [CHAMELEON.bos, 500, turn, *picture, end]
    assert made[answers].tolist() == [*picture, end]


def test_turns_with_breaks() -> None:
    turn = CM3LEON.end_of_turn
    shown = document(image(3, 4), text(1), text(2, answer=True))
    assert tokens(CM3LEON, shown, turns=True) == [END, *I34, BREAK, 1, turn, 2, END]
    drawn = document(text(1), image(3, 4, answer=True))
    assert tokens(CM3LEON, drawn, turns=True) == [END, 1, turn, BREAK, *I34, END]
    # Without turns (CM3Leon's way) the same documents have the plain layout.
    assert tokens(CM3LEON, drawn) == [END, 1, BREAK, *I34, END]


def test_modes_keep_the_answer_bit() -> None:
    assert document(text(1), text(2, answer=True), image(3, 4, answer=True)).shape == ((0, 1), (ANSWER, 1), (3, 2))


def test_length_equals_assembly_for_random_documents() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        documents = [
            document(
                *(
                    image(*rng.integers(0, 8, 2), answer=bool(rng.random() < 0.3))
                    if kind
                    else text(*rng.integers(20, 99, rng.integers(0, 4)), answer=bool(rng.random() < 0.3))
                    for kind in rng.integers(0, 2, rng.integers(0, 6))
                )
            )
            for _ in range(rng.integers(1, 4))
        ]
        for vocabulary in (CM3LEON, CHAMELEON):
            for turns in (False, True):
                made = tokens(vocabulary, *documents, turns=turns)
                pictures = sum(seg.kind == IMAGE for doc in documents for seg in doc.segments)
                assert vocabulary.is_image(np.array(made)).sum() == 2 * pictures


def test_a_code_outside_the_codebook_is_refused() -> None:
    with pytest.raises(DataError, match="outside the codebook"):
        tokens(CM3LEON, document(image(3, 8)))


def test_text_to_image_prompt_is_the_beginning_of_a_sample() -> None:
    for vocabulary in (CM3LEON, CHAMELEON):
        for retrieved in ([], [OTHER], [OTHER, OTHER]):
            whole = tokens(vocabulary, *retrieved, PAIR)
            prompt = text_to_image_prompt(vocabulary, [1, 2], retrieved).tolist()
            codes = vocabulary.image_ids(np.array([3, 4])).tolist()
            assert whole[: len(prompt)] == prompt
            assert whole[len(prompt) : len(prompt) + 2] == codes


def test_unconditional_prompts() -> None:
    mask = CM3LEON.sentinel(0)
    assert unconditional_prompt(CM3LEON).tolist() == [END, mask, BREAK]
    assert unconditional_prompt(CM3LEON, [OTHER]).tolist() == [END, 5, BREAK, *I67, BREAK, mask, BREAK]
    assert unconditional_prompt(CHAMELEON).tolist() == [CHAMELEON.bos, CHAMELEON.boi]


def test_infill_caption_prompts() -> None:
    mask = CM3LEON.sentinel(0)
    codes = np.array([3, 4])
    assert infill_caption_prompt(CM3LEON, codes).tolist() == [END, mask, BREAK, *I34, END, mask]
    front = [END, 5, BREAK, *I67, BREAK]
    assert infill_caption_prompt(CM3LEON, codes, [OTHER]).tolist() == [*front, mask, BREAK, *I34, END, mask]
    with pytest.raises(ConfigError, match="no sentinels"):
        infill_caption_prompt(CHAMELEON, codes)


def test_image_to_text_prompt() -> None:
    picture = [CHAMELEON.boi, *CHAMELEON.image_ids(np.array([3, 4])).tolist(), CHAMELEON.eoi]
    prompt = image_to_text_prompt(CHAMELEON, np.array([3, 4]), [500], turn=True)
    assert prompt.tolist() == [CHAMELEON.bos, *picture, 500, CHAMELEON.end_of_turn]
    assert image_to_text_prompt(CM3LEON, np.array([3, 4])).tolist() == [END, *I34, BREAK]
    assert image_to_text_prompt(CM3LEON, np.array([3, 4]), turn=True).tolist() == [END, *I34, CM3LEON.end_of_turn]
    front = [END, 5, BREAK, *I67, BREAK]
    assert image_to_text_prompt(CM3LEON, np.array([3, 4]), retrieved=[OTHER]).tolist() == [*front, *I34, BREAK]
