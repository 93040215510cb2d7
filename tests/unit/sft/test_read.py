"""Records to stores: own tables, conversations, mixed tasks; answers all the way to the loss."""

import datasets
import numpy as np
import pytest

from megacm3.data import cm3
from megacm3.data.build import build_stream
from megacm3.data.documents import ANSWER, IMAGE, TEXT, Layout
from megacm3.data.images import open_image, prepare_image
from megacm3.data.store import verify_store
from megacm3.data.units import UnitSettings, prepare
from megacm3.errors import ConfigError
from megacm3.resolve import load_config
from megacm3.sft.prompts import cut
from tests.unit.sft.helpers import make_store, options, picture, read, reasons, samples, shown, write_lines

OWN = "mine:\n  templates: ['Name it: {word} <break> {photo}']\n  pictures: [photo]\n  answers: [word]\n"


def config(store, *overrides):
    first = ["model.preset=tiny_cm3leon", f"data.mixture=[{{store: {store.folder}}}]", "data.packing=whole"]
    sizes = ["model.vocab_size=1024", "objective.sentinels=64", "model.sequence_length=512", "train.steps=1"]
    return load_config(None, [*first, *sizes, *overrides])


def questions(folder, count=40):
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = [{"image": f"{n}.png", "question": f"What is number {n}?", "answer": f"thing {n % 7}"} for n in range(count)]
    return write_lines(folder / "questions.jsonl", rows)


def test_own_fields_names_and_pictures(tmp_path) -> None:
    (tmp_path / "tasks.yaml").write_text(OWN)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(1))
    path = write_lines(tmp_path / "r.jsonl", [{"id": 7, "label": "cat", "photo": "a.png"}, {"label": "dog"}])
    given = options("mine", tmp_path / "tasks.yaml", fields={"word": "label"})
    found = read(path, given, tmp_path / "pictures")
    assert shown(samples(found[:1])[0]) == "Name it:[ cat](p)" and found[0].key == "7"
    assert reasons(found) == ["missing_field"]
    # A picture's bare base64, a NUL, a file as a folder: one bad row each, and the rest of the shard goes on.
    photos = ["../r.jsonl", "b.png", "A" * 5000, "a\0.png", "a.png/b.png"]
    outside = write_lines(tmp_path / "o.jsonl", [{"word": "x", "photo": photo} for photo in photos])
    assert reasons(read(outside, options("mine", tmp_path / "tasks.yaml"), tmp_path / "pictures")) == [
        "outside_folder",
        "no_image",
        "no_image",
        "no_path",
        "no_image",
    ]


def test_records_that_name_their_tasks(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    rows = [
        {"task": "vqav2", "images": ["a.png"], "question": "What?", "answer": "a cat"},
        {"task": "instructpix2pix", "images": ["a.png", "b.png"], "instruction": "red"},
        {"task": "safety", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}]},
        {"task": "none", "question": "What?"},
        {"question": "What?"},
    ]
    found = read(write_lines(tmp_path / "r.jsonl", rows), options("mixed", way="chameleon"))
    kept = samples(found[:3])
    assert [item.task for item in kept] == ["vqav2", "instructpix2pix", "safety"]
    assert kept[1].parts[1::2] == (picture(1), picture(2)) and shown(kept[2]) == "?[No.]"
    assert reasons(found) == ["unknown_task", "unknown_task"]


def test_conversations_of_a_saved_data_set(tmp_path) -> None:
    block = {"index": 0, "text": None, "type": "image"}
    message = {"role": "user", "content": [block, {"index": None, "text": "What?", "type": "text"}]}
    reply = {"role": "assistant", "content": [{"index": None, "text": "A cat.", "type": "text"}]}
    rows = [{"messages": [message, reply], "images": [{"bytes": picture(5), "path": None}]}]
    kinds = datasets.Dataset.from_list(rows).features | {"images": datasets.List(datasets.Image())}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / "set")
    (found,) = samples(read(tmp_path / "set", options("visual-chat", way="chameleon")))
    assert found.parts == (picture(5), "What?", "A cat.") and found.answers == (False, False, True)


def test_prompt_pictures_are_bordered_and_answers_cropped(tmp_path) -> None:
    wide = picture(1, (128, 64))
    rows = [{"original_image": "w.png", "edit_prompt": "x", "edited_image": "w.png"}]
    (tmp_path / "w.png").write_bytes(wide)
    path = write_lines(tmp_path / "r.jsonl", rows)
    (sample,) = samples(read(path, options("instructpix2pix", way="chameleon")))
    made = prepare(sample, 32, UnitSettings(mode="pad"))
    expected = [prepare_image(open_image(wide), 32, mode) for mode in ("pad", "crop")]
    assert all(np.array_equal(*pair) for pair in zip(made.pixels, expected, strict=True))
    assert (made.pixels[0][:8] == 255).all() and (made.pixels[1][:8] != 255).any()
    assert made.meta["task"] == "instructpix2pix"


