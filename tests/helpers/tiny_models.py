"""Tiny models with random weights in real folders: transformers writes them, our tokenizers stand beside them."""

from pathlib import Path

import torch

from megacm3.files import write_json
from megacm3.tokenizers.vocabulary import Vocabulary, image_name

GRID, CODEBOOK, PIXELS, CONTEXT = 4, 32, 32, 96
TEXTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("apple", "house", "cat", "star")]


def opt_model(vocab_size: int, context: int = CONTEXT, seed: int = 0):
    """CM3Leon's export class with random weights large enough that logits differ clearly."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        dropout=0.0,
        init_std=0.3,
    )
    return OPTForCausalLM(config).eval()


def llama_model(kind: str, vocab_size: int, context: int = CONTEXT):
    """qwen3 (q/k norm) or llama, grouped queries, norms moved away from 1."""
    import transformers

    torch.manual_seed(1)
    shape = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": context}
    name = {"qwen3": "Qwen3", "llama": "Llama"}[kind]
    config = getattr(transformers, name + "Config")(**shape, initializer_range=0.3)
    return stir_norms(getattr(transformers, name + "ForCausalLM")(config).eval())


def chameleon_model(swin: bool, context: int = CONTEXT):
    """Chameleon's class with its own small vocabulary of 700 ids."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    torch.manual_seed(2)
    names = {image_name(code): 4 + code for code in range(CODEBOOK)} | {"<image>": 551}
    config = ChameleonConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        vocabulary_map=names,
        swin_norm=swin,
        initializer_range=0.3,
        vq_config={
            "embed_dim": 4,
            "num_embeddings": CODEBOOK,
            "latent_channels": 4,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
        },
    )
    return stir_norms(ChameleonForConditionalGeneration(config).eval())


def stir_norms(model):
    """Norm weights and biases that differ from 1 and 0, so that leaving one out is seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def write_sidecar(folder: Path, vocabulary: Vocabulary, context: int = CONTEXT) -> None:
    """megacm3.json as the export has it."""
    value = {"format": 1, "family": vocabulary.family, "vocabulary": vocabulary.to_json(), "image_size": PIXELS}
    write_json(folder / "megacm3.json", value | {"grid": [GRID, GRID], "sequence_length": context, "source": {}})


def save_tokenizers(folder: Path, text_size: int) -> None:
    """A text tokenizer trained on a few captions and an untrained image tokenizer of 8 pixels a code."""
    from diffusers import VQModel

    from megacm3.tokenizers.image import save_image_tokenizer
    from megacm3.tokenizers.text import train_text_tokenizer

    train_text_tokenizer(TEXTS, text_size, folder / "text_tokenizer")
    torch.manual_seed(3)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        num_vq_embeddings=CODEBOOK,
        norm_num_groups=4,
    )
    save_image_tokenizer(network, PIXELS, folder / "image_tokenizer")


def tiny_vocabulary() -> Vocabulary:
    """320 text ids, 32 codes, 24 specials, 16 codes a picture."""
    return Vocabulary.cm3leon(320, CODEBOOK, 24, sentinels=8, image_tokens=GRID * GRID)


def save_export(folder: Path) -> Path:
    """A whole cm3leon export: OPT weights, megacm3.json, both tokenizers. The model has 8 padding rows."""
    vocabulary = tiny_vocabulary()
    opt_model(vocabulary.size + 8).save_pretrained(folder)
    write_sidecar(folder, vocabulary)
    save_tokenizers(folder, vocabulary.text_size)
    return folder
