"""The stream from a config and real stores, and what is refused before training begins."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megacm3.config import Config
from megacm3.data.build import build_stream
from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.parts import PartWriter, assemble, write_store
from megacm3.data.store import Store, StoreShape
from megacm3.errors import ConfigError, DataError
from megacm3.resolve import load_config
from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers.stores import make_neighbours

SHAPE = StoreShape(text_size=300, codebook_size=64, image_tokens=16, image_size=32)
Segments = Sequence[tuple[int, np.ndarray]]


def make_store(folder: Path, documents: Sequence[Segments], shape: StoreShape = SHAPE, **inputs: str) -> Store:
    rows = ((list(segments), {"key": str(row)}) for row, segments in enumerate(documents))
    made_by = {"text_tokenizer": "t" * 64, "image_tokenizer": "i" * 64} | inputs
    return write_store(folder, rows, shape, made_by, documents_per_part=max(1, len(documents) // 2))


def pairs(count: int, shape: StoreShape = SHAPE, longest: int = 8) -> list[Segments]:
    rng = np.random.default_rng(0)
    made: list[Segments] = []
    for i in range(count):
        caption = rng.integers(0, shape.text_size, longest if i == count // 3 else rng.integers(1, longest))
        made.append([(TEXT, caption), (IMAGE, rng.integers(0, shape.codebook_size, shape.image_tokens))])
    return made


def config(store: Path | str, *overrides: str) -> Config:
    first = [
        "model.preset=tiny_cm3leon",
        f"data.mixture=[{{store: {store}}}]",
        "data.packing=whole",
        "model.vocab_size=512",
        "train.global_batch=4",
    ]
    return load_config(None, [*first, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    make_store(root / "store", pairs(60))
    return root


def test_stream_of_a_real_store(folder: Path) -> None:
    stream = build_stream(config(folder / "store"))
    assert stream.vocabulary.size == 512 and stream.vocabulary.sentinels == 64
    tokens = stream.sequence(3).tokens
    assert len(tokens) == 65 and tokens[0] == stream.vocabulary.eos and tokens.max() < 512
    assert stream.vocabulary.is_image(tokens).sum() % 16 == 0
    again = build_stream(config(folder / "store"))
    assert again.fingerprint == stream.fingerprint
    assert np.array_equal(again.sequence(3).tokens, tokens)
    assert build_stream(config(folder / "store", "data.seed=1")).fingerprint != stream.fingerprint
    assert build_stream(config(folder / "store", "objective.kind=causal")).settings.spans == 0


def test_missing_and_unfinished_stores(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture is empty; expected at least one"):
        build_stream(config(folder / "store", "data.mixture=[]"))
    with pytest.raises(ConfigError, match=r"data\.mixture\[0\]\.store is empty"):
        build_stream(config("''"))
    with pytest.raises(DataError, match=r"data\.mixture\[0\]\.store = .*nowhere does not exist"):
        build_stream(config(folder / "nowhere"))
    (folder / "unfinished").mkdir()
    with pytest.raises(DataError, match="unfinished"):
        build_stream(config(folder / "unfinished"))


def test_vocabulary_of_the_model_must_hold_the_stores(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 384 leaves 20 special ids .* at least 433"):
        build_stream(config(folder / "store", "model.vocab_size=384"))
    build_stream(config(folder / "store", "model.vocab_size=433"))
    with pytest.raises(ConfigError, match=r"cm3leon vocabulary; model\.family = chameleon"):
        build_stream(config(folder / "store", "model.family=chameleon", "objective.kind=causal"))


def test_stores_of_different_tokenizers_are_refused(folder: Path) -> None:
    other = StoreShape(text_size=300, codebook_size=32, image_tokens=16, image_size=32)
    make_store(folder / "codebook", pairs(10, other), other)
    make_store(folder / "tokenizer", pairs(10), text_tokenizer="x" * 64)
    for name, message in (
        ("codebook", r"data\.mixture\[1\].* has codebook_size 32; expected 64"),
        ("tokenizer", r"data\.mixture\[1\].* text_tokenizer xxxxxxxxxxxx; expected tttttttttttt"),
    ):
        mixture = f"data.mixture=[{{store: {folder / 'store'}}}, {{store: {folder / name}}}]"
        with pytest.raises(ConfigError, match=message):
            build_stream(config("", mixture))


def test_a_tokenizer_named_in_the_config_must_be_the_stores(folder: Path) -> None:
    from megacm3.files import write_manifest

    for name in ("mine", "theirs"):
        (folder / name).mkdir()
        (folder / name / "text.model").write_text(name)
    mine = write_manifest(folder / "mine", "text_tokenizer", {"vocab_size": 300}, {})
    write_manifest(folder / "theirs", "text_tokenizer", {"vocab_size": 300}, {})
    make_store(folder / "checked", pairs(10), text_tokenizer=mine.fingerprint)
    build_stream(config(folder / "checked", f"data.text_tokenizer={folder / 'mine'}"))
    with pytest.raises(ConfigError, match=r"expected .* that of data\.text_tokenizer = .*theirs"):
        build_stream(config(folder / "checked", f"data.text_tokenizer={folder / 'theirs'}"))


def test_the_longest_document_must_fit_whole_packing(folder: Path) -> None:
    make_store(folder / "long", pairs(30, longest=50))
    assert Store.open(folder / "long").longest() == 10
    message = r"number 10\) makes 69 tokens; model\.sequence_length = 64 .* at least 68, or data\.packing = blocks"
    with pytest.raises(ConfigError, match=message):
        build_stream(config(folder / "long"))
    build_stream(config(folder / "long", "data.packing=blocks"))
    build_stream(config(folder / "long", "model.sequence_length=68")).sequence(0)


def test_a_chameleon_store(folder: Path) -> None:
    shape = StoreShape(text_size=600, codebook_size=8, image_tokens=16, image_size=32)
    table = Vocabulary.chameleon(size=600, codebook_size=8, image_tokens=16)
    parts = folder / "chameleon.part0"
    parts.mkdir()
    writer = PartWriter(parts, shape)
    for segments in pairs(20, shape):
        writer.add(segments, {})
    writer.finish()
    assemble(folder / "chameleon", [parts], shape, {}, {"vocabulary": table.to_json()})
    causal = ("model.preset=tiny_chameleon_7b", "model.vocab_size=600", "data.rotation=0.5")
    stream = build_stream(config(folder / "chameleon", *causal))
    assert stream.settings.turns and stream.settings.spans == 0
    assert stream.sequence(0).tokens[0] == table.bos
    with pytest.raises(ConfigError, match=r"objective\.kind = cm3 needs sentinels"):
        build_stream(config(folder / "chameleon", *causal, "objective.kind=cm3"))
    with pytest.raises(ConfigError, match=r"vocabulary of 600; found model\.vocab_size = 512"):
        build_stream(config(folder / "chameleon", *causal, "model.vocab_size=512"))
    with pytest.raises(ConfigError, match=r"chameleon vocabulary; model\.family = cm3leon"):
        build_stream(config(folder / "chameleon"))


def test_answers_need_answers(folder: Path) -> None:
    with pytest.raises(ConfigError, match="every label would be masked"):
        build_stream(config(folder / "store", "objective.loss_on=answers"))
    with pytest.raises(ConfigError, match=r"objective\.spans = -1"):
        build_stream(config(folder / "store", "objective.spans=-1"))


def test_loss_falls_on_the_answers_of_a_store_alone(folder: Path) -> None:
    # Questions are ids below 100, answers from 200 on; half of the answers are pictures.
    rng = np.random.default_rng(0)
    made: list[Segments] = []
    for i in range(40):
        codes = rng.integers(0, 64, 16)
        texts = rng.integers(0, 100, 3), rng.integers(200, 300, 2)
        asked = [(IMAGE, codes), (TEXT, texts[0]), (TEXT | ANSWER, texts[1])]
        made.append(asked if i % 2 else [(TEXT, texts[0]), (IMAGE | ANSWER, codes)])
    make_store(folder / "answers", made)
    overrides = ("objective.loss_on=answers", "objective.kind=causal")
    stream = build_stream(config(folder / "answers", *overrides))
    vocabulary = stream.vocabulary
    for number in range(5):
        packed = stream.sequence(number)
        targets, borne = packed.tokens[1:], packed.tokens[1:][packed.loss_mask]
        text = vocabulary.kind[targets] == 0
        assert (packed.loss_mask[text] == (targets[text] >= 200)).all()
        samples = [drawn.documents[-1] for drawn in stream.drawn(number)]
        assert vocabulary.is_image(borne).sum() == 16 * sum(i % 2 == 0 for i in samples)
        # Every answer is learned with the token that ends it.
        assert (borne == vocabulary.eos).sum() == len(samples)
    everything = build_stream(config(folder / "answers", "objective.kind=causal")).sequence(0)
    assert everything.loss_mask.sum() == (everything.tokens[1:] != vocabulary.pad).sum()


def test_weights_stages_and_passes(folder: Path) -> None:
    make_store(folder / "small", pairs(10))
    both = f"data.mixture=[{{store: {folder / 'store'}}}, {{store: {folder / 'small'}, epochs: 2}}]"
    limited = build_stream(config("", both, "train.steps=100"))
    passes = limited.passes(400)
    assert 1.7 < passes[str(folder / "small")] < 2.05 and passes[str(folder / "store")] > 5

    stages = "data.stages=[{share: 0.8, weights: [1, 0]}, {share: 0.2, weights: [0.5, 0.5]}]"
    free = both.replace(", epochs: 2", "")
    staged = build_stream(config("", free, stages, "train.steps=1000"))
    assert abs(staged.stages[1].first_sequence / 4000 - 0.8) < 0.05
    assert {drawn.source for n in range(500) for drawn in staged.drawn(n)} == {0}
    assert {drawn.source for n in range(3900, 4000) for drawn in staged.drawn(n)} == {0, 1}
    with pytest.raises(ConfigError, match=r"training passes .* times over .*small, whose data\.mixture epochs allow 2"):
        build_stream(config("", both, stages, "train.steps=1000"))
    for wrong, message in (
        ("data.stages=[{share: 0.8, weights: [1, 0]}]", "add up to 1"),
        ("data.stages=[{share: 1.0, weights: [1]}]", "expected 2 each"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stream(config("", free, wrong))


def test_caps_on_up_and_downsampling(folder: Path) -> None:
    make_store(folder / "tiny", pairs(6))
    mixture = f"data.mixture=[{{store: {folder / 'store'}}}, {{store: {folder / 'tiny'}}}]"
    stream = build_stream(config("", mixture, "data.upsample=3"))
    stores, _, _ = stream.mixture.lookup(0, 20_000)
    # Asked for a half, it gets three times its part of the documents.
    assert abs((stores == 1).mean() - 3 * 6 / 66) < 0.01


def test_retrieved_documents_stand_before_each_sample(folder: Path, tmp_path: Path) -> None:
    # Captions of their own: documents of one caption are never retrieved for one another.
    rows = (([*p], {"key": str(i), "caption": f"caption {i}", "images": 1}) for i, p in enumerate(pairs(60)))
    write_store(tmp_path / "store", rows, SHAPE, {})
    neighbours = make_neighbours(tmp_path, tmp_path / "store")
    mixture = f"data.mixture=[{{store: {tmp_path / 'store'}, neighbours: {neighbours}}}]"
    long = "model.sequence_length=160"
    stream = build_stream(config("", mixture, long))
    for n in range(20):
        for drawn in stream.drawn(n):
            assert len(drawn.documents) == 4 == len(set(drawn.documents))
    tokens = stream.sequence(0).tokens
    assert stream.vocabulary.is_image(tokens).sum() >= 4 * 16
    shares = build_stream(config("", mixture, long, "retrieval.documents=[0.5, 0, 0.5, 0]"))
    assert shares.fingerprint != stream.fingerprint
    counts = {len(drawn.documents) - 1 for n in range(30) for drawn in shares.drawn(n)}
    assert counts == {0, 2}
    for off in ("retrieval.mode=none", "retrieval.documents=[1, 0, 0, 0]"):
        plain = build_stream(config("", mixture, long, off))
        assert all(len(drawn.documents) == 1 for n in range(9) for drawn in plain.drawn(n))
    assert len(build_stream(config("", mixture, long, "retrieval.mode=random")).drawn(0)[0].documents) == 4
    other = f"data.mixture=[{{store: {folder / 'store'}, neighbours: {neighbours}}}]"
    with pytest.raises(DataError, match="neighbours of store"):
        build_stream(config("", other, long))
