"""The loop against a plain reference on transformers' logits; samples do not depend on their batch-mates."""

import numpy as np
import pytest
import torch

from megacm3.inference.decoder import Decoder
from megacm3.inference.engine import Engine, Request
from megacm3.inference.guidance import ClassifierFree, Contrastive, Plain, ThreeStream
from megacm3.inference.modality import Grammar, Modes
from megacm3.inference.sampling import Sampling, gumbel_noise, keep, penalize
from megacm3.tokenizers.vocabulary import IMAGE, TEXT
from tests.helpers.tiny_models import opt_model

COND, MIDDLE, UNCOND = (320 + 32 + 1, 5, 6, 7, 354), (353, 356, 320, 321, 354), (353, 356, 354)


@pytest.fixture(scope="module")
def opt(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "opt"
    model = opt_model(vocabulary.size + 8)
    model.save_pretrained(folder)
    return model, Decoder.load(folder)


def interleaved(seed, **changes):
    """Text so hot that one in a few begins an image, which is then guided."""
    settings = {"text": Sampling(5.0), "image": Sampling(0.9), "guidance": ClassifierFree(4.0), "max_tokens": 70}
    return Request((353, 17), Modes.INTERLEAVED, seed, **settings | changes, guides=lambda before: [list(UNCOND)])


@pytest.fixture(scope="module")
def seeds_with_image(opt, vocabulary):
    engine = make_engine(opt, vocabulary)
    found = {event.request for event in engine.run([interleaved(seed) for seed in range(40)]) if event.kind == "image"}
    assert len(found) >= 2
    return sorted(found)


def make_engine(opt, vocabulary, **options):
    decoder = opt[1]
    return Engine(decoder, Grammar(vocabulary, decoder.architecture.vocab_size), 96, **options)


def run(engine, requests):
    events = list(engine.run(requests))
    ids = [[] for _ in requests]
    for event in events:
        if event.kind in ("text", "image"):
            ids[event.request] += event.ids
    assert sorted(event.request for event in events if event.kind == "done") == list(range(len(requests)))
    return ids


def plain_image(model, vocabulary, streams, guidance, sampling, seed, count):
    """One image by whole forward passes of transformers, nothing shared, nothing cached."""
    ids = torch.from_numpy(vocabulary.code_to_id)
    streams = [list(stream) for stream in streams]
    for position in range(count):
        with torch.no_grad():
            block = torch.stack([model(input_ids=torch.tensor([s])).logits[0, -1, ids] for s in streams])[None]
        scores = guidance(block)
        if sampling.temperature > 0:
            scores = keep(scores, sampling) + gumbel_noise(torch.tensor([seed]), torch.tensor([position]), ids)
        token = int(ids[scores.argmax()])
        for stream in streams:
            stream.append(token)
    return streams[0][-count:]


@pytest.mark.parametrize(
    ("guidance", "streams"),
    [
        (Plain(), (COND,)),
        (ClassifierFree(3.0), (COND, UNCOND)),
        (ThreeStream(1.5, 7.5), (COND, MIDDLE, UNCOND)),
        (Contrastive(1, 0.5), (COND, UNCOND)),
        (Contrastive(5, 0.5), (COND, UNCOND)),
    ],
    ids=["plain", "cfg", "three", "cd", "cdk"],
)
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0), Sampling(0.8, top_p=0.8), Sampling(1.2, top_k=6)])
def test_images_equal_the_plain_reference(opt, vocabulary, guidance, streams, sampling):
    guides = [list(stream) for stream in streams[1:]]
    request = Request(COND, Modes.IMAGE, 11, image=sampling, guidance=guidance, guides=lambda before: guides)
    found = run(make_engine(opt, vocabulary), [request])[0]
    assert found == plain_image(opt[0], vocabulary, streams, guidance, sampling, 11, vocabulary.image_tokens)


def test_text_equals_the_plain_reference(opt, vocabulary):
    model, _ = opt
    sampling = Sampling(0.9, top_p=0.9, repetition_penalty=1.3)
    prompt = (353, 9, 8, 7)
    found = run(make_engine(opt, vocabulary), [Request(prompt, Modes.TEXT, 4, max_tokens=20, text=sampling)])[0]
    grammar = Grammar(vocabulary, vocabulary.size + 8)
    tokens = list(prompt)
    for position in range(20):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        scores = scores.masked_fill(~grammar.masks[0], float("-inf"))
        scores = penalize(scores, [i for i in tokens if vocabulary.kind[i] == TEXT], 1.3)
        noise = gumbel_noise(torch.tensor([4]), torch.tensor([position]), torch.arange(len(scores)))
        token = int((keep(scores[None], sampling) + noise).argmax())
        tokens.append(token)
        if token == vocabulary.eos:
            tokens.pop()
            break
    assert found == tokens[len(prompt) :]
    assert len(found) > 2


