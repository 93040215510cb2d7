"""What checkpoint.init opens, and what it refuses before any weight is used."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.reader import Checkpoint
from megacm3.convert.from_hf import from_hf, opened
from megacm3.data.build import build_stream
from megacm3.errors import CheckpointError
from megacm3.resolve import load_config
from megacm3.tokenizers.vocabulary import Vocabulary
from megacm3.training.start import Start, check_fits, check_init, open_start
from tests.helpers import tiny_models
from tests.helpers.checkpoints import tiny, write_random
from tests.helpers.stores import make_store

TEXT, CODEBOOK = 256, 128


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen3", "chameleon", "swin"])
def test_a_folder_gives_what_its_import_gives(kind: str, tmp_path: Path) -> None:
    swin = kind == "swin"
    models = {"opt": lambda: tiny_models.opt_model(300), "chameleon": lambda: tiny_models.chameleon_model(False)}
    models |= {"swin": lambda: tiny_models.chameleon_model(swin)}
    build = models.get(kind, lambda: tiny_models.llama_model(kind, 300))
    build().save_pretrained(tmp_path / "hf")
    with opened(tmp_path / "hf", tmp_path / "native") as source:
        native = Checkpoint(from_hf(source, tmp_path / "native"))
    start, imported = open_start(tmp_path / "hf"), open_start(tmp_path / "native")
    assert start.model == dataclasses.replace(imported.model, preset=start.model.preset)
    assert (start.vocabulary is None) == (kind not in ("chameleon", "swin")) == (imported.vocabulary is None)
    assert start.weights.shapes == native.shapes
    for name, shape in native.shapes.items():
        values = [torch.empty(shape) for _ in range(2)]
        start.weights.read("param", name, whole(shape), values[0])
        native.read("param", name, whole(shape), values[1])
        assert torch.equal(*values), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """(config, stream) of a run whose store names its tokenizers."""
    folder = tmp_path_factory.mktemp("start")
    inputs = {"text_tokenizer": "a" * 64, "image_tokenizer": "b" * 64}
    store = make_store(
        folder / "store", documents=16, text_size=TEXT, codebook_size=CODEBOOK, image_tokens=16, inputs=inputs
    )
    keys = ["model.preset=tiny_cm3leon", "model.vocab_size=448", "model.sequence_length=64", "objective.sentinels=16"]
    keys += [f"data.mixture=[{{store: {store}}}]", "data.packing=whole", "train.steps=1", "train.out=unused"]
    config = load_config(None, keys)
    return config, build_stream(config)


def start_of(config, **changed) -> Start:
    vocabulary = Vocabulary.cm3leon(TEXT, CODEBOOK, 64, 16, 16).to_json()
    tokenizers = {"text_tokenizer": "a" * 64, "image_tokenizer": "b" * 64}
    start = Start(None, dataclasses.replace(config.model), vocabulary, tokenizers, "")  # type: ignore[arg-type]
    return dataclasses.replace(start, **changed)


def test_what_fits_passes_and_what_is_unknown_is_named(run) -> None:
    config, stream = run
    assert check_fits(start_of(config), config, stream, "it") == []
    free = dataclasses.replace(config.model, dropout=0.3, vocab_rows=512, init_std=1.0, preset="", rope_theta=5.0)
    assert check_fits(start_of(config, model=free), config, stream, "it") == []
    unknown = start_of(config, vocabulary=None, tokenizers={})
    assert check_fits(unknown, config, stream, "it") == ["vocabulary", "text_tokenizer", "image_tokenizer"]


@pytest.mark.parametrize(
    "field, value",
    [("heads", 2), ("layers", 3), ("norm_eps", 1e-6), ("activation", "swiglu"), ("tied", False), ("family", "modern")]
    + [("sequence_length", 128), ("vocab_size", 512), ("norm_order", "swin")],
)
def test_another_model_is_refused_with_the_key(run, field: str, value: object) -> None:
    config, stream = run
    start = start_of(config, model=dataclasses.replace(config.model, **{field: value}))
    with pytest.raises(CheckpointError) as caught:
        check_fits(start, config, stream, "it")
    assert f"set model.{field}={value}" in str(caught.value)


def test_another_vocabulary_is_refused(run) -> None:
    config, stream = run
    for other in (
        Vocabulary.cm3leon(TEXT, CODEBOOK, 64, 8, 16),
        Vocabulary.cm3leon(TEXT - 8, CODEBOOK, 72, 16, 16),
        Vocabulary.cm3leon(TEXT, CODEBOOK, 64, 16, 36),
    ):
        with pytest.raises(CheckpointError, match="another vocabulary"):
            check_fits(start_of(config, vocabulary=other.to_json()), config, stream, "it")


@pytest.mark.parametrize("role", ["text_tokenizer", "image_tokenizer"])
def test_another_tokenizer_is_refused(run, role: str) -> None:
    config, stream = run
    start = start_of(config)
    start.tokenizers[role] = "c" * 64
    with pytest.raises(CheckpointError, match=f"with the {role} cccccccccccc"):
        check_fits(start, config, stream, "it")


def test_what_is_no_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.init: .* does not exist"):
        open_start(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no valid checkpoint step"):
        open_start(tmp_path / "empty")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/params.json").write_text(json.dumps({"dim": 32}))
    (tmp_path / "meta/consolidated.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="from-hf"):
        open_start(tmp_path / "meta")
    tiny_models.opt_model(300).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").write_bytes((tmp_path / "hf/model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_start(tmp_path / "hf")


def test_another_model_is_refused_before_it_is_built(tmp_path: Path) -> None:
    config = tiny("tiny_cm3leon")
    write_random(config, tmp_path / "base")
    wider = dataclasses.replace(config.model, hidden_size=2 * config.model.hidden_size)
    checkpoint = dataclasses.replace(config.checkpoint, init=str(tmp_path / "base"))
    train = dataclasses.replace(config.train, out=str(tmp_path / "run"))
    fitting = dataclasses.replace(config, checkpoint=checkpoint, train=train)
    other = dataclasses.replace(fitting, model=wider)
    check_init(fitting)
    with pytest.raises(CheckpointError, match=f"set model.hidden_size={config.model.hidden_size}"):
        check_init(other)
    # A run that goes on needs no other's weights; they may be gone.
    write_random(config, tmp_path / "run/checkpoints/step_000003")
    check_init(other)
    with pytest.raises(CheckpointError, match="hidden_size"):
        check_init(dataclasses.replace(other, checkpoint=dataclasses.replace(checkpoint, resume="never")))
