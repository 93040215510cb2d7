"""Training steps from the stream: the same for any ranks, workers and starting points."""

import itertools

import numpy as np
import pytest
import torch

from megacm3.data.documents import IMAGE, TEXT, Document, Segment
from megacm3.data.loader import IGNORED, Loader, Step, check_resume
from megacm3.data.mixture import Mixture, Stage
from megacm3.data.stream import Stream
from megacm3.data.synthetic import MemoryStore, RandomNeighbours
from megacm3.data.windows import COUNTERS, Source, StreamSettings, add_counts
from megacm3.errors import CheckpointError, ConfigError, DataError
from megacm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.cm3leon(text_size=300, codebook_size=64, special_size=72, sentinels=64, image_tokens=16)


def store(count: int = 200) -> MemoryStore:
    rng = np.random.default_rng(0)
    texts, codes = rng.integers(0, 300, (count, 5)), rng.integers(0, 64, (count, 16))
    return MemoryStore([(Segment(TEXT, t), Segment(IMAGE, c)) for t, c in zip(texts, codes, strict=True)])


def stream(documents: MemoryStore | None = None, seed: int = 0, weight: float = 1.0, **settings: object) -> Stream:
    documents = documents or store()
    source = Source("store", documents, RandomNeighbours(200, 1), {"store": "abc"})
    values = StreamSettings(**({"sequence_length": 60, "seed": seed} | settings))  # type: ignore[arg-type]
    return Stream([source], Mixture([200], [Stage(0, (weight,))], seed=0), VOCABULARY, values)


def steps(
    source: Stream, count: int, dp_rank: int = 0, dp_size: int = 1, start: int = 0, workers: int = 0
) -> list[Step]:
    loader = Loader(source, dp_rank, dp_size, 2, 8, start_step=start, workers=workers)
    return list(itertools.islice(loader, count))


def flat(step: Step, name: str) -> torch.Tensor:
    return torch.cat([micro[name] for micro in step.micro_batches])


def test_a_step_holds_its_sequences_in_order() -> None:
    source = stream()
    step = steps(source, 3)[2]
    assert step.number == 2 and len(step.micro_batches) == 4
    assert flat(step, "numbers").tolist() == list(range(16, 24))
    for row, number in enumerate(range(16, 24)):
        sequence = source.sequence(number)
        assert flat(step, "tokens")[row].tolist() == sequence.tokens[:-1].tolist()
        targets = np.where(sequence.loss_mask, sequence.tokens[1:], IGNORED)
        assert flat(step, "targets")[row].tolist() == targets.tolist()
        assert flat(step, "documents")[row].tolist() == sequence.documents.tolist()
    micro = step.micro_batches[0]
    assert {name: tensor.dtype for name, tensor in micro.items()} == {
        "tokens": torch.int64,
        "targets": torch.int64,
        "documents": torch.int32,
        "numbers": torch.int64,
    }
    assert micro["tokens"].shape == (2, 60)


