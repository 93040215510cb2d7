"""The untrained parts of an image tokenizer: a `diffusers.VQModel`, and the codebook that learns in its place."""

from diffusers import VQModel
from torch import nn

from megacm3.tokenizers.image_config import NetworkConfig, QuantizerConfig


def build_network(config: NetworkConfig) -> VQModel:
    """The network of a config, randomly initialised from torch's global generator."""
    levels = range(len(config.channels))
    down = ["AttnDownEncoderBlock2D" if i in config.attention_levels else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if i in config.attention_levels else "UpDecoderBlock2D" for i in reversed(levels)]
    return VQModel(
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        sample_size=config.image_size,
        num_vq_embeddings=config.codebook_size,
        norm_num_groups=config.norm_groups,
        vq_embed_dim=config.code_dim,
        mid_block_add_attention=config.middle_attention,
    )


def build_quantizer(config: QuantizerConfig, network: NetworkConfig, latents: int) -> nn.Module:
    """The learning codebook; `latents` is the number of latent vectors in a global batch."""
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(
        dim=network.code_dim,
        codebook_size=network.codebook_size,
        decay=config.decay,
        kmeans_init=config.kmeans > 0,
        kmeans_iters=config.kmeans,
        use_cosine_sim=config.cosine,
        # The library counts uses a batch; the config names a share of an equal use.
        threshold_ema_dead_code=config.dead_below * latents / network.codebook_size,
        commitment_weight=config.commitment,
        rotation_trick=config.rotation_trick,
        accept_image_fmap=True,
    )
