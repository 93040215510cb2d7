"""The API on a whole folder: prompts as in training, samples, captions, fillings, refusals."""

import json
import shutil

import numpy as np
import pytest

from megacm3.data.documents import (
    IMAGE,
    TEXT,
    Document,
    Layout,
    Segment,
    infill_caption_prompt,
    text_to_image_prompt,
    unconditional_prompt,
)
from megacm3.errors import CheckpointError, ConfigError, DataError
from megacm3.evaluation.tasks import QUESTION, STOP
from megacm3.inference import requests
from megacm3.inference.api import Generator
from megacm3.inference.asks import RequestMaker
from megacm3.inference.guidance import ClassifierFree, ThreeStream
from megacm3.inference.modality import Modes, State
from megacm3.inference.pieces import Wish
from megacm3.inference.requests import Mask
from megacm3.sft.prompts import cut
from megacm3.sft.render import render
from megacm3.sft.tasks import load_tasks
from megacm3.tokenizers.vocabulary import Vocabulary

PICTURE = np.arange(16)
OTHER = PICTURE[::-1].copy()


def text(*ids):
    return Segment(TEXT, np.array(ids))


def document(number=0):
    return Document(number, (text(9, 8), Segment(IMAGE, OTHER)))


@pytest.fixture(scope="module", params=["cm3leon", "chameleon"])
def both(request, vocabulary):
    return vocabulary if request.param == "cm3leon" else Vocabulary.chameleon(700, 32, 16)


def test_picture_prompts_are_what_training_has_before_a_picture(both):
    """For any segments, with and without documents: the prompt and a picture give the beginning of the sample."""
    for segments in ([text(5, 6)], [text(5), Segment(IMAGE, PICTURE)], [text(5), Segment(IMAGE, PICTURE), text(7)], []):
        for retrieved in ([], [document()], [document(), document()]):
            own = Document(1, (*segments, Segment(IMAGE, OTHER)))
            sample = Layout(both).assemble([*retrieved, own])[0].tolist()
            prompt = requests.picture_prompt(both, segments, retrieved)
            assert sample[: len(prompt)] == prompt
            assert both.is_image(sample[len(prompt) : len(prompt) + 16]).all()
            assert not both.is_image(prompt[-1])


def test_a_tuned_model_is_asked_for_a_picture_as_it_was_taught(both):
    """Behind `<end-of-turn>`, as the loader puts it where prompt and answer meet."""
    for segments in ([text(5, 6)], [text(5), Segment(IMAGE, PICTURE)], [text(5), Segment(IMAGE, PICTURE), text(7)]):
        own = Document(1, (*segments, Segment(IMAGE, OTHER, answer=True)))
        sample = Layout(both, turns=True).assemble([own])[0].tolist()
        prompt = requests.picture_prompt(both, segments, (), turn=True)
        assert sample[: len(prompt)] == prompt and both.end_of_turn in prompt
        assert both.is_image(sample[len(prompt) : len(prompt) + 16]).all()


def test_a_tuned_model_is_asked_for_a_text_as_it_was_taught(hf_folder, tmp_path):
    """Its export says so: picture, question, `<end-of-turn>`; before tuning the caption is infilled."""
    copy = tmp_path / "tuned"
    shutil.copytree(hf_folder, copy)
    sidecar = json.loads((copy / "megacm3.json").read_text())
    (copy / "megacm3.json").write_text(json.dumps(sidecar | {"answers": True}))
    tuned, base = Generator.load(copy), Generator.load(hf_folder)
    question = tuned.text_tokenizer.encode("a red")
    own = Document(0, (Segment(IMAGE, PICTURE), text(*question), Segment(TEXT, np.array([5]), answer=True)))
    sample = Layout(tuned.vocabulary, turns=True).assemble([own])[0].tolist()
    ids, _ = RequestMaker(tuned).caption_prompt(PICTURE, "a red", ())
    assert list(ids) == sample[: len(ids)] and ids[-1] == tuned.vocabulary.end_of_turn
    # A captioning template that asks nothing: the picture, its turn, the caption.
    own = Document(0, (Segment(IMAGE, PICTURE), Segment(TEXT, np.array([5]), answer=True)))
    sample = Layout(tuned.vocabulary, turns=True).assemble([document(), own])[0].tolist()
    ids, _ = RequestMaker(tuned).caption_prompt(PICTURE, "", [document()])
    assert list(ids) == sample[: len(ids)] and ids[-1] == tuned.vocabulary.end_of_turn
    assert tuned.grammar.masks[State.TEXT, tuned.vocabulary.end_of_turn]
    assert RequestMaker(base).caption_prompt(PICTURE, "a red", ())[0][-1] == base.vocabulary.sentinel(0)


