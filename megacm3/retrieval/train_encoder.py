"""A small CLIP bi-encoder of one's own, or further training of an existing one, with CLIP's contrastive loss.

Everything is in memory and in one process: this is for sets of up to some 100,000 pairs. Queries at retrieval time are
pictures and captions with tokens dropped, so training sees jittered pictures and captions with tokens dropped.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.command import progress, seed_from
from megacm3.errors import ConfigError, DataError
from megacm3.files import new_folder, write_json, write_manifest
from megacm3.retrieval.encoder import KIND, Encoder, document_vectors, encoder_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import CLIPModel, CLIPTokenizer

logger = logging.getLogger(__name__)

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's two special tokens; padding is END, as in the released models."""


@dataclass(frozen=True)
class EncoderTraining:
    """Size of a new encoder and how it is trained. Defaults: tuned on 503 pictures of 48 pixels, 40 s on two cores."""

    image_size: int = 48
    patch_size: int = 8
    width: int = 128
    """Hidden size of both towers and of the common space; 32 a head."""
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
        if self.steps < 1 or self.batch < 2 or not 0 <= self.token_dropout < 1 or self.text_tokens < 3:
            raise ConfigError("expected steps >= 1, batch >= 2, text tokens >= 3 and 0 <= token dropout < 1")


@dataclass(frozen=True)
class Pairs:
    """Training pairs in memory."""

    images: np.ndarray
    """uint8 [n, s, s, 3]."""
    captions: list[str]

    @property
    def fingerprint(self) -> str:
        """Of pictures and captions."""
        import hashlib

        digest = hashlib.sha256(json.dumps(self.captions).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        return digest.hexdigest()


def read_pairs(inputs: Iterable[str], image_size: int, limit: int = 200_000) -> Pairs:
    """The first `limit` captioned pictures of the given paths and globs, prepared at `image_size` pixels.

    Rows that cannot be used are left out and counted in the log. Raises DataError when none is left.
    """
    from megacm3.data.images import ImageLimits, Reject, open_image, prepare_image
    from megacm3.data.sources import Sample, find_shards, read_shard

    limits = ImageLimits(min_side=1)
    images: list[np.ndarray] = []
    captions: list[str] = []
    left_out = 0
    for shard in find_shards(inputs):
        for item in read_shard(shard):
            pictures = [part for part in item.parts if isinstance(part, bytes)] if isinstance(item, Sample) else []
            if not pictures or not isinstance(item, Sample) or not item.caption:
                left_out += 1
                continue
            try:
                images.append(prepare_image(open_image(pictures[0], limits), image_size))
            except Reject:
                left_out += 1
                continue
            captions.append(item.caption)
            if len(images) == limit:
                break
    if left_out:
        logger.info("%d rows without a usable picture and caption are left out", left_out)
    if len(images) < 2:
        raise DataError(f"--input {' '.join(inputs)} holds {len(images)} captioned pictures; at least 2 are needed")
    return Pairs(np.stack(images), captions)


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
        "projection_dim": training.width,
    }
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"num_hidden_layers": training.text_layers, "max_position_embeddings": training.text_tokens}
    image = {"num_hidden_layers": training.image_layers, "image_size": training.image_size}
    config = CLIPConfig(
        text_config=common | marks | text | {"vocab_size": len(tokenizer)},
        vision_config=common | image | {"patch_size": training.patch_size},
        projection_dim=training.width,
        logit_scale_init_value=math.log(training.scale),
    )
    size = training.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(training.seed, "encoder weights"))
        model = CLIPModel(config)
    return Encoder(model, tokenizer, processor, "")


