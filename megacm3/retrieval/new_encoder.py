"""A CLIP bi-encoder of one's own size, untrained, with a tokenizer trained on the captions at hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megacm3.command import seed_from
from megacm3.errors import ConfigError
from megacm3.retrieval.encoder import Encoder

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's two special tokens; padding is END, as in the released models."""


@dataclass(frozen=True)
class EncoderTraining:
    """Size of a new encoder and how it is trained. Defaults: tuned on 503 pictures of 48 pixels, 40 s on two cores."""

    image_size: int = 48
    patch_size: int = 8
    width: int = 128
    """Hidden size of both towers; 32 a head."""
    dim: int = 0
    """Width of the common space; 0: `width`."""
    image_layers: int = 3
    text_layers: int = 2
    text_tokens: int = 32
    """Longest text in tokens, begin and end marks included."""
    vocabulary: int = 1536
    """Most tokens of a new tokenizer; 514 of them are bytes and marks."""
    steps: int = 300
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    scale: float = 30.0
    """Inverse temperature at the start (learned). CLIP's 14.3 leaves all vectors in a narrow cone after so few steps:
    half of the nearest neighbours then score above the 0.9 that the sampler allows."""
    token_dropout: float = 0.2
    """Share of a caption's tokens that are dropped, as in retrieval queries."""
    jitter: float = 0.1
    """Shift, zoom and colour change of a picture, each up to this share."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for values that cannot work."""
        if self.image_size < 1 or self.patch_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(f"image size {self.image_size} is no multiple of the patch size {self.patch_size}")
        if self.width % 32 or self.width < 32:
            raise ConfigError(f"width {self.width} is no multiple of 32")
        if self.image_layers < 1 or self.text_layers < 1:
            raise ConfigError(
                f"{self.image_layers} image and {self.text_layers} text layers; expected 1 or more of each"
            )
        if not 0 < self.lr < 1:
            raise ConfigError(f"learning rate {self.lr}; expected a number above 0, below 1")
        largest = max(self.image_size, self.width, self.text_tokens, self.vocabulary, 1000 * self.image_layers)
        if largest > 1_000_000 or 1000 * self.text_layers > 1_000_000:
            raise ConfigError("an encoder has at most 1,000 layers, and sizes of at most 1,000,000")
        if self.dim < 0:
            raise ConfigError(f"dim {self.dim}; expected 1 or more, or 0 for the width")
        if self.steps < 1 or self.batch < 2 or not 0 <= self.token_dropout < 1 or self.text_tokens < 3:
            raise ConfigError("expected steps >= 1, batch >= 2, text tokens >= 3 and 0 <= token dropout < 1")


def train_tokenizer(captions: Sequence[str], size: int, longest: int) -> "CLIPTokenizer":
    """CLIP's byte-level BPE with at most `size` tokens, every byte among them, so that no text is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rules = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < 2 + 2 * len(alphabet):
        raise ConfigError(f"a vocabulary of {size} tokens is too small; at least {2 + 2 * len(alphabet)} are needed")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    # 256 tokens are kept free for the bytes that never ended a word in these captions.
    trainer = trainers.BpeTrainer(
        vocab_size=size - 256,
        special_tokens=[BEGIN, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    names = dict.fromkeys([BEGIN, END, *alphabet, *(byte + "</w>" for byte in alphabet), *model["vocab"]])
    vocabulary = {name: number for number, name in enumerate(names)}
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=longest, split_special_tokens=True)


def new_encoder(training: EncoderTraining, captions: Sequence[str]) -> Encoder:
    """An untrained encoder of the given size with a tokenizer trained on `captions`."""
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = train_tokenizer(captions, training.vocabulary, training.text_tokens)
    common = {
        "hidden_size": training.width,
        "intermediate_size": 2 * training.width,
        "num_attention_heads": training.width // 32,
        "projection_dim": training.dim or training.width,
    }
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"num_hidden_layers": training.text_layers, "max_position_embeddings": training.text_tokens}
    image = {"num_hidden_layers": training.image_layers, "image_size": training.image_size}
    config = CLIPConfig(
        text_config=common | marks | text | {"vocab_size": len(tokenizer)},
        vision_config=common | image | {"patch_size": training.patch_size},
        projection_dim=training.dim or training.width,
        logit_scale_init_value=math.log(training.scale),
    )
    size = training.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(training.seed, "encoder weights"))
        model = CLIPModel(config)
    return Encoder(model, tokenizer, processor, "")