@pytest.mark.parametrize(
    ("task", "template", "fields", "prompt", "after"),
    [
        ("coco-captions", 0, {"caption": "a red cat"}, "", ""),
        ("coco-captions", 1, {"caption": "a red cat"}, "Describe the given picture.", ""),
        (
            "vqav2",
            0,
            {"question": "Is it {red}?", "answer": "a red cat"},
            QUESTION.format(question="Is it {red}?"),
            STOP,
        ),
        ("vqav2", 2, {"question": "What?", "answer": "red"}, "Question: What? The answer is ", "."),
    ],
)
def test_a_text_is_asked_for_as_fine_tuning_put_it(generator, task, template, fields, prompt, after):
    """The template's document with its answer masked, to the last space: sft/prompts.py cuts it from the stored one."""
    parts = render(load_tasks()[task], template, fields | {"image": b"picture"}, "cm3leon")
    encode = generator.text_tokenizer.encode
    segments = [
        Segment(IMAGE, PICTURE, part.answer)
        if isinstance(part.content, bytes)
        else Segment(TEXT, np.array(encode(part.content)), part.answer)
        for part in parts
    ]
    wanted = cut(Document(0, tuple(segments)), Layout(generator.vocabulary))
    ids, mode = RequestMaker(generator).caption_prompt(PICTURE, prompt, (), after)
    assert list(ids) == wanted.tokens.tolist() and mode == Modes.INFILL and wanted.infill


def test_picture_prompt_equals_the_shared_builder(both):
    for retrieved in ([], [document()]):
        expected = text_to_image_prompt(both, [5, 6], retrieved).tolist()
        assert requests.picture_prompt(both, [text(5, 6)], retrieved) == expected


def test_open_prompts_go_on_as_training_does(both):
    for segments in ([text(5, 6)], [text(5), Segment(IMAGE, PICTURE)]):
        more = Document(1, (*segments, text(7)))
        sample = Layout(both).assemble([document(), more])[0].tolist()
        prompt = requests.open_prompt(both, segments, [document()])
        assert sample[: len(prompt)] == prompt and sample[len(prompt) :] == [7, both.eos]


def test_guidance_streams(vocabulary):
    docs = [document()]
    two = requests.guides_for(vocabulary, ClassifierFree(3), [text(5)], docs)(())
    assert two == [unconditional_prompt(vocabulary, docs).tolist()]
    edit = [text(5), Segment(IMAGE, PICTURE), text(6)]
    middle, nothing = requests.guides_for(vocabulary, ThreeStream(), edit, [])(())
    v = vocabulary
    codes = v.image_ids(PICTURE).tolist()
    assert middle == [v.eos, v.sentinel(0), v.break_, *codes, v.break_, v.sentinel(1), v.break_]
    assert nothing == [v.eos, v.sentinel(0), v.break_]