def test_marks_in_a_user_s_text_never_become_control_tokens(tmp_path, text, chameleon_text, image) -> None:
    nasty = "</s> <break> <end-of-turn> <sentinel:0> <reserved08706> <racm3:break> IMGIMGBZ <eoss> <image> <s>"
    (tmp_path / "a.png").write_bytes(picture(1))
    path = write_lines(tmp_path / "r.jsonl", [{"image": "a.png", "question": nasty, "answer": nasty}])
    for tokenizer, way in ((text, "cm3leon"), (chameleon_text, "chameleon")):
        (tmp_path / way).mkdir()
        store = make_store(path, options("vqav2", way=way), tmp_path / way, tokenizer, image)
        vocabulary = store.vocabulary()
        ids = np.concatenate([s.tokens for s in store.document(0).segments if s.kind == TEXT])
        assert vocabulary.is_text(ids).all()
        assembled, _ = Layout(vocabulary, turns=way == "chameleon").assemble([store.document(0)])
        control = cm3.is_control(vocabulary)[assembled].sum()
        assert control == (3 if way == "cm3leon" else 5)  # </s> B </s>; <s> BOI EOI turn </s>
        decoded = "".join(tokenizer.decode(s.tokens) for s in store.document(0).segments if s.answer)
        assert decoded.strip() == nasty


def test_whole_answers_are_filled_in_after_the_picture(tmp_path, text, image) -> None:
    store = make_store(questions(tmp_path), options("vqav2"), tmp_path, text, image)
    assert store.metadata(["task"])["task"].to_pylist() == ["vqav2"] * 40
    assert store.answers() == {"text": 40, "image": 0}
    stream = build_stream(config(store, "objective.whole_segment=1.0", "model.sequence_length=128"))
    vocabulary, found = stream.vocabulary, 0
    for number in range(80):
        source, spans = cm3.split_tail(stream.sequence(number).tokens, vocabulary)
        words = [text.decode(span).strip() for span in spans if vocabulary.is_text(span).all()]
        if len(spans) == 1 and words and words[0] in {f"thing {i}" for i in range(7)}:
            found += 1
            assert vocabulary.is_image(source).sum() == 64
    # One in four or five masked segments is an answer: question, answer, full stop, picture.
    assert found >= 5
    assert all(stream.sequence(n).loss_mask.sum() == stream.counts(n)["tokens"] - 1 for n in range(4))


def test_the_prompt_of_an_infilled_answer_is_what_training_makes(tmp_path, text, image) -> None:
    store = make_store(questions(tmp_path, 6), options("vqav2"), tmp_path, text, image)
    vocabulary = store.vocabulary()
    layout = Layout(vocabulary)
    for document in (store.document(i) for i in range(6)):
        prompt = cut(document, layout)
        assert prompt.infill and prompt.ends == (vocabulary.eoss,)
        tokens, flags = layout.assemble([document])
        start, stop = np.flatnonzero(flags)[[0, -1]] + [0, 1]
        trained, _ = cm3.rearrange(tokens, np.array([[start, stop]]), vocabulary)
        assert np.array_equal(trained[: len(prompt.tokens)], prompt.tokens)
        rest = trained[len(prompt.tokens) :]
        assert rest.tolist() == [*prompt.answer[0].tokens.tolist(), vocabulary.eoss]


def test_chameleon_s_way_packed_with_loss_on_answers_only(tmp_path, chameleon_text, image) -> None:
    rows = [{"task": "vqav2", "image": f"{n}.png", "question": f"Number {n}?", "answer": "thing"} for n in range(20)]
    rows += [{"task": "text-to-image", "image": f"{n}.png", "caption": f"number {n}"} for n in range(20)]
    questions(tmp_path)
    store = make_store(
        write_lines(tmp_path / "r.jsonl", rows), options("mixed", way="chameleon"), tmp_path, chameleon_text, image,
        mode="pad",
    )  # fmt: skip
    assert store.answers() == {"text": 20, "image": 20} and verify_store(store.folder).documents == 40
    overrides = ["model.preset=tiny_chameleon_7b", "model.vocab_size=9000", "objective.loss_on=answers"]
    stream = build_stream(config(store, *overrides, "objective.kind=causal"))
    vocabulary = stream.vocabulary
    packed = [stream.sequence(number) for number in range(6)]
    assert any(len(sequence.samples) > 3 for sequence in packed)
    for number, sequence in enumerate(packed):
        targets, borne = sequence.tokens[1:], sequence.tokens[1:][sequence.loss_mask]
        drawn = [store.segment_lengths(d.documents[-1]) for d in stream.drawn(number)]
        answers = sum(length for shape in drawn for mode, length in shape if mode & ANSWER)
        pictures = sum(mode == IMAGE | ANSWER for shape in drawn for mode, _ in shape)
        # Answers, their pictures' marks and the end of each; nothing of the prompts, not the token that opens it.
        assert len(borne) == answers + 2 * pictures + len(drawn)
        assert (borne == vocabulary.eos).sum() == len(drawn) and not (borne == vocabulary.end_of_turn).any()
        assert (targets == vocabulary.end_of_turn).sum() == len(drawn)
    layout = Layout(vocabulary, turns=True)
    asked, drawn = cut(store.document(0), layout), cut(store.document(20), layout)
    assert asked.tokens[-1] == vocabulary.end_of_turn and asked.answer[0].kind == TEXT and not asked.infill
    assert drawn.tokens[-2:].tolist() == [vocabulary.end_of_turn, vocabulary.boi] and drawn.answer[0].kind == IMAGE


