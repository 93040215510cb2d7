"""The states: exact image lengths, no image without room, forbidden tokens."""

import numpy as np
import pytest

from megacm3.inference.modality import Grammar, Modes, State
from megacm3.tokenizers.vocabulary import IMAGE, TEXT, Vocabulary

CM3LEON = Vocabulary.cm3leon(300, 16, 24, sentinels=4, image_tokens=9)
CHAMELEON = Vocabulary.chameleon(800, 16, 9)


def walk(vocabulary, mode, room, seed, prefer_images=True):
    """A random path through the states: every token drawn from the mask, image begins preferred."""
    grammar = Grammar(vocabulary, vocabulary.size + 5)
    cursor = grammar.begin(mode, room)
    rng = np.random.default_rng(seed)
    tokens = []
    while cursor.done is None:
        allowed = np.flatnonzero(grammar.masks[cursor.allowed].numpy())
        assert len(allowed) and allowed.max() < vocabulary.size  # padding rows are never allowed
        token = int(rng.choice(allowed))
        if prefer_images and vocabulary.boi in allowed and rng.random() < 0.3:
            token = vocabulary.boi
        tokens.append(token)
        cursor.advance(None if cursor.value_free else token)
    return tokens, cursor.done


def runs_of_images(vocabulary, tokens):
    kinds = vocabulary.kind[np.asarray(tokens)] == IMAGE
    edges = np.flatnonzero(np.diff(kinds, prepend=False, append=False))
    return edges.reshape(-1, 2)


@pytest.mark.parametrize("vocabulary", [CM3LEON, CHAMELEON], ids=["cm3leon", "chameleon"])
def test_interleaved_samples_hold_whole_images_only(vocabulary):
    images, endings = 0, set()
    for seed in range(60):
        tokens, done = walk(vocabulary, Modes.INTERLEAVED, 60, seed)
        endings.add(done)
        assert len(tokens) <= 60
        for start, end in runs_of_images(vocabulary, tokens):
            images += 1
            assert end - start == 9
            assert tokens[start - 1] == vocabulary.boi
            if end < len(tokens):  # closed by the right token
                assert tokens[end] in (
                    {vocabulary.eoi} if vocabulary.family == "chameleon" else {vocabulary.break_, vocabulary.eos}
                )
            else:
                pytest.fail("an image without its closing token")
    assert images > 60 and "stop" in endings


@pytest.mark.parametrize("vocabulary", [CM3LEON, CHAMELEON], ids=["cm3leon", "chameleon"])
def test_no_image_is_begun_without_room_for_all_of_it(vocabulary):
    grammar = Grammar(vocabulary)
    for room in range(1, 20):
        mask = grammar.masks[grammar.begin(Modes.INTERLEAVED, room).allowed]
        assert bool(mask[vocabulary.boi]) == (room >= 9 + 2)  # begin, nine codes, end


def test_a_second_image_behind_the_closing_break():
    grammar = Grammar(CM3LEON)
    cursor = grammar.begin(Modes.INTERLEAVED, 22)
    code = int(CM3LEON.image_ids(np.array([3]))[0])
    for token in [CM3LEON.boi] + 9 * [code] + [CM3LEON.break_]:
        cursor.advance(token)
    assert cursor.state == State.AFTER and cursor.room == 11
    assert grammar.masks[cursor.allowed][code]
    cursor.advance(code)
    assert cursor.state == State.IMAGE and cursor.codes_left == 8
    cursor.room = 9  # as if less had been left: here an image would not fit
    cursor.state = State.AFTER
    assert not grammar.masks[cursor.allowed][code]


def test_a_prompt_that_ends_with_a_picture_may_go_on_with_another():
    grammar = Grammar(CM3LEON)
    assert grammar.begin(Modes.INTERLEAVED, 40, last=CM3LEON.break_).allowed == State.AFTER
    assert grammar.begin(Modes.INTERLEAVED, 40, last=7).allowed == State.OPEN
    assert Grammar(CHAMELEON).begin(Modes.INTERLEAVED, 40, last=CHAMELEON.eoi).allowed == State.OPEN


def test_one_image_has_exactly_the_grids_codes():
    for vocabulary in (CM3LEON, CHAMELEON):
        tokens, done = walk(vocabulary, Modes.IMAGE, 50, 0)
        assert len(tokens) == 9 and done == "image" and (vocabulary.kind[np.asarray(tokens)] == IMAGE).all()


def test_text_has_no_image_and_ends_at_the_end_token_or_the_room():
    endings = set()
    for seed in range(200):
        tokens, done = walk(CM3LEON, Modes.TEXT, 150, seed)
        endings.add(done)
        assert (CM3LEON.kind[np.asarray(tokens[:-1], int)] == TEXT).all() and CM3LEON.eos not in tokens[:-1]
    assert endings == {"stop", "length"}


def test_infill_ends_at_eoss_and_not_at_the_end_of_the_sample():
    grammar = Grammar(CM3LEON)
    mask = grammar.masks[State.INFILL]
    assert mask[CM3LEON.eoss] and not mask[CM3LEON.eos] and not mask[CM3LEON.break_] and not mask[CM3LEON.sentinel(0)]
    cursor = grammar.begin(Modes.INFILL, 5)
    cursor.advance(7)
    cursor.advance(CM3LEON.eoss)
    assert cursor.done == "stop"


def test_an_answer_may_end_with_the_turn_where_tuning_taught_it(vocabulary):
    """cm3leon tuned on answers: between turns of a conversation they end with `<end-of-turn>`, not with `</s>`."""
    tuned = Grammar(vocabulary, turns=True)
    for state in (State.TEXT, State.OPEN, State.CLOSE):
        assert tuned.masks[state, vocabulary.end_of_turn] and tuned.masks[state, vocabulary.eos]
        assert not Grammar(vocabulary).masks[state, vocabulary.end_of_turn]
    cursor = tuned.begin(Modes.TEXT, 5)
    cursor.advance(vocabulary.end_of_turn)
    assert cursor.done == "stop"


def test_free_slots_of_chameleon_are_no_text():
    """Released: special is every token whose name begins with `<`, the <reservedNNNNN> too."""
    v = Vocabulary.chameleon(1000, 32, 16)
    grammar = Grammar(v)
    names = dict(v.special)
    free = [i for i in range(names["<eoss>"], names["<image>"]) if i not in names.values()]
    assert len(free) == 512 and not v.is_text(free).any() and v.is_text([names["<image>"] + 1, 999]).all()
    allowed = grammar.masks[State.OPEN].nonzero()[:, 0].tolist()
    assert not set(free) & set(allowed) and set(allowed) - {v.eos, v.end_of_turn, v.boi} == set(range(552, 1000))


def test_ids_that_an_import_added_are_never_drawn():
    v = Vocabulary.from_json(Vocabulary.chameleon(1000, 32, 16).to_json() | {"size": 1010})
    assert not Grammar(v).masks[:, 1000:].any() and Grammar(v).masks[State.TEXT, 999]


def test_specials_that_no_state_wants_are_never_allowed():
    for vocabulary in (CM3LEON, CHAMELEON):
        anywhere = Grammar(vocabulary).masks.any(0)
        assert not anywhere[vocabulary.pad]
    assert not any(Grammar(CM3LEON).masks[:, CM3LEON.sentinel(n)].any() for n in range(4))
