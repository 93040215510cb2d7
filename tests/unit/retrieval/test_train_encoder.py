"""Training an encoder: it learns, twice alike, and says no to what cannot work."""

from dataclasses import replace

import pytest
import torch

from megacm3.errors import ConfigError, DataError, Diverged
from megacm3.retrieval.contrastive import contrastive_loss
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.new_encoder import EncoderTraining, train_tokenizer
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder, read_pairs, recall, train_encoder
from tests.unit.data.makers import pairs, picture, write_tar
from tests.unit.retrieval.conftest import same_bytes
from tests.unit.retrieval.makers import DIM, TINY

SHORT = replace(TINY, steps=2)


def test_documents_are_found_by_their_picture_and_by_their_caption(made):
    found = recall(Encoder.load(made.encoder), read_pairs([made.inputs], TINY.image_size))
    assert found["recall_image"] > 0.7 and found["recall_text"] > 0.7, found


def test_the_same_pairs_and_seed_give_the_same_bytes_and_nothing_is_done_twice(made, tmp_path):
    reports = []
    for name in ("one", "two"):
        reports.append(make_encoder(EncoderOptions((made.inputs,), str(tmp_path / name), SHORT)))
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    again = make_encoder(EncoderOptions((made.inputs,), str(tmp_path / "one"), SHORT))
    assert again.seconds == 0 and again.figures == reports[0].figures
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_or_pairs_need_another_folder(made, tmp_path):
    options = EncoderOptions((made.inputs,), str(tmp_path / "e"), SHORT)
    make_encoder(options)
    with pytest.raises(DataError, match=r"seed = 0 then, 5 now.*--overwrite"):
        make_encoder(replace(options, training=replace(SHORT, seed=5)))
    with pytest.raises(DataError, match="another pairs"):
        make_encoder(replace(options, limit=7))
    assert make_encoder(replace(options, limit=7, overwrite=True)).pairs == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="no folder of kind 'encoder'"):
        make_encoder(replace(options, output=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_an_existing_encoder_is_trained_further(made, tmp_path):
    options = EncoderOptions((made.inputs,), str(tmp_path / "e"), replace(SHORT, lr=1e-4), base=str(made.encoder))
    report = make_encoder(options)
    untrained = train_encoder(read_pairs([made.inputs], TINY.image_size), SHORT)[1]
    assert report.figures["loss_first"] < untrained["loss_first"] - 1 and report.dim == DIM
    one, other = Encoder.load(made.encoder), Encoder.load(tmp_path / "e")
    cosines = (one.encode_texts(["a red bar", "a blue frame"]) * other.encode_texts(["a red bar", "a blue frame"])).sum(
        1
    )
    assert (cosines > 0.9).all() and (cosines < 0.999999).any()


def test_equal_captions_are_no_negatives_of_each_other():
    group = torch.tensor([4, 4, 7])
    image, text = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)[[0, 0, 2]]
    logits = 3 * (image / image.norm(dim=1, keepdim=True)) @ text.T
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    rows = -(target * logits.log_softmax(1)).sum(1).mean() - (target * logits.T.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(3.0).log(), group), rows / 2)
    # Without a caption twice it is CLIP's own loss.
    plain = torch.nn.functional.cross_entropy
    own = (plain(logits, torch.arange(3)) + plain(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(3.0).log(), torch.arange(3)), own)


def test_a_tokenizer_knows_every_byte():
    tokenizer = train_tokenizer(["two words", "three more words"], 600, 16)
    ids = tokenizer("Ωmega ☃ words z").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="too small"):
        train_tokenizer(["a"], 500, 16)


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 20}, {"width": 48}, {"steps": 0}, {"batch": 1}, {"token_dropout": 1.0}, {"text_tokens": 2}],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        replace(EncoderTraining(), **({"patch_size": 8} | changes)).check()


def test_a_loss_that_is_no_number_ends_the_training(made):
    few = read_pairs([made.inputs], TINY.image_size, limit=8)
    with pytest.raises(Diverged, match="lower --lr"):
        train_encoder(few, replace(TINY, lr=1e30, warmup=1, steps=8))


def test_rows_without_a_pair_are_left_out_and_too_few_refused(tmp_path):
    broken = [("x.png", picture(1)[:200]), ("x.txt", b"broken"), ("y.png", picture(2)), ("z.txt", b"words")]
    path = write_tar(tmp_path / "a.tar", pairs(0, 3) + broken)
    assert read_pairs([str(path)], 16).captions == [f"caption number {n}" for n in range(3)]
    assert len(read_pairs([str(path)], 16, limit=2).captions) == 2
    with pytest.raises(DataError, match="holds 1 captioned pictures"):
        read_pairs([str(path)], 16, limit=1)
