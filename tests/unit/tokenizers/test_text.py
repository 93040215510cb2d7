"""The text tokenizer: exact round trip of all Unicode, and no way from text to a special id."""

import random

import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.text import TextTokenizer, finished, train_text_tokenizer

TEXTS = [f"a picture of {n} {animal}s, <b>bold</b>  twice" for n in range(12) for animal in ("cat", "dog", "bird")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_text_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("text") / "tokenizer", inputs={"texts": "x"})


def test_every_code_point_comes_back(tokenizer):
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4_000):
        text = "".join(map(chr, points[start : start + 4_000]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces ", "\t\n\r\n", "\0\0", "\u2581", "\u2581\u2581 \u2581", "\x1a", "\x1a1\u2581\x1a0",
     "e\u0301 \u00e9", "\ufeffmark", "\U0001f468\u200d\U0001f469", "line\u2028separator", " \u00a0 ", "\u2585 \u2047"],
)  # fmt: skip
def test_hard_strings_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("a" + text + "b")) == "a" + text + "b"


def test_random_strings_come_back(tokenizer):
    rng = random.Random(0)
    alphabet = "ab \u2581\x1a01\n\t\0<>\u00e4\U0001f600"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(500)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize("text", ["<break>", "</s>", "<pad>", "<unk>", "<sentinel:0>", "<0x41>", "IMGIMGBZ", "<eoss>"])
def test_names_of_specials_are_ordinary_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 < i < tokenizer.size for i in ids) and len(ids) > 1
    assert tokenizer.decode(ids) == text


def test_unknown_is_never_produced_and_no_other_special_exists(tokenizer):
    processor = tokenizer._backend._processor
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, -1, -1, -1)
    assert not any(processor.is_control(i) for i in range(tokenizer.pieces))


def test_digits_are_single(tokenizer):
    assert len(tokenizer.encode("112345")) == 6


def test_size_is_as_asked_whatever_the_corpus(tmp_path):
    tokenizer = train_text_tokenizer(["tiny"], 5000, tmp_path / "t")
    assert tokenizer.size == 5000 and tokenizer.pieces < 5000
    assert tokenizer.decode([4999]) == ""
    with pytest.raises(DataError, match="not a text id"):
        tokenizer.decode([5000])


def test_training_is_reproducible(tokenizer, tmp_path):
    again = train_text_tokenizer(iter(TEXTS), 400, tmp_path / "t", inputs={"texts": "x"})
    assert again.fingerprint == tokenizer.fingerprint
    assert TextTokenizer.load(tmp_path / "t").encode("a cat") == tokenizer.encode("a cat")


def test_long_text_is_not_dropped(tmp_path):
    tokenizer = train_text_tokenizer(["zebra " * 5000], 300, tmp_path / "t")
    assert len(tokenizer.encode("zebra")) < 5


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_bad_sizes_and_no_text(tmp_path):
    with pytest.raises(ConfigError, match="too small"):
        train_text_tokenizer(TEXTS, 200, tmp_path / "a")
    with pytest.raises(ConfigError, match="too small"):
        train_text_tokenizer(["".join(map(chr, range(0x4E00, 0x5200)))] * 2, 300, tmp_path / "b")
    with pytest.raises(DataError, match="no text"):
        train_text_tokenizer([], 400, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_input_is_passed_on(tmp_path):
    def texts():
        yield "one"
        raise DataError("shard 3 is damaged")

    with pytest.raises(DataError, match="shard 3"):
        train_text_tokenizer(texts(), 400, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_finished_same_and_other(tokenizer, tmp_path):
    train_text_tokenizer(TEXTS, 400, tmp_path / "t", inputs={"texts": "x"})
    folder, settings = tmp_path / "t", {"format": "sentencepiece", "vocab_size": 400, "max_lines": 10_000_000}
    assert finished(folder, settings, {"texts": "x"})
    assert not finished(tmp_path / "none", settings, {"texts": "x"})
    assert not finished(folder, settings | {"vocab_size": 401}, {"texts": "x"}, overwrite=True)
    with pytest.raises(DataError, match="another texts"):
        finished(folder, settings, {"texts": "y"})
    with pytest.raises(DataError, match=r"another vocab_size \(400 then, 401 now\)"):
        finished(folder, settings | {"vocab_size": 401}, {"texts": "x"})


def test_damage_is_found(tmp_path):
    train_text_tokenizer(TEXTS, 400, tmp_path / "t")
    model = tmp_path / "t" / "text.model"
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        TextTokenizer.load(tmp_path / "t")
    with pytest.raises(DataError, match="does not exist"):
        TextTokenizer.load(tmp_path / "u")
