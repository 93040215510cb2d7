"""Each release in the layout that it is published in, made small."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacm3.errors import ConfigError, DataError
from tests.unit.sft.helpers import options, picture, read, reasons, samples, shown, write_lines


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def dump(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


COCO = {
    "info": {"description": "COCO 2017 Dataset", "year": 2017},
    "licenses": [],
    "images": [
        {"license": 4, "file_name": "000000391895.jpg", "height": 360, "width": 640, "id": 391895},
        {"license": 4, "file_name": "000000522418.jpg", "height": 480, "width": 640, "id": 522418},
    ],
    "annotations": [
        {"image_id": 522418, "id": 38, "caption": "A woman wearing a net on her head cutting a cake. "},
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet on a small moped."},
        {"image_id": 522418, "id": 41, "caption": "A woman cutting a large white sheet cake."},
    ],
}


def test_coco_captions(tmp_path: Path) -> None:
    path = dump(tmp_path / "captions_train2017.json", COCO)
    images = pictures(tmp_path / "train2017", "000000391895.jpg", "000000522418.jpg")
    found = samples(read(path, options("coco-captions"), images))
    assert [(item.key, item.row, item.parts[-1]) for item in found] == [
        ("38", 0, picture(1)),
        ("770337", 1, picture(0)),
        ("41", 2, picture(1)),
    ]
    for item, said in zip(found, COCO["annotations"], strict=True):
        said = said["caption"].strip()
        assert shown(item) in (f"[{said}](p)", f"Describe the given picture.[ {said}](p)")
    every = samples(read(path, options("coco-captions", variants="all"), images))
    assert len(every) == 6 and len({item.key for item in every}) == 6
    # The same captions can ask for pictures.
    drawn = samples(read(path, options("text-to-image"), images))
    assert shown(drawn[1]) == "A man with a red helmet on a small moped.[p]"


def test_coco_s_gaps_are_named(tmp_path: Path) -> None:
    broken = {
        "images": [*COCO["images"], {"file_name": "x.jpg", "id": 1}],
        "annotations": [*COCO["annotations"], {"image_id": 7, "id": 8, "caption": "?"}],
    }
    images = pictures(tmp_path / "train2017", "000000391895.jpg")
    found = read(dump(tmp_path / "captions.json", broken), options("coco-captions"), images)
    assert sorted(reasons(found)) == ["no_caption", "no_image", "no_image", "no_image"]
    boxes = {"images": COCO["images"], "annotations": [{"image_id": 391895, "id": 1, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(DataError, match="annotations without captions"):
        read(dump(tmp_path / "instances.json", boxes), options("coco-captions"), images)


def vqa(questions: list[dict], annotations: list[dict], folder: Path) -> list[Path]:
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    asked = {**head, "task_type": "Open-Ended", "questions": questions}
    return [
        dump(folder / "v2_OpenEnded_mscoco_train2014_questions.json", asked),
        dump(folder / "v2_mscoco_train2014_annotations.json", {**head, "annotations": annotations}),
    ]


def answers(*words: str, **more: Any) -> list[dict]:
    return [{"answer": w, "answer_confidence": "yes", "answer_id": i + 1, **more} for i, w in enumerate(words)]


def test_vqav2_joins_by_question_id(tmp_path: Path) -> None:
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 262146, "question": "What color is the snow?", "question_id": 262146001},
    ]
    # In another order than the questions.
    annotations = [
        {"question_type": "what color is the", "multiple_choice_answer": "white", "answers": answers("white", "snow"),
         "image_id": 262146, "answer_type": "other", "question_id": 262146001},
        {"question_type": "what is this", "multiple_choice_answer": "net", "answers": answers("net", "netting"),
         "image_id": 458752, "answer_type": "other", "question_id": 458752000},
    ]  # fmt: skip
    paths = vqa(questions, annotations, tmp_path)
    images = pictures(tmp_path / "train2014", "COCO_train2014_000000458752.jpg", "COCO_train2014_000000262146.jpg")
    found = samples(read(paths, options("vqav2", variants="all"), images))
    assert [item.key for item in found] == ["458752000", "458752000/1", "458752000/2"] + [
        "262146001",
        "262146001/1",
        "262146001/2",
    ]
    assert [shown(item) for item in found[:3]] == [
        "Question: What is this photo taken looking through? Answer:[ net].(p)",
        "Question: What is this photo taken looking through?\n[net](p)",
        "Question: What is this photo taken looking through? The answer is[ net].(p)",
    ]
    assert found[0].parts[-1] == picture(0) and found[3].parts[-1] == picture(1)
    assert "[ white]" in shown(found[3])


def test_vqa_s_gaps_are_named(tmp_path: Path) -> None:
    questions = [{"image_id": n, "question": "?", "question_id": n} for n in (1, 2, 3, 4, 4)]
    annotations = [{"image_id": n, "question_id": n, "answers": answers("a")} for n in (1, 4, 9)]
    annotations.append({"image_id": 8, "question_id": 3, "answers": answers("a")})
    images = pictures(tmp_path / "images", "COCO_train2014_000000000001.jpg")
    found = read(vqa(questions, annotations, tmp_path), options("okvqa"), images)
    assert reasons(found) == ["no_answer", "wrong_image", "duplicate_name", "duplicate_name", "no_question"]
    assert len(found) == 6


def test_okvqa_takes_the_most_frequent_answer(tmp_path: Path) -> None:
    questions = [{"image_id": 51606, "question": "What is the hairstyle called?", "question_id": 516065}]
    words = answers("pony tail", "pony tail", "braid", "pony tail", "braid", raw_answer="pony tails")
    annotations = [
        {"image_id": 51606, "answer_type": "other", "question_type": "four", "question_id": 516065, "answers": words,
         "confidence": 3}
    ]  # fmt: skip
    images = pictures(tmp_path / "train2014", "COCO_train2014_000000051606.jpg")
    found = samples(read(vqa(questions, annotations, tmp_path), options("okvqa"), images))
    assert "[ pony tail]" in shown(found[0]).replace("\n[pony tail]", "[ pony tail]")


def test_vizwiz(tmp_path: Path) -> None:
    entries = [
        {"image": "VizWiz_train_00000000.jpg", "question": "What's the name of this product?", "answerable": 1,
         "answers": [{"answer_confidence": "yes", "answer": w} for w in ("basil leaves", "basil leaves", "basil")],
         "answer_type": "other"},
        {"image": "VizWiz_test_00000001.jpg", "question": "Can you tell me what this is?"},
    ]  # fmt: skip
    images = pictures(tmp_path / "train", "VizWiz_train_00000000.jpg")
    found = read(dump(tmp_path / "train.json", entries), options("vizwiz"), images)
    assert "basil leaves]" in shown(samples(found[:1])[0]) and found[0].key == "VizWiz_train_00000000.jpg"
    assert reasons(found) == ["no_answer"]


def problem(split: str, **changes: Any) -> dict[str, Any]:
    return {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0, "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade2",
        "subject": "social science", "topic": "geography", "category": "Geography", "skill": "Read a map",
        "lecture": "Maps have four cardinal directions.", "solution": "To find the answer, look at the compass rose.",
        "split": split,
    } | changes  # fmt: skip


def test_scienceqa(tmp_path: Path) -> None:
    problems = {
        "1": problem("train"),
        "2": problem("train", image=None),
        "3": problem("train", solution="", hint="Look at the picture."),
        "4": problem("test"),
        "5": problem("train", answer=9),
    }
    paths = [dump(tmp_path / "problems.json", problems)]
    paths.append(dump(tmp_path / "pid_splits.json", {"train": ["1", "2", "3", "5"], "val": [], "test": ["4"]}))
    images = pictures(tmp_path / "images", "train/1/image.png", "train/3/image.png", "test/4/image.png")
    found = read(paths, options("scienceqa", variants="all"), images)
    assert reasons(found) == ["filter:no_image", "no_answer"]
    one = "Question: Which of these states is farthest north?\nContext: N/A\nOptions: (A) West Virginia (B) Louisiana "
    one += "(C) Arizona (D) Oklahoma\nAnswer:"
    kept = samples([item for item in found if item.key[0] in "13"])
    assert [shown(item) for item in kept[:2]] == [
        one + "[ West Virginia].(p)",
        one + " Let's think step-by-step:"
        "[ To find the answer, look at the compass rose. So the answer is West Virginia].(p)",
    ]
    # A problem without a solution has no explanation to learn.
    assert len(kept) == 3 and "Context: Look at the picture." in shown(kept[2])
    test = read(paths, options("scienceqa", split="test"), images)
    assert [item.key for item in samples(test)] == ["4"]
    with pytest.raises(DataError, match="no problem of --split dev; it has test, train"):
        read(paths, options("scienceqa", split="dev"), images)


def test_scienceqa_as_a_data_set(tmp_path: Path) -> None:
    row = {name: value for name, value in problem("train").items() if name != "split"}
    rows = [row | {"image": {"bytes": picture(1), "path": None}}, row | {"image": None}]
    features = datasets.Features(
        {name: datasets.Value("string") for name in row}
        | {
            "image": datasets.Image(),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    found = read(tmp_path / "set", options("scienceqa"))
    assert "West Virginia]" in shown(samples(found[:1])[0]) and found[0].parts[-1] == picture(1)
    assert reasons(found) == ["filter:no_image"]


def test_flickr30k_token(tmp_path: Path) -> None:
    lines = [
        "1000092795.jpg#0\tTwo young guys with shaggy hair .",
        "1000092795.jpg#1\tTwo young , White males .",
        "odd",
    ]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    images = pictures(tmp_path / "flickr30k-images", "1000092795.jpg")
    found = read(tmp_path / "results_20130124.token", options("flickr30k"), images)
    assert [item.key for item in found] == ["1000092795.jpg#0", "1000092795.jpg#1", "3"]
    assert "Two young guys with shaggy hair .](p)" in shown(samples(found[:1])[0])
    assert reasons(found) == ["invalid_line"]


def test_flickr30k_csv(tmp_path: Path) -> None:
    lines = [
        "image_name| comment_number| comment",
        "1000092795.jpg| 0| Two young guys | friends .",
        "2199200615.jpg| 4   A dog runs across the grass .",
        "2199200615.jpg|",
    ]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    images = pictures(tmp_path / "flickr30k_images", "1000092795.jpg", "2199200615.jpg")
    found = read(tmp_path / "results.csv", options("flickr30k"), images)
    assert [item.key for item in found] == ["1000092795.jpg#0", "2199200615.jpg#4", "4"]
    assert found[0].caption.endswith("Two young guys | friends .")
    assert found[1].caption.endswith("A dog runs across the grass .")
    assert reasons(found) == ["invalid_line"]


def test_flickr30k_annotations(tmp_path: Path) -> None:
    path = tmp_path / "flickr_annotations_30k.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        rows.writerow([json.dumps(["Two guys.", "Men, outside."]), "[0, 1]", "train", "1000092795.jpg", "0"])
        rows.writerow([json.dumps(["A child."]), "[2]", "val", "10002456.jpg", "1"])
        rows.writerow(["[", "[3]", "train", "1.jpg", "2"])
    images = pictures(tmp_path / "images", "1000092795.jpg")
    found = read(path, options("flickr30k"), images)
    assert [item.key for item in found[:2]] == ["1000092795.jpg#0", "1000092795.jpg#1"]
    assert reasons(found) == ["filter:other_split", "invalid_json"]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has the columns a, b"):
        read(tmp_path / "other.csv", options("flickr30k"), images)


def test_flickr30k_as_a_data_set(tmp_path: Path) -> None:
    row = {"image": {"bytes": picture(3), "path": "1.jpg"}, "caption": ["One.", "Two."], "sentids": ["0", "1"]}
    rows = [row | {"split": split, "img_id": "0", "filename": "1.jpg"} for split in ("train", "test")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "flickr.parquet")
    found = read(tmp_path / "flickr.parquet", options("flickr30k"))
    assert [item.caption[-4:] for item in samples(found[:2])] == ["One.", "Two."]
    assert reasons(found) == ["filter:other_split"]


def test_localized_narratives(tmp_path: Path) -> None:
    timed = [{"utterance": "In this", "start_time": 0.0, "end_time": 0.4}]
    rest = {"timed_caption": timed, "traces": [[{"x": 0.2, "y": 0.3, "t": 0.01}]], "voice_recording": "a.ogg"}
    rows = [
        {"dataset_id": "mscoco_val2017", "image_id": "137576", "annotator_id": 93, "caption": "In this image a bird."},
        {"dataset_id": "open_images_train", "image_id": "0a1b2c", "annotator_id": 7, "caption": "A bus."},
    ]
    path = write_lines(tmp_path / "coco_val_localized_narratives.jsonl", [row | rest for row in rows])
    images = pictures(tmp_path / "images", "000000137576.jpg", "0a1b2c.jpg")
    found = samples(read(path, options("localized-narratives"), images))
    assert [item.key for item in found] == ["137576/93", "0a1b2c/7"]
    assert [item.parts[-1] for item in found] == [picture(0), picture(1)]
    assert shown(found[0]).endswith("[ In this image a bird.](p)")


@pytest.mark.parametrize("first", ["original_image", "input_image"])
def test_instructpix2pix_rows(tmp_path: Path, first: str) -> None:
    row = {"original_prompt": "a lake", first: {"bytes": picture(1), "path": None}, "edit_prompt": "make it icy",
           "edited_prompt": "an icy lake", "edited_image": {"bytes": picture(2), "path": None}}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-00000-of-00262.parquet")
    (found,) = samples(read(tmp_path / "train-00000-of-00262.parquet", options("instructpix2pix")))
    assert found.parts == ("Edit first image following the instruction", picture(1), "make it icy", picture(2))
    assert found.answers == (False, False, False, True)


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no release that is known; expected COCO captions"):
        read(dump(tmp_path / "x.json", {"a": 1}), options("vqav2"))
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(DataError, match="no whole JSON file"):
        read(tmp_path / "y.json", options("vqav2"))
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 2, "caption": "a cat"}]}
    with pytest.raises(DataError, match="an entry is damaged: KeyError 'image_id'"):
        read(dump(tmp_path / "v.json", captions), options("coco-captions"))
    lines = write_lines(tmp_path / "z.jsonl", [{}])
    with pytest.raises(ConfigError, match="mixes release files"):
        read([tmp_path / "x.json", lines], options("vqav2"))
    with pytest.raises(ConfigError, match="is no folder"):
        read(tmp_path / "x.json", options("vqav2"), tmp_path / "nowhere")
    (tmp_path / "w.txt").write_text("text\n")
    with pytest.raises(ConfigError, match="fine-tuning reads jsonl, parquet"):
        read(tmp_path / "w.txt", options("vqav2"))