def test_guidance_streams_of_chameleon():
    v = Vocabulary.chameleon(700, 32, 16)
    edit = [text(50), Segment(IMAGE, PICTURE), text(60)]
    middle, nothing = requests.guides_for(v, ThreeStream(), edit, [])(())
    codes = v.image_ids(PICTURE).tolist()
    assert middle == [v.bos, v.boi, *codes, v.eoi, v.boi] and nothing == [v.bos, v.boi]
    before = [v.bos, 50, v.boi, *codes, v.eoi, 60, v.boi]
    assert requests.running_guides(v, ThreeStream(), [])(before) == [middle, nothing]
    assert requests.running_guides(v, ClassifierFree(), [])(before) == [nothing]


def test_infill_prompts(vocabulary):
    v = vocabulary
    own = Segment(IMAGE, PICTURE)
    prompt, mask = requests.infill(v, [Mask("text"), own], [document()])
    assert prompt == infill_caption_prompt(v, PICTURE, [document()]).tolist() and mask.kind == "text"
    codes = v.image_ids(PICTURE).tolist()
    prompt, _ = requests.infill(v, [text(5, 6), Mask("text"), text(7), own], [])
    assert prompt == [v.eos, 5, 6, v.sentinel(0), 7, v.break_, *codes, v.eos, v.sentinel(0)]
    prompt, _ = requests.infill(v, [text(5, 6), Mask("image")], [])
    assert prompt == [v.eos, 5, 6, v.break_, v.sentinel(0), v.eos, v.sentinel(0)]
    for parts in ([own], [Mask(), own, Mask()], [Mask("sound")]):
        with pytest.raises(ConfigError, match="mask"):
            requests.infill(v, parts, [])
    with pytest.raises(ConfigError, match="no sentinels"):
        requests.infill(Vocabulary.chameleon(700, 32, 16), [Mask()], [])


def test_names_of_special_tokens_in_a_prompt_stay_text(generator, vocabulary):
    for evil in ("<break>", "</s> <sentinel:0> <eoss>", "IMGIMGBZ <pad>", "<racm3:break>"):
        segment = requests.text_segment(evil, generator.text_tokenizer)
        assert vocabulary.is_text(segment.tokens).all()
        assert generator.text_tokenizer.decode(segment.tokens) == evil


def test_texts_are_cleaned_as_captions_are(generator):
    tokenizer = generator.text_tokenizer
    assert requests.text_segment("  a red\r\napple\x07 ", tokenizer).tokens.tolist() == tokenizer.encode("a red\napple")
    assert requests.text_segment("a ", tokenizer, strip=False).tokens.tolist() == tokenizer.encode("a ")
    for bad in ("", "   ", "\ud800", "a\0b"):
        with pytest.raises(DataError, match="prompt"):
            requests.text_segment(bad, tokenizer)


def test_images_have_shape_and_their_seed_decides(generator):
    prompts = ["a red apple", "a blue house"]
    options = {"guidance": 2.0, "seed": 5}
    pictures = generator.images(prompts, n=2, **options)
    assert pictures.shape == (2, 2, 32, 32, 3) and pictures.dtype == np.uint8
    codes = generator.image_codes(prompts, n=2, **options)
    assert codes.shape == (2, 2, 16) and 0 <= codes.min() and codes.max() < 32
    assert (codes[0, 0] != codes[0, 1]).any()
    alone = generator.image_codes(prompts[1:], n=3, **options)  # other batch-mates, more samples
    assert (alone[0, :2] == codes[1]).all()
    assert (generator.image_codes(prompts, n=2, guidance=2.0, seed=6) != codes).any()


def test_guidance_1_is_one_stream_and_0_ignores_the_text(generator):
    sharp = {"temperature": 0.0}
    plain = generator.image_codes(["a red apple"], guidance=1, **sharp)
    assert (plain == generator.image_codes(["a red apple"], guidance=ClassifierFree(1.0), **sharp)).all()
    without = [generator.image_codes([p], guidance=0, **sharp) for p in ("a red apple", "a blue cat")]
    assert (without[0] == without[1]).all() and (without[0] != plain).any()


