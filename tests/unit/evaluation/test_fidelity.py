"""The fidelity figure: which captions are drawn, what is nearest, what counts as a hit."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.fidelity import Settings, draw_captions, judge, measure, nearest_pictures, shrink
from megacm3.evaluation.pictures import Gallery, plain_caption, png_bytes, read_gallery, sheet


def write_tar(path, pairs):
    with tarfile.open(path, "w") as tar:
        for key, (caption, data) in pairs.items():
            for name, content in ((f"{key}.png", data), (f"{key}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def pictures(count, side=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def gallery(count=40, side=48):
    return Gallery([f"k{i}" for i in range(count)], [f"thing {i}" for i in range(count)], pictures(count, side))


def test_captions_are_compared_without_skin_tones():
    assert plain_caption("Boy, medium-dark skin tone") == "boy"
    assert plain_caption("kiss: man, man, light skin tone and dark skin tone") == "kiss: man, man"
    assert plain_caption("person:  medium skin tone, bald") == "person, bald"
    assert plain_caption("light bulb") == "light bulb"


def test_drawn_captions_differ_and_depend_on_the_seed_only():
    captions = ["boy", "boy, light skin tone", "girl", "cat", "dog"]
    assert draw_captions(captions, 4, 0) == [0, 2, 3, 4]
    many = [f"c{i}" for i in range(100)]
    assert draw_captions(many, 32, 0) == draw_captions(many, 32, 0) != draw_captions(many, 32, 1)
    for count in (0, 6):
        with pytest.raises(ConfigError, match="different captions"):
            draw_captions(captions, count, 0)


def test_nearest_is_the_least_pixel_distance_at_16():
    queries, known = shrink(pictures(5, seed=3)), shrink(pictures(30, seed=4))
    expected = ((queries[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    assert nearest_pictures(queries, known).tolist() == expected.tolist()
    block = pictures(1)[0]
    assert np.abs(shrink(block[None])[0].reshape(16, 16, 3)[2, 5] - block[6:9, 15:18].mean((0, 1))).max() <= 0.5


def test_a_hit_is_the_nearest_pictures_caption():
    known = gallery()
    noise = np.random.default_rng(1).integers(-9, 10, (3, 48, 48, 3))
    seen = (known.pixels[[4, 7, 9]] + noise).clip(0, 255).astype(np.uint8)
    assert judge(seen, [4, 8, 9], known) == ([4, 7, 9], [True, False, True])
    known.captions[7] = "Thing 8, dark skin tone"  # another picture of the same caption
    assert judge(seen, [4, 8, 9], known) == ([4, 7, 9], [True, True, True])


def test_the_figure_of_a_model(generator):
    """An untrained model hits by chance at most; the untrained tokenizer's ceiling is measured on the same pictures."""
    known = gallery(40, side=32)
    found = measure(generator, known, Settings(count=8, guidance=2.0))
    assert found.generated.shape == found.reconstructed.shape == (8, 32, 32, 3)
    assert found.chosen == draw_captions(known.captions, 8, 0)
    assert found.hits == judge(found.generated, found.chosen, known)[1] and found.fidelity == np.mean(found.hits)
    assert found.reconstruction == np.mean(found.reconstruction_hits)
    again = measure(generator, known, Settings(count=8, guidance=2.0))
    assert (again.generated == found.generated).all()
    value = found.to_json(known)
    assert json.loads(json.dumps(value)) == value and len(value["rows"]) == 8
    assert value["rows"][0]["prompt"] == known.captions[found.chosen[0]]
    assert value["settings"]["seed"] == 0 and value["pictures"] == 40


def test_gallery_reads_tars_and_leaves_out_what_is_no_picture(tmp_path, caplog):
    good = {f"k{i}": (f"thing {i}", png_bytes(picture)) for i, picture in enumerate(pictures(3, side=64))}
    write_tar(tmp_path / "a.tar", good | {"bad": ("no picture", b"not a picture"), "empty": (" ", good["k0"][1])})
    found = read_gallery(str(tmp_path / "*.tar"), 48)
    assert found.keys == ["k0", "k1", "k2"] and found.pixels.shape == (3, 48, 48, 3)
    assert "2 rows" in caplog.text
    assert len(read_gallery(str(tmp_path / "*.tar"), 48, limit=2)) == 2
    write_tar(tmp_path / "b.tar", {"bad": ("no picture", b"not a picture")})
    with pytest.raises(DataError, match="no picture with a caption"):
        read_gallery(str(tmp_path / "b.tar"), 48)
    with pytest.raises(DataError, match="matches no file"):
        read_gallery(str(tmp_path / "c*.tar"), 48)


def test_sheet_and_png():
    page = sheet(
        list(pictures(5)), ["a word", "a label that is much too long for one line and even for two of them"] + ["x"] * 3
    )
    assert page.size == (4 * 156 + 12, 2 * (144 + 38 + 12) + 12)
    data = png_bytes(page, {"prompt": "a “quoted” one"})
    assert Image.open(io.BytesIO(data)).text["prompt"] == "a “quoted” one"
