"""Exported tokenizers give our ids, in transformers' own classes."""

import json
import random
from pathlib import Path

import pytest
import torch

from megacm3.convert.tokenizer import write_tokenizer
from megacm3.tokenizers.text import TextTokenizer, train_text_tokenizer
from megacm3.tokenizers.vocabulary import Vocabulary, image_name
from tests.helpers.tiny_models import TEXTS
from tests.unit.convert.conftest import export_with_tokenizers

ALPHABET = list("abcdefghij  ABC123.,!?-'\n\t") + [
    "ß",
    "é",
    "e\u0301",
    "你",
    "好",
    "😀",
    "\u2581",
    "\x1a",
    "\u00a0",
    "\U0001f9d1",
]


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "text"
    words = "the cat sat on that mat and then the hat ate abba banana anna 12 345 " * 3
    train_text_tokenizer([*TEXTS, words, "Größe é ß 你好", "aaa aba abab baba"], 420, folder)
    return folder


def vocabulary() -> Vocabulary:
    return Vocabulary.cm3leon(420, 32, 24, sentinels=8, image_tokens=16)


def test_random_texts_have_the_same_ids(text_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, text_tokenizer, vocabulary(), 96, 32)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), TextTokenizer.load(text_tokenizer)
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices(ALPHABET, k=generator.randrange(40)))
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text == ours.decode(ids)


def test_names_and_special_ids(text_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    table = vocabulary()
    write_tokenizer(tmp_path, text_tokenizer, table, 96, 32)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == table.size and theirs.model_max_length == 96
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (table.eos, table.eos, table.pad)
    assert theirs.convert_tokens_to_ids("<sentinel:3>") == table.sentinel(3)
    assert theirs.convert_ids_to_tokens([int(table.code_to_id[7])]) == [image_name(7)]
    assert theirs("a red apple")["input_ids"][0] == table.eos
    # Image names are spelled out, never image ids; so are specials where the caller asks for it.
    assert not table.is_image(theirs(image_name(7))["input_ids"]).any()
    plain = theirs("<break></s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not table.is_special(plain).any()
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "a red apple"}, {"role": "assistant", "content": "green"}], tokenize=False
    )
    assert chat == "</s>a red apple<end-of-turn>green"


def test_a_batch_is_padded_on_the_left(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = export_with_tokenizers(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    batch = tokenizer(["a red apple", "a cat"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id and batch["attention_mask"][1][0] == 0
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    alone = model.generate(**tokenizer("a cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert torch.equal(out[1, -4:], alone[0, -4:])


def test_chameleon_s_tokenizer_and_processor(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    from megacm3.tokenizers import chameleon_text
    from megacm3.tokenizers.text import save_chameleon

    text = chameleon_text.train_chameleon([*TEXTS, "how many apples? 12"], 9100)
    ours = save_chameleon(text, 9100, tmp_path / "text", settings={}, inputs={}, overwrite=False)
    table = ours.vocabulary(8192, 1024)
    write_tokenizer(tmp_path, tmp_path / "text", table, 4096, 512)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon"}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__ == "ChameleonProcessor"
    picture = Image.new("RGB", (600, 512), (255, 0, 128))
    inputs = processor(images=[picture], text="what is <image>?", return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert ids[0] == table.bos and (ids == dict(table.special)["<image>"]).sum() == 1024
    assert ids[-1] == table.end_of_turn
    assert torch.allclose(inputs["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]), atol=1e-6)
    plain = processor.tokenizer("a red apple 12", add_special_tokens=False)["input_ids"]
    assert plain == ours.encode("a red apple 12")
