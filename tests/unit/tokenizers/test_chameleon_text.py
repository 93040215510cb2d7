"""Chameleon's text tokenizer: the released shape, and no way from text to a special or image id."""

import json

import numpy as np
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.chameleon_text import ChameleonBackend, read_released, special_names, train_chameleon
from megacm3.tokenizers.text import TextTokenizer, save_chameleon

TEXTS = [f"a picture of {n} cats and {n} dogs" for n in range(30)]
NAMES = ["<racm3:break>", "<eoss>", "IMGIMGBZ", "IMGIMGFHZ", "<s>", "</s>", "<pad>", "<reserved08706>", "<image>"]


@pytest.fixture(scope="module")
def trained():
    return train_chameleon(TEXTS, 9200)


def released(trained, ignore_merges=False):
    """The trained table as the released file has it: names also as added tokens, and a template that adds `<s>`."""
    tree = json.loads(trained)
    names = tree["model"]["vocab"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<reserved08706>", "IMGIMGBZ"]
    tree["added_tokens"] = [{"id": names[name], "content": name, "special": name != "<eoss>"} | flags for name in added]
    tree["model"]["ignore_merges"] = ignore_merges
    return json.dumps(tree)


def test_ids_are_the_released_table_s(trained):
    names = ChameleonBackend(trained).names
    assert names["<s>"] == 0 and names["<pad>"] == 1 and names["</s>"] == 2 and names["<unk>"] == 3
    assert names["IMGIMGAZ"] == 4 and names["IMGIMGBZ"] == 5 and names["IMGIMGIBJBZ"] == 8195
    assert names["<eoss>"] == 8196 and names["<racm3:break>"] == 8197
    assert names["<reserved08706>"] == 8710 and names["<reserved08707>"] == 8711
    assert len(special_names()) == 8712 and min(names[t] for t in ("a", "\u0120")) >= 8712


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_text_never_becomes_a_special_or_image_id(trained, ignore_merges):
    backend = ChameleonBackend(released(trained, ignore_merges))
    vocabulary = backend.vocabulary(65536, 8192, 1024)
    for text in [*NAMES, " ".join(NAMES), "".join(NAMES), "x<eoss>y"]:
        (ids,) = backend.encode_batch([text])
        assert vocabulary.is_text(np.array(ids)).all(), text
        assert backend.decode(ids) == text


def test_every_code_point_comes_back(trained):
    backend = ChameleonBackend(trained)
    points = [point for point in range(0, 0x110000, 7) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4_000):
        text = "".join(map(chr, points[start : start + 4_000]))
        assert backend.decode(backend.encode_batch([text])[0]) == text
    for text in ("", " ", "  a  b ", "\n\t\0", "<unk>", "e\u0301"):
        assert backend.decode(backend.encode_batch([text])[0]) == text


def test_digits_are_single(trained):
    assert len(ChameleonBackend(trained).encode_batch(["12345"])[0]) == 5


def test_folder(trained, tmp_path):
    given = {"settings": {}, "inputs": {}, "overwrite": False}
    tokenizer = save_chameleon(trained, 65536, tmp_path / "t", **given)
    assert tokenizer.size == 65536 and tokenizer.decode(tokenizer.encode("two cats")) == "two cats"
    vocabulary = TextTokenizer.load(tmp_path / "t").vocabulary(8192, 1024)
    assert vocabulary.family == "chameleon" and vocabulary.boi == 8197 and vocabulary.image_ids(np.array([1]))[0] == 5
    with pytest.raises(ConfigError, match="less than the"):
        save_chameleon(trained, 8720, tmp_path / "u", **given)


def test_released_file_is_checked(trained, tmp_path):
    path = tmp_path / "text_tokenizer.json"
    path.write_text(released(trained))
    assert read_released(path) == released(trained)
    tree = json.loads(trained)
    del tree["model"]["vocab"]["IMGIMGBZ"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="no entry IMGIMGBZ"):
        read_released(path)
    for text in ("{}", "no json", '{"model": {"vocab": {}}}', "[]"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"text_tokenizer\.json"):
            read_released(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_released(tmp_path / "none.json")


def test_bad_training():
    with pytest.raises(ConfigError, match="too small"):
        train_chameleon(TEXTS, 8800)
    with pytest.raises(DataError, match="no text"):
        train_chameleon([], 9200)
