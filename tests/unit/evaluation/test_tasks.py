"""FID, CLIPScore, recall, captions and questions on a tiny model, network and release."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from megacm3.errors import ConfigError, DataError
from megacm3.evaluation import tasks
from megacm3.evaluation.captions import score_captions
from megacm3.evaluation.distances import clip_score, compared, frechet_distance, recall
from megacm3.evaluation.pictures import Gallery
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from tests.helpers.tools import TOOLS, run_tool

HELD_OUT = TOOLS.parent / "examples" / "data" / "heldout-00000.tar"
DRAWING = {"seed": 0, "guidance": 1.0, "temperature": 1.0, "top_p": 0.9}


needs_torchmetrics = pytest.mark.skipif(
    not find_spec("torchmetrics"), reason="torchmetrics is missing (extra evaluate)"
)
needs_scorers = pytest.mark.skipif(not find_spec("pycocoevalcap"), reason="pycocoevalcap (extra evaluate) is missing")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoder")
    make_encoder(EncoderOptions((str(HELD_OUT),), str(root / "clip"), tiny_settings()))
    return root / "clip"


def tiny_settings():
    from tests.unit.retrieval.conftest import TINY

    return replace(TINY, steps=1)


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    return Encoder.load(encoder_folder)


@pytest.fixture(scope="module")
def gallery():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    pixels = np.concatenate([base, base[:2]])
    captions = [f"a {colour} {thing}" for thing in ("apple", "house") for colour in ("red", "green", "blue")]
    return Gallery([str(i) for i in range(8)], [*captions, "red apple", "green apple"], pixels)


@needs_torchmetrics
def test_fid_is_the_formula_and_zero_for_the_same_pictures(encoder, gallery):
    pixels = np.concatenate([gallery.pixels, 255 - gallery.pixels])
    other = np.random.default_rng(1).integers(0, 256, pixels.shape, np.uint8)
    a, b = (encoder.encode_images(p).astype(np.float64) for p in (pixels, other))
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum()
    assert frechet_distance(pixels, other, encoder)["fid"] == pytest.approx(wanted, rel=1e-3)
    assert abs(frechet_distance(pixels, pixels, encoder)["fid"]) < 1e-3
    with pytest.raises(DataError, match="two of each"):
        frechet_distance(pixels[:1], pixels, encoder)


@needs_torchmetrics
def test_results_of_other_protocols_are_refused(encoder, gallery):
    a = clip_score(gallery.pixels, gallery.captions, encoder)
    assert compared(a, a)["clip_score"] == (a["clip_score"], a["clip_score"])
    b = frechet_distance(gallery.pixels, gallery.pixels, encoder)
    with pytest.raises(DataError, match=r"different protocols.*task \(clip and fid\)"):
        compared(a, b)
    fewer = frechet_distance(gallery.pixels[:5], gallery.pixels, encoder)
    with pytest.raises(DataError, match=r"real \(8 and 5\)"):
        compared(b, fewer)


def test_clip_score_and_recall_by_hand(encoder, gallery):
    images, texts = encoder.encode_images(gallery.pixels), encoder.encode_texts(gallery.captions)
    wanted = 100 * np.maximum((images * texts).sum(1), 0).mean()
    assert clip_score(gallery.pixels, gallery.captions, encoder)["clip_score"] == pytest.approx(wanted, rel=1e-5)
    found = recall(gallery.pixels, gallery.captions, encoder, (1, 8))
    assert found["text_to_image"]["recall@8"] == found["image_to_text"]["recall@8"] == 1.0
    assert compared(found, found)["text_to_image recall@8"] == (1.0, 1.0) and len(compared(found, found)) == 4
    best = (texts @ images.T).argmax(1)
    assert found["text_to_image"]["recall@1"] == pytest.approx(np.mean(best == np.arange(8)))


@needs_scorers
def test_caption_scores():
    same = score_captions(["A red apple.", "two dogs run fast"], [["a red apple"], ["Two dogs run, fast!"]])
    assert same["bleu_1"] == pytest.approx(1.0) and same["rouge_l"] == pytest.approx(1.0)
    assert same["cider"] > 5 > score_captions(["one cat", "a car"], [["a red apple"], ["two dogs"]])["cider"]
    with pytest.raises(DataError, match="one each"):
        score_captions(["a"], [[]])


@needs_torchmetrics
@needs_scorers
def test_tasks_on_a_model(generator, gallery, encoder, tmp_path):
    fid = tasks.fid_task(generator, gallery, encoder, **DRAWING)
    assert np.isfinite(fid.figures["fid"]) and fid.figures["protocol"]["made"] == 8 and len(fid.shown) == 8
    score = tasks.clip_task(generator, gallery, encoder, **DRAWING)
    assert 0 <= score.figures["clip_score"] <= 100 and score.figures["real_pictures"] > 0
    captions = tasks.caption_task(generator, gallery)
    assert captions.figures["pictures"] == 6  # two pictures stand twice: one answer, two references
    score.write_report(str(tmp_path / "page.html"), "Evaluation: clip")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 8 and "clip_score" in page


def test_questions_of_a_release_and_of_rows(generator, gallery, tmp_path):
    for number, picture in enumerate(gallery.pixels[:2]):
        Image.fromarray(picture).save(tmp_path / f"COCO_val2014_{number:012d}.jpg")
    asked = [{"question_id": 10 + i, "image_id": i, "question": "What is it?"} for i in range(2)]
    people = [asked[i] | {"answers": [{"answer": "apple"}] * 10} for i in range(2)]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": people}))
    inputs = [str(tmp_path / name) for name in ("q.json", "a.json")]
    found = tasks.vqa_task(generator, inputs, str(tmp_path), None)
    rows = [
        {"image": f"COCO_val2014_{i:012d}.jpg", "question": "What is it?", "answers": [text]}
        for i, text in enumerate(found.figures["answers"])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = tasks.vqa_task(generator, [str(tmp_path / "rows.jsonl")], "", None)
    assert again.figures["answers"] == found.figures["answers"] and again.figures["vqa_accuracy"] == 1.0
    assert tasks.vqa_task(generator, [str(tmp_path / "rows.jsonl")], "", 1).figures["questions"] == 1
    with pytest.raises(ConfigError, match="--images"):
        tasks.vqa_task(generator, inputs, "", None)
    (tmp_path / "rows.jsonl").write_text('{"image": "x.jpg"}')
    with pytest.raises(DataError, match=r"line 1.*expected image, question and answers"):
        tasks.vqa_task(generator, [str(tmp_path / "rows.jsonl")], "", None)


def test_the_tool(hf_folder, encoder_folder, tmp_path, capsys):
    given = ["--model", hf_folder, "--input", HELD_OUT, "--limit", "4"]
    first = tmp_path / "clip.json"
    clip = ["--task", "clip", "--encoder", encoder_folder]
    assert run_tool("evaluate", *given, *clip, "--output", first) == (0, "")
    more = ["--against", first, "--report", tmp_path / "page.html"]
    assert run_tool("evaluate", *given, *clip, *more) == (0, "")
    assert "clip_score: " in capsys.readouterr().out and (tmp_path / "page.html").is_file()
    assert run_tool("evaluate", *given, "--task", "recall", "--encoder", encoder_folder) == (0, "")
    code, error = run_tool("evaluate", *given, "--task", "fid")
    assert code == 2 and "needs --encoder" in error
    code, error = run_tool("evaluate", *given, "--task", "recall", "--encoder", encoder_folder, "--against", first)
    assert code == 3 and "different protocols" in error