def train_encoder(
    pairs: Pairs,
    training: EncoderTraining,
    output: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train an encoder on `pairs` and write its folder; gives its figures (`recall`).

    `base`: a CLIP folder to train further; its sizes count then, not those of `training`.
    Raises ConfigError for impossible settings, DataError for a base that is no CLIP or an output that exists.
    """
    import torch

    training.check()
    with torch.random.fork_rng(devices=[]):
        encoder = Encoder.load(base, device) if base else new_encoder(training, pairs.captions)
        encoder.model.to(device)
        losses = _fit(encoder, pairs, training)
    figures = recall(encoder, pairs) | {"loss_first": losses[0], "loss_last": float(np.mean(losses[-10:]))}
    with new_folder(output, replace=overwrite) as folder:
        save(encoder, folder, asdict(training), encoder_inputs(pairs, base), figures)
    return figures


def encoder_inputs(pairs: Pairs, base: str | Path | None) -> dict[str, str]:
    """Fingerprints for the manifest: the pairs, and the encoder that was trained further."""
    return {"pairs": pairs.fingerprint} | ({"base": encoder_fingerprint(base)} if base else {})


def save(
    encoder: Encoder, folder: Path, training: dict[str, Any], inputs: dict[str, str], figures: dict[str, float]
) -> None:
    """Write a complete CLIP folder of transformers, with the training's figures and a manifest."""
    from safetensors.torch import save_file

    # Not model.save_pretrained: it imports DeepSpeed where that is installed, which takes seconds.
    encoder.model.config.architectures = ["CLIPModel"]
    encoder.model.config.save_pretrained(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.tokenizer.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    write_json(folder / "training.json", figures)
    settings = {"dim": encoder.dim, "image_size": encoder.image_size, "training": training}
    write_manifest(folder, KIND, settings, inputs)


def copy_encoder(source: str | Path, target: str | Path) -> None:
    """Copy an encoder folder; the copy has the same fingerprint."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))


def recall(encoder: Encoder, pairs: Pairs) -> dict[str, float]:
    """Share of pictures, and of captions, whose best document among all pairs is their own (or has its caption)."""
    image, text = encoder.encode_images(pairs.images), encoder.encode_texts(pairs.captions)
    documents = document_vectors(image, text)
    captions = np.array([caption.casefold() for caption in pairs.captions])
    found = {}
    for name, queries in (("image", image), ("text", text)):
        best = np.concatenate([(queries[i : i + 1024] @ documents.T).argmax(1) for i in range(0, len(queries), 1024)])
        found[f"recall_{name}"] = float((captions[best] == captions).mean())
    return found


def _fit(encoder: Encoder, pairs: Pairs, training: EncoderTraining) -> list[float]:
    import torch

    model: CLIPModel = encoder.model.train()
    generator = torch.Generator().manual_seed(seed_from(training.seed, "encoder training"))
    torch.manual_seed(seed_from(training.seed, "encoder dropout"))
    tokens = encoder.tokenize(pairs.captions)
    _, groups = np.unique([caption.casefold() for caption in pairs.captions], return_inverse=True)
    group = torch.from_numpy(groups)
    groups_of_weights = _parameter_groups(model, training.weight_decay)
    optimizer = torch.optim.AdamW(groups_of_weights, lr=training.lr, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training))
    losses: list[float] = []
    batches = _batches(len(tokens), min(training.batch, len(tokens)), training.steps, generator)
    for rows in progress(batches, total=training.steps, unit="step", description="encoder"):
        pixels = _jitter(torch.from_numpy(encoder.pixels(pairs.images[rows])), training.jitter, generator)
        ids, mask = encoder.batch_tokens([_drop(tokens[row], training.token_dropout, generator) for row in rows])
        device = model.device
        image = model.get_image_features(pixel_values=pixels.to(device)).pooler_output
        text = model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output
        loss = contrastive_loss(image, text, model.logit_scale, group[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        losses.append(loss.item())
    model.eval()
    return losses


def contrastive_loss(
    image: "torch.Tensor", text: "torch.Tensor", log_scale: "torch.Tensor", group: "torch.Tensor"
) -> "torch.Tensor":
    """CLIP's symmetric cross entropy of [n, d] features. Pairs of the same `group` (int [n], same caption) are no
    negatives of each other: the target is spread evenly over them."""
    from torch.nn.functional import cross_entropy, normalize

    logits = log_scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    same = (group[:, None] == group[None, :]).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _parameter_groups(model: "CLIPModel", weight_decay: float) -> list[dict[str, Any]]:
    # Norms, biases and the temperature are not decayed (CLIP, Table 18).
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, training: EncoderTraining) -> float:
    # Linear warm-up, then a cosine to 5 % of the peak.
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / training.steps))))


def _batches(rows: int, batch: int, steps: int, generator: "torch.Generator") -> Iterable[np.ndarray]:
    import torch

    order = torch.randperm(rows, generator=generator)
    start = 0
    for _ in range(steps):
        if start + batch > rows:
            order, start = torch.randperm(rows, generator=generator), 0
        yield order[start : start + batch].numpy()
        start += batch


def _drop(row: list[int], share: float, generator: "torch.Generator") -> list[int]:
    import torch

    kept = torch.rand(len(row), generator=generator) >= share
    return [token for token, keep in zip(row, kept.tolist(), strict=True) if keep] or row


def _jitter(pixels: "torch.Tensor", amount: float, generator: "torch.Generator") -> "torch.Tensor":
    # float32 [n, 3, s, s]: shift and zoom by up to `amount`, brightness and colour by up to `amount` of the range. What
    # comes in at the border is the colour of the border.
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    if not amount:
        return pixels
    count = len(pixels)
    matrix = torch.zeros(count, 2, 3)
    zoom = 1 + amount * (2 * torch.rand(count, generator=generator) - 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = amount * (2 * torch.rand(count, 2, generator=generator) - 1)
    grid = affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    # The pixels are in units of a standard deviation, about 0.27 of the range.
    return moved + amount / 0.27 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
