"""Weights in taming's and Chameleon's layout give identical codes; the original network is written out here."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.image import ImageTokenizer, to_pixels, to_unit
from megacm3.tokenizers.image_config import NetworkConfig
from megacm3.tokenizers.taming import read_network_config, read_weights, to_vqmodel


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(n, c, h * w) for f in (self.q, self.k, self.v))
        share = torch.softmax(torch.einsum("nci,ncj->nij", q, k) * c**-0.5, -1)
        return x + self.proj_out(torch.einsum("nij,ncj->nci", share, v).reshape(n, c, h, w))


class Conv(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride, padding=1 if stride == 1 else 0)
        self.stride = stride

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else F.interpolate(x, scale_factor=2.0))


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(c, c), Attention(c), Block(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    def __init__(self, a, b, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(Block(a if i == 0 else b, b) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(b) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, c in enumerate(channels):
            level = Level(channels[max(0, i - 1)], c, config.layers_per_block, i in config.attention_levels)
            if i < len(channels) - 1:
                level.downsample = Conv(c, 2)
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        levels = []
        for i, c in enumerate(channels):
            before = channels[min(i + 1, len(channels) - 1)]
            level = Level(before, c, config.layers_per_block + 1, i in config.attention_levels)
            if i > 0:
                level.upsample = Conv(c, 1)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Original(nn.Module):
    """taming's VQModel or GumbelVQ, with its names."""

    def __init__(self, config, gumbel):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.quantize = nn.Module()
        self.gumbel = gumbel
        if gumbel:
            self.quantize.proj = nn.Conv2d(config.code_dim, config.codebook_size, 1)
            self.quantize.embed = nn.Embedding(config.codebook_size, config.code_dim)
        else:
            self.quantize.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    def codes(self, x):
        z = self.quant_conv(self.encoder(x))
        if self.gumbel:
            return self.quantize.proj(z).argmax(1).flatten(1)
        flat = z.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(2)
        return (flat - self.quantize.embedding.weight).square().sum(-1).argmin(-1)

    def pictures(self, codes, side):
        table = self.quantize.embed if self.gumbel else self.quantize.embedding
        z = table(codes).transpose(1, 2).reshape(len(codes), -1, side, side)
        return self.decoder(self.post_quant_conv(z))


CASES = {
    "chameleon": NetworkConfig(32, [32, 32, 64, 64, 96], 2, [], True, 32, 128, 32),
    "taming f8 with attention": NetworkConfig(32, [32, 32, 64, 96], 2, [3], True, 16, 100, 24),
    "taming f16 with attention": NetworkConfig(32, [32, 32, 64, 64, 96], 1, [2, 4], True, 24, 64, 24),
}


def original(config, gumbel):
    torch.manual_seed(0)
    network = Original(config, gumbel).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "norm" in name:
                value.add_(torch.randn_like(value) * 0.2)
        table = network.quantize.proj if gumbel else network.quantize.embedding
        table.weight.normal_(0, 0.5)
    return network


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_identical_codes_and_pictures(name, gumbel):
    config = CASES[name]
    network = original(config, gumbel)
    state = network.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    tokenizer = ImageTokenizer(to_vqmodel(state, config), config.image_size, "")
    pixels = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    codes = network.codes(to_unit(pixels))
    assert len(codes.unique()) > 3
    assert torch.equal(tokenizer.encode(pixels), codes)
    # All codes, not only those that these pictures happen to have.
    codes = torch.randint(0, config.codebook_size, codes.shape)
    difference = tokenizer.decode(codes).int() - to_pixels(network.pictures(codes, tokenizer.grid[0])).int()
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.99


YAML = """
model:
  base_learning_rate: 4.5e-6
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 8192
    ddconfig: {double_z: false, z_channels: 256, resolution: 512, in_channels: 3, out_ch: 3, ch: 128,
               ch_mult: [1, 1, 2, 2, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
"""


def test_released_config_is_understood(tmp_path):
    path = tmp_path / "vqgan.yaml"
    path.write_text(YAML)
    config = read_network_config(path)
    assert config.channels == [128, 128, 256, 256, 512] and config.attention_levels == []
    assert (config.image_size, config.codebook_size, config.code_dim, config.latent_channels) == (512, 8192, 256, 256)
    path.write_text(YAML.replace("ch_mult: [1, 1, 2, 2, 4]", "ch_mult: [1, 1, 2, 4]").replace("s: []", "s: [64]"))
    assert read_network_config(path).attention_levels == [3]
    path.write_text(YAML.replace("n_embed: 8192", ""))
    with pytest.raises(ConfigError, match="lacks 'n_embed'"):
        read_network_config(path)
    path.write_text(YAML.replace("double_z: false", "double_z: true"))
    with pytest.raises(ConfigError, match="double_z"):
        read_network_config(path)


def test_the_wrong_config_is_refused():
    config = CASES["chameleon"]
    state = original(config, False).state_dict()
    with pytest.raises(DataError, match="names differ"):
        to_vqmodel(state, NetworkConfig(**vars(config) | {"layers_per_block": 1}))
    with pytest.raises(DataError, match="has the shape"):
        to_vqmodel(state, NetworkConfig(**vars(config) | {"codebook_size": 64}))
    with pytest.raises(DataError, match="has no quantize"):
        to_vqmodel({name: value for name, value in state.items() if "quantize" not in name}, config)


class Lightning:
    """Stands for the objects that Lightning puts into its checkpoints."""


def test_pickled_checkpoints_need_a_word(tmp_path):
    state = {"decoder.conv_in.weight": torch.ones(2)}
    torch.save({"state_dict": state, "callbacks": Lightning()}, tmp_path / "a.ckpt")
    with pytest.raises(DataError, match="--trust-pickle"):
        read_weights(tmp_path / "a.ckpt")
    torch.save({"state_dict": state}, tmp_path / "b.ckpt")
    assert list(read_weights(tmp_path / "b.ckpt")) == list(state)
    (tmp_path / "c.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:300])
    with pytest.raises(DataError, match="damaged"):
        read_weights(tmp_path / "c.ckpt")
    with pytest.raises(DataError, match="does not exist"):
        read_weights(tmp_path / "d.ckpt")