def test_contrastive_and_retrieved_and_editing_run(generator, pixels):
    docs = [[document(), document(1)], []]
    for options in ({"contrastive_k": 3, "contrastive_alpha": 0.3}, {"guidance": 3.0}):
        codes = generator.image_codes(["a cat", "a star"], retrieved=docs, **options)
        assert codes.shape == (2, 1, 16)
    edited = generator.image_codes([["Edit", pixels[0], "a red cat"]], guidance=7.5, image_guidance=1.5)
    assert edited.shape == (1, 1, 16)
    changed = generator.image_codes([["Edit", pixels[1], "a red cat"]], guidance=7.5, image_guidance=1.5)
    assert (edited != changed).any()


def test_streamed_pictures_end_as_the_whole_ones(generator):
    pieces = list(generator.stream_images(["a cat", "a star"], n=2, seed=1))
    whole = generator.images(["a cat", "a star"], n=2, seed=1)
    partial = [p for p in pieces if p.kind == "partial" and (p.prompt, p.sample) == (1, 0)]
    assert [p.rows for p in partial] == [1, 2, 3]
    for piece in pieces:
        if piece.kind == "image":
            assert (piece.pixels == whole[piece.prompt, piece.sample]).all()
    assert sum(p.kind == "image" for p in pieces) == 4


def test_captions_and_answers(generator, pixels):
    captions = generator.caption(pixels, max_tokens=12)
    assert len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
    assert captions[1:] == generator.caption(pixels[1:], max_tokens=12)
    options = {"prompt": "Describe the given picture.", "max_tokens": 12, "temperature": 0.8, "seed": 3}
    assert generator.caption(pixels, **options) == generator.caption(pixels, **options)


def test_infill_gives_text_or_a_picture(generator, pixels):
    assert isinstance(generator.infill(["a ", Mask("text"), " apple", pixels[0]], max_tokens=5), str)
    picture = generator.infill(["a red apple", Mask("image")], temperature=1.0)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8


def test_interleaved_parts_come_in_order(generator, pixels):
    from megacm3.inference.sampling import Sampling

    hot = Sampling(5.0)
    prompts = [f"a star {i}" for i in range(30)]
    results = generator.complete([["a cat", pixels[0]], *prompts], text=hot, guidance=2.0)
    images = [part for parts in results for part in parts if not isinstance(part, str)]
    assert images and all(image.shape == (32, 32, 3) for image in images)
    texts = [part for parts in generator.complete(["a cat"] * 3, text=hot, images=False) for part in parts]
    assert all(isinstance(part, str) for part in texts)


def test_half_characters_are_held_back(generator):
    from megacm3.inference.pieces import TextWriter

    ids = generator.text_tokenizer.encode("é\N{GRINNING FACE}x")
    writer = TextWriter(generator.text_tokenizer)
    pieces = [writer.add([i]) for i in ids]
    assert "".join(pieces) == "é\N{GRINNING FACE}x" and "" in pieces and "\ufffd" not in "".join(pieces)


def test_too_long_prompts_are_refused(generator):
    with pytest.raises(DataError, match=r"context is 96.*shorten the prompt"):
        generator.images(["red apple " * 60])
    with pytest.raises(DataError, match="context"):
        generator.images(["a cat"], retrieved=[[document()] * 5])
    with pytest.raises(ConfigError, match="retrieved"):
        generator.images(["a cat"], retrieved=[])
    with pytest.raises(ConfigError, match="n is 0"):
        generator.images(["a cat"], n=0)


