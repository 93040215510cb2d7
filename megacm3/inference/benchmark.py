"""How near the decoder comes to what the memory gives, beside transformers on the same exported folder."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megacm3.inference.decoder import Decoder
from megacm3.inference.engine import Engine, Request
from megacm3.inference.guidance import ClassifierFree
from megacm3.inference.linear import Int8Weight
from megacm3.inference.modality import Grammar, Modes
from megacm3.inference.sampling import Sampling
from megacm3.tokenizers.vocabulary import Vocabulary

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
BATCH = 8
PEERS = ("transformers, dynamic cache", "transformers, static cache", "transformers, compiled")


@dataclass
class GenerateTiming:
    """Seconds of every contender, round by round; each makes one image of `codes` codes, the batch 8."""

    megabytes: float
    """Bytes of the matrices that one step reads, in MB: all blocks and the codebook's rows of the head."""
    codes: int
    warm_up: dict[str, float]
    """Seconds of the first, uncounted call of each contender (compiling, where it compiles)."""
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, a: str, b: str) -> float:
        """Median over the rounds of a's time over b's, measured next to each other."""
        return statistics.median(x / y for x, y in zip(self.rounds[a], self.rounds[b], strict=True))

    def rate(self, name: str) -> float:
        """Median codes a second."""
        return self.codes / statistics.median(self.rounds[name])

    @property
    def best_peer(self) -> str:
        """The fastest of transformers' ways."""
        return min((name for name in PEERS if name in self.rounds), key=lambda n: statistics.median(self.rounds[n]))


def random_export(folder: Path, vocabulary: Vocabulary, layers: int, hidden: int) -> None:
    """A CM3Leon-shaped `OPTForCausalLM` with random weights: 8 layers of 1,024 have 437 MB of matrices a step."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary.size,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=1024,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        dropout=0.0,
    )
    OPTForCausalLM(config).save_pretrained(folder)


def benchmark_generate(
    work: Path,
    codes: int,
    rounds: int,
    say: Callable[[str], None],
    *,
    layers: int = 8,
    hidden: int = 1024,
    peers: bool = True,
) -> GenerateTiming:
    """Run all contenders in turns, `rounds` times, in this process; files go below `work`."""
    vocabulary = Vocabulary.cm3leon(text_size=7168, codebook_size=8192, image_tokens=codes)
    folder = work / "model"
    random_export(folder, vocabulary, layers, hidden)
    decoder = Decoder.load(folder)
    contenders: dict[str, Callable[[], None]] = {"ceiling": _ceiling(decoder, vocabulary, codes)}
    contenders |= _ours(decoder, Decoder.load(folder, int8=True), vocabulary, codes)
    if peers:
        contenders |= _transformers(folder, vocabulary, codes)
    timing = GenerateTiming(_step_bytes(decoder, vocabulary) / 1e6, codes, {})
    for name, run in list(contenders.items()):
        begun = time.perf_counter()
        run()
        timing.warm_up[name] = time.perf_counter() - begun
        timing.rounds[name] = []
    for number in range(rounds):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            timing.rounds[name].append(time.perf_counter() - begun)
        told = ", ".join(f"{name} {timing.rounds[name][-1]:.2f}" for name in contenders)
        say(f"round {number + 1} of {rounds}, seconds: {told}")
    return timing


def _matrices(decoder: Decoder, vocabulary: Vocabulary) -> list[torch.Tensor]:
    head = decoder.head_of(torch.from_numpy(vocabulary.code_to_id).sort().values)
    blocks = [getattr(layer, name) for layer in decoder.weights.layers for name in ("qkv", "out", "up", "down")]
    assert not any(isinstance(weight, Int8Weight) for weight in blocks)
    return [*blocks, head]


def _step_bytes(decoder: Decoder, vocabulary: Vocabulary) -> int:
    return sum(weight.nbytes for weight in _matrices(decoder, vocabulary))


def _ceiling(decoder: Decoder, vocabulary: Vocabulary, codes: int) -> Callable[[], None]:
    """One matrix-vector product with every matrix of a step, nothing else: what the memory gives."""
    matrices = _matrices(decoder, vocabulary)
    vectors = {weight.shape[1]: torch.randn(weight.shape[1]) for weight in matrices}
    outputs = {weight.shape[0]: torch.empty(weight.shape[0]) for weight in matrices}

    @torch.inference_mode()
    def run() -> None:
        for _ in range(codes):
            for weight in matrices:
                torch.mv(weight, vectors[weight.shape[1]], out=outputs[weight.shape[0]])

    return run


def _ours(decoder: Decoder, rounded: Decoder, vocabulary: Vocabulary, codes: int) -> dict[str, Callable[[], None]]:
    prompt = (vocabulary.eos, 17, 18, 19, vocabulary.boi)
    unconditional = [vocabulary.eos, vocabulary.sentinel(0), vocabulary.boi]
    grammar = Grammar(vocabulary, decoder.architecture.vocab_size)
    engines = {model: Engine(model, grammar, decoder.architecture.positions) for model in (decoder, rounded)}

    def runner(model: Decoder, samples: int, guided: bool = False) -> Callable[[], None]:
        plain = Request(prompt, Modes.IMAGE, image=SAMPLING)
        if guided:
            plain = replace(plain, guidance=ClassifierFree(3.0), guides=lambda before: [unconditional])
        requests = [replace(plain, seed=seed) for seed in range(samples)]

        def run() -> None:
            events = list(engines[model].run(requests))
            assert sum(len(event.ids) for event in events if event.kind == "image") == samples * codes

        return run

    return {
        "megacm3": runner(decoder, 1),
        "megacm3, guided": runner(decoder, 1, guided=True),
        "megacm3, int8": runner(rounded, 1),
        f"megacm3, {BATCH} at once": runner(decoder, BATCH),
    }


def _transformers(folder: Path, vocabulary: Vocabulary, codes: int) -> dict[str, Callable[[], None]]:
    from transformers import AutoModelForCausalLM, CompileConfig

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([[vocabulary.eos, 17, 18, 19, vocabulary.boi]])
    compiled = CompileConfig(fullgraph=True, mode="default")
    # generate() compiles on accelerators only; this private flag of transformers lifts that.
    with suppress(AttributeError):
        compiled._compile_all_devices = True
    ways: list[dict[str, Any]] = [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "compile_config": compiled},
    ]

    def runner(way: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            torch.manual_seed(0)
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_p=SAMPLING.top_p,
                top_k=0,
                min_new_tokens=codes,
                max_new_tokens=codes,
                pad_token_id=vocabulary.pad,
                **way,
            )
            assert out.shape[1] == prompt.shape[1] + codes

        return run

    return {name: runner(way) for name, way in zip(PEERS, ways, strict=True)}