def test_plain_picture_first(tmp_path, text, image) -> None:
    store = make_store(questions(tmp_path, 3), options("vqav2", way="image-first"), tmp_path, text, image)
    assert [mode for mode, _ in store.segment_lengths(0)] == [IMAGE, TEXT, TEXT | ANSWER]
    vocabulary = store.vocabulary()
    tokens, _ = Layout(vocabulary).assemble([store.document(0)])
    assert tokens[0] == vocabulary.eos and vocabulary.is_image(tokens[1:65]).all() and tokens[65] == vocabulary.break_
    prompt = cut(store.document(0), Layout(vocabulary))
    assert not prompt.infill and len(prompt.tokens) + len(prompt.answer[0].tokens) + 1 == len(tokens)


def test_too_long_documents_are_rejected_by_name(tmp_path, text, image) -> None:
    rows = [{"image": "0.png", "question": "word " * n, "answer": "a"} for n in (1, 300)]
    questions(tmp_path, 1)
    path = write_lines(tmp_path / "r.jsonl", rows)
    store = make_store(path, options("vqav2"), tmp_path, text, image, max_tokens=120)
    rejected = store.folder / "rejects" / "part-00000.parquet"
    import pyarrow.parquet as pq

    (row,) = pq.read_table(rejected).to_pylist()
    assert len(store) == 1 and row["reason"] == "too_long" and "more than 120" in row["detail"]


@pytest.mark.parametrize("variants", ["one", "all"])
def test_rows_and_keys_are_unique(tmp_path, variants) -> None:
    found = samples(read(questions(tmp_path), options("vqav2", variants=variants)))
    assert [item.row for item in found] == list(range(40 * (1 if variants == "one" else 3)))
    assert len({item.key for item in found}) == len(found)


def test_modalities_are_balanced_over_stores(tmp_path, text, image) -> None:
    path = questions(tmp_path, 30)
    rows = [{"image": f"{n}.png", "caption": f"number {n}"} for n in range(5)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asked = make_store(path, options("vqav2", way="image-first"), tmp_path / "a", text, image)
    drawn = make_store(write_lines(tmp_path / "d.jsonl", rows), options("text-to-image"), tmp_path / "b", text, image)
    both = f"data.mixture=[{{store: {asked.folder}, weight: 9}}, {{store: {drawn.folder}}}]"
    stream = build_stream(config(asked, both, "data.image_answers=0.5", "objective.kind=causal"))
    stores = [sample.source for number in range(40) for sample in stream.drawn(number)]
    assert abs(np.mean(stores) - 0.5) < 0.1
    with pytest.raises(ConfigError, match=r"are 0\.00 to 0\.00"):
        build_stream(config(asked, "data.image_answers=0.5"))
    with pytest.raises(ConfigError, match="give one or the other"):
        config(asked, "data.image_answers=0.5", "data.upsample=3")


def test_a_picture_of_several_questions_is_encoded_once(tmp_path, text, image) -> None:
    questions(tmp_path, 4)
    rows = [{"image": f"{n // 3}.png", "question": f"Question {n}?", "answer": "a"} for n in range(12)]
    path = write_lines(tmp_path / "r.jsonl", rows)
    encoded = []

    class Counting:
        def __getattr__(self, name):
            return getattr(image, name)

        def encode(self, pixels):
            encoded.append(len(pixels))
            return image.encode(pixels)

    store = make_store(path, options("vqav2"), tmp_path, text, Counting())
    # Batches of 8 pictures: four are about pictures 0, 1 and 2, four about 2 and 3.
    assert encoded == [3, 2]
    codes = [store.document(n).segments[-1].tokens for n in range(12)]
    for number in range(12):
        pixels = prepare_image(open_image(picture(number // 3)), image.image_size).copy()
        assert np.array_equal(codes[number], image.encode(pixels[None]).numpy()[0])