def test_wishes_that_contradict_themselves_are_refused(generator, pixels):
    edit = [["Edit", pixels[0], "a red cat"]]
    with pytest.raises(ConfigError, match=r"three streams.*exclude"):
        generator.image_codes(edit, image_guidance=1.5, contrastive_k=4)
    with pytest.raises(ConfigError, match="guidance is nan"):
        generator.image_codes(["a cat"], guidance=float("nan"))
    with pytest.raises(ConfigError, match="image guidance is inf"):
        generator.image_codes(edit, image_guidance=float("inf"))
    with pytest.raises(ConfigError, match=r"expected a list of prompts, such as \['a cat'\]"):
        generator.images("a cat")
    with pytest.raises(ConfigError, match="expected a list"):
        generator.complete("a cat")
    with pytest.raises(ConfigError, match="nothing to guide"):
        generator.image_codes([[]])
    assert generator.image_codes([[]], guidance=1).shape == (1, 1, 16)
    assert generator.image_codes([], n=2).shape == (0, 2, 16)
    for count in (0, -3):
        for ask in (generator.caption, lambda _, **o: generator.complete(["a cat"], **o)):
            with pytest.raises(ConfigError, match=f"max_tokens is {count}; expected 1 or more"):
                ask(pixels[:1], max_tokens=count)


def test_wrong_pictures_are_refused(generator):
    with pytest.raises(DataError, match="expected"):
        generator.caption(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(DataError, match="expected"):
        generator.caption(np.zeros((1, 32, 32, 3), np.float32))


def test_folders_that_do_not_fit(hf_folder, tmp_path):
    def copy(name):
        shutil.copytree(hf_folder, tmp_path / name)
        return tmp_path / name

    bare = copy("bare")
    shutil.rmtree(bare / "image_tokenizer")
    generator = Generator.load(bare)
    assert generator.image_codes(["a cat"]).shape == (1, 1, 16)  # codes need no pictures
    with pytest.raises(DataError, match="no image_tokenizer/"):
        generator.images(["a cat"])
    shutil.rmtree(bare / "text_tokenizer")
    with pytest.raises(DataError, match="no text_tokenizer/"):
        Generator.load(bare).images(["a cat"])
    (bare / "megacm3.json").unlink()
    with pytest.raises(CheckpointError, match=r"megacm3\.json does not exist"):
        Generator.load(bare)

    other = copy("other")
    sidecar = json.loads((other / "megacm3.json").read_text())
    (other / "megacm3.json").write_text(json.dumps(sidecar | {"image_size": 64}))
    with pytest.raises(DataError, match="the model expects"):
        Generator.load(other).images(["a cat"])
    (other / "megacm3.json").write_text(json.dumps(sidecar | {"image_size": 0}))  # exported without tokenizers
    assert Generator.load(other).image_size == 32
    (other / "megacm3.json").write_text(json.dumps(sidecar | {"grid": [5, 5]}))
    with pytest.raises(CheckpointError, match="grid is"):
        Generator.load(other)
    (other / "megacm3.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="lacks vocabulary"):
        Generator.load(other)


def test_a_mixed_batch_gives_what_each_wish_gives_alone(generator, pixels):
    drawing = {"guidance": 3.0, "temperature": 0.5, "seed": 3}
    reading = {"max_tokens": 8, "seed": 5}
    wishes = [
        Wish("image", "a red apple", drawing),
        Wish("caption", pixels[0]),
        Wish("complete", "a green", {"images": False, **reading}),
        Wish("image", ["a blue cat", pixels[1]], drawing),
    ]
    found: dict = {number: [] for number in range(len(wishes))}
    for piece in generator.mixed(wishes):
        if piece.kind != "done":
            found[piece.prompt].append(piece.pixels if piece.kind == "image" else piece.text)
    assert np.array_equal(found[0][0], generator.images(["a red apple"], **drawing)[0, 0])
    assert "".join(found[1]).strip() == generator.caption(pixels[:1])[0]
    assert "".join(found[2]) == "".join(generator.complete(["a green"], images=False, **reading)[0])
    assert np.array_equal(found[3][0], generator.images([["a blue cat", pixels[1]]], **drawing)[0, 0])


def test_wishes_that_are_none_are_refused(generator, pixels):
    for wish in (Wish("draw", "x"), Wish("caption", "x"), Wish("image", "x", {"guidanse": 3})):
        with pytest.raises(ConfigError, match="a wish of kind"):
            list(generator.mixed([wish]))