def test_greedy_equals_transformers_generate(opt, vocabulary):
    """transformers' own loop with our masks as its processor."""
    model, _ = opt
    from transformers import LogitsProcessorList

    mask = Grammar(vocabulary, vocabulary.size + 8).masks[2]
    only_images = LogitsProcessorList([lambda ids, scores: scores.masked_fill(~mask, float("-inf"))])
    out = model.generate(
        torch.tensor([COND]), max_new_tokens=16, do_sample=False, logits_processor=only_images, pad_token_id=352
    )
    found = run(make_engine(opt, vocabulary), [Request(COND, Modes.IMAGE, image=Sampling(0))])[0]
    assert found == out[0, len(COND) :].tolist()


def mixed_requests(seeds_with_image):
    """Every kind of request, prompts of different lengths, different settings and seeds."""
    guided = {"guidance": ClassifierFree(2.0), "guides": lambda before: [list(UNCOND)]}
    sampling = Sampling(0.9, top_p=0.9)
    requests = [
        Request(COND, Modes.IMAGE, 1, image=sampling, **guided),
        Request((353, 4, 4), Modes.TEXT, 2, max_tokens=7, text=sampling),
        Request((353, *range(30), 354), Modes.IMAGE, 3),
        interleaved(seeds_with_image[0]),
        interleaved(seeds_with_image[1], image=Sampling(top_k=5)),
        Request((353, 356, 354, *range(320, 336), 353, 356), Modes.INFILL, 5, max_tokens=9),
        Request(COND, Modes.IMAGE, 6, image=sampling, **guided),
        Request(COND, Modes.IMAGE, 6, codes=5, image=sampling),
    ]
    return requests


@pytest.mark.parametrize("max_rows", [2, 3, 5, 64])
def test_samples_do_not_depend_on_batch_mates(opt, vocabulary, seeds_with_image, max_rows):
    """The same ids alone and in a mixed batch, for every size of the batch (requests wait, rows move to fill holes)."""
    requests = mixed_requests(seeds_with_image)
    alone = [run(make_engine(opt, vocabulary), [request])[0] for request in requests]
    assert sum((vocabulary.kind[np.asarray(ids, int)] == IMAGE).any() for ids in alone[3:5]) == 2
    together = run(make_engine(opt, vocabulary, max_rows=max_rows), requests)
    assert together == alone
    assert run(make_engine(opt, vocabulary, max_rows=max_rows), requests[::-1]) == alone[::-1]


def test_an_interleaved_image_equals_the_reference_with_guidance(opt, vocabulary, seeds_with_image):
    """Guidance rows live inside the image only; the text's row goes on without being run again."""
    model, seed = opt[0], seeds_with_image[0]
    events = list(make_engine(opt, vocabulary).run([interleaved(seed)]))
    drawn, context = 0, [353, 17]
    for event in events:
        if event.kind == "text":
            context += event.ids
            drawn += 1
        elif event.kind == "image":
            context.append(vocabulary.boi)
            ids = torch.from_numpy(vocabulary.code_to_id)
            streams = [list(context), list(UNCOND)]
            for position in range(drawn + 1, drawn + 1 + vocabulary.image_tokens):
                with torch.no_grad():
                    block = torch.stack([model(input_ids=torch.tensor([s])).logits[0, -1, ids] for s in streams])[None]
                noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), ids)
                token = int(ids[(ClassifierFree(4.0)(block) / 0.9 + noise).argmax()])
                for stream in streams:
                    stream.append(token)
            assert list(event.ids) == streams[0][-vocabulary.image_tokens :]
            return


def test_forbidden_tokens_are_never_drawn_whatever_the_logits(opt, vocabulary):
    """High temperature, many seeds: text requests give text ids, image requests exactly the grid's image ids."""
    hot = Sampling(100.0)
    guided = {"guidance": ClassifierFree(9.0), "guides": lambda before: [list(UNCOND)]}
    requests = [Request(COND, Modes.IMAGE, seed, image=hot, **guided) for seed in range(20)]
    requests += [Request((353, 1), Modes.TEXT, seed, 20, text=hot) for seed in range(20)]
    for request, ids in zip(requests, run(make_engine(opt, vocabulary), requests), strict=True):
        kinds = vocabulary.kind[np.asarray(ids, int)]
        assert (kinds == (IMAGE if request.mode == Modes.IMAGE else TEXT)).all()
        if request.mode == Modes.IMAGE:
            assert len(ids) == vocabulary.image_tokens


def test_partial_images_are_reported_row_by_row(opt, vocabulary):
    events = list(make_engine(opt, vocabulary, report_every=4).run([Request(COND, Modes.IMAGE, 1)]))
    assert [(event.kind, len(event.ids)) for event in events] == [
        ("codes", 4), ("codes", 8), ("codes", 12), ("image", 16), ("done", 0)
    ]  # fmt: skip
    assert all(event.ids == events[3].ids[: len(event.ids)] for event in events[:3])
    assert events[-1].reason == "image"


def test_text_ends_where_the_room_ends(opt, vocabulary):
    prompt = (353, *range(90))
    events = list(make_engine(opt, vocabulary).run([Request(prompt, Modes.TEXT, 3)]))
    assert events[-1].reason in ("length", "stop") and len(events) <= 96 - 91 + 1


def test_no_requests_no_events(opt, vocabulary):
    assert list(make_engine(opt, vocabulary).run([])) == []