def test_padding_bears_no_loss() -> None:
    step = steps(stream(), 1)[0]
    tokens, targets = flat(step, "tokens"), flat(step, "targets")
    assert (tokens == VOCABULARY.pad).any()
    assert (targets[:, :-1][tokens[:, 1:] == VOCABULARY.pad] == IGNORED).all()
    assert (targets[:, :-1][tokens[:, 1:] != VOCABULARY.pad] != IGNORED).all()
    assert not (targets == VOCABULARY.pad).any()


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_do_not_change_a_step(dp_size: int, workers: int) -> None:
    alone = steps(stream(), 3)
    ranks = [steps(stream(), 3, rank, dp_size, workers=workers) for rank in range(dp_size)]
    for number, step in enumerate(alone):
        for name in ("tokens", "targets", "documents", "numbers"):
            joined = torch.cat([flat(rank[number], name) for rank in ranks])
            assert torch.equal(joined, flat(step, name))
        assert {rank[number].samples_sha256 for rank in ranks} == {step.samples_sha256}
        assert all(rank[number].counts == step.counts for rank in ranks)
    assert len({step.samples_sha256 for step in alone}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_later_gives_the_same_steps(workers: int) -> None:
    whole = steps(stream(), 40)
    for start in (1, 37):
        for step, again in zip(whole[start:], steps(stream(), 3, start=start, workers=workers), strict=False):
            assert again.number == step.number and again.samples_sha256 == step.samples_sha256
            assert torch.equal(flat(again, "tokens"), flat(step, "tokens"))


def test_going_on_with_another_global_batch() -> None:
    source = stream()
    first = Loader(source, 0, 1, 2, 8, start_step=5)
    *_, last = itertools.islice(first, 2)
    assert last.number == 6 and last.first_sequence + 8 == 56
    second = Loader(source, 0, 1, 2, 4, start_step=7, start_sequence=last.first_sequence + 8)
    step = next(iter(second))
    assert step.number == 7 and flat(step, "numbers").tolist() == [56, 57, 58, 59]


def test_counts_are_those_of_the_global_batch() -> None:
    source = stream()
    step = steps(source, 2, dp_rank=1, dp_size=2)[1]
    assert step.counts == add_counts(source.counts(n) for n in range(8, 16))
    assert set(step.counts) == set(COUNTERS)
    assert step.counts["tokens"] + step.counts["padding"] == 8 * 61


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    np.random.seed(1)
    for workers in (0, 1):
        torch.manual_seed(1)
        torch.rand(0)
        steps(stream(), 2, workers=workers)
        assert torch.equal(torch.rand(3), expected)
    assert np.random.random() == np.random.RandomState(1).random()


def test_impossible_batches_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"global_batch = 10 .* 2 x 2 = 4; nearest: 8 or 12"):
        Loader(stream(), 0, 2, 2, 10)
    with pytest.raises(ConfigError, match="nearest: 4"):
        Loader(stream(), 0, 2, 2, 3)


class Damaged(MemoryStore):
    def document(self, doc_id: int) -> Document:
        raise DataError(f"document {doc_id} is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_store_ends_with_one_line(workers: int) -> None:
    documents = Damaged([(Segment(TEXT, np.zeros(5, int)), Segment(IMAGE, np.zeros(16, int)))] * 200)
    with pytest.raises(DataError, match=r"^document \d+ is damaged$"):
        steps(stream(documents), 1, workers=workers)


class Deadly(MemoryStore):
    def document(self, doc_id: int) -> Document:
        import os

        os._exit(9)


def test_a_dead_worker_is_reported() -> None:
    documents = Deadly([(Segment(TEXT, np.zeros(5, int)), Segment(IMAGE, np.zeros(16, int)))] * 200)
    with pytest.raises(DataError, match="a loader process died"):
        steps(stream(documents), 1, workers=1)


def test_another_stream_is_refused_on_resume() -> None:
    source = stream()
    check_resume(source.description, stream())
    assert stream().fingerprint == source.fingerprint
    with pytest.raises(CheckpointError, match=r"settings\.seed was 0, is now 1"):
        check_resume(source.description, stream(seed=1))
    with pytest.raises(CheckpointError, match=r"settings\.spans was 1\.0, is now 0\.0"):
        check_resume(source.description, stream(spans=0.0))
    with pytest.raises(CheckpointError, match=r"stages\[0\]\.weights\[0\] was 1\.0, is now 2\.0"):
        check_resume(source.description, stream(weight=2.0))
    check_resume(source.description, stream(weight=2.0), {"stages"})
    with pytest.raises(CheckpointError, match=r"settings\.spans"):
        check_resume(source.description, stream(spans=0.0), {"stages"})
    other = {**source.description, "stores": [{"store": "xyz", "documents": 200}]}
    with pytest.raises(CheckpointError, match=r"stores\[0\]\.store was xyz, is now abc"):
        check_resume(other, source)


def test_description_survives_json() -> None:
    import json

    source = stream()
    check_resume(json.loads(json.dumps(source.description)), source)
