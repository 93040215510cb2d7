"""Shares, lengths and patterns add up."""

import numpy as np

from megacm3.data.documents import IMAGE, TEXT, Segment
from megacm3.data.mixture import Mixture, Stage
from megacm3.data.statistics import store_statistics, stream_statistics
from megacm3.data.stream import Stream
from megacm3.data.synthetic import MemoryStore, RandomNeighbours
from megacm3.data.windows import Source, StreamSettings
from megacm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.cm3leon(text_size=300, codebook_size=64, special_size=72, sentinels=64, image_tokens=16)
STORE = MemoryStore(
    [(Segment(TEXT, np.arange(4)), Segment(IMAGE, np.arange(16)))] * 90 + [(Segment(TEXT, np.arange(30)),)] * 10
)


def test_store() -> None:
    found = store_statistics(STORE)
    assert found.documents == found.sampled == 100
    assert found.patterns == {"text image": 90, "text": 10}
    assert sorted(set(found.lengths.tolist())) == [20, 30] and found.text_lengths.sum() == 90 * 4 + 300
    assert found.image_share == 90 * 16 / (90 * 20 + 300)
    assert store_statistics(STORE, sample=10).sampled <= 10


def test_stream() -> None:
    mixture = Mixture([100], [Stage(0, (1.0,))], seed=0)
    source = Source("store", STORE, RandomNeighbours(100, 2))
    stream = Stream([source], mixture, VOCABULARY, StreamSettings(60))
    found = stream_statistics(stream)
    counts = found.counts
    assert found.sequences == stream.stages[0].sequences
    assert counts["tokens"] + counts["padding"] == found.sequences * 61
    assert found.shares["padding"] == counts["padding"] / (found.sequences * 61)
    assert abs(sum(found.shares[name] for name in ("text", "image", "special")) - 1) < 1e-9
    assert 0 < found.shares["left_out"] < 0.5 and found.shares["cut"] < 0.05
    assert found.spans.sum() == found.sequences
    assert len(found.sample_lengths) == counts["samples"]
