"""Image tokenizer training: it learns, continues exactly, keeps its codes alive; its extra losses do as they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megacm3.data.images import Reject, open_image, prepare_image
from megacm3.data.sources import find_shards
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_manifest
from megacm3.tokenizers import image_metrics
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.image_config import load_image_config
from megacm3.tokenizers.image_losses import FeatureDistance, PatchDiscriminator, adaptive_weight, discriminator_loss
from megacm3.tokenizers.image_network import build_network
from megacm3.tokenizers.image_trainer import Trainer
from megacm3.tokenizers.pictures import Pictures, crop_regions, prepare_pictures
from megacm3.tokenizers.train_image import train_image_tokenizer
from tests.unit.data.makers import pairs, picture, write_tar

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "network.image_size=16", "network.channels=[8,16]", "network.layers_per_block=1", "network.middle_attention=false",
    "network.latent_channels=8", "network.codebook_size=32", "network.code_dim=8", "network.norm_groups=4",
    "train.batch=8", "train.lr=0.003", "train.warmup=2", "train.steps=6", "train.save_every=3", "quantizer.start=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    pixels = np.stack([prepare_image(open_image(picture(n)), 16) for n in range(20)])
    return Pictures(pixels, np.zeros((20, 8, 5), np.float32))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_it_learns_and_uses_its_codes(pictures, tmp_path):
    config = load_image_config(None, [*SMALL, "train.steps=60"])
    report = train_image_tokenizer(
        config, pictures, tmp_path / "t", job="a", held_out=Pictures(pictures.pixels[:4], pictures.regions[:4])
    )
    assert report["training"]["psnr"] > 13 and report["training"]["codes_used"] > 0.5
    assert report["held_out"]["pictures"] == 4
    assert json.loads((tmp_path / "t" / "report.json").read_text()) == report
    assert (tmp_path / "t" / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    manifest = read_manifest(tmp_path / "t", "image_tokenizer", verify="sha256")
    assert manifest.settings["image_size"] == 16 and manifest.settings["grid"] == [8, 8]
    # The frozen network finds the codes that training used.
    tokenizer = ImageTokenizer.load(tmp_path / "t")
    assert image_metrics.evaluate(tokenizer, pictures.pixels, np.arange(20))["psnr"] == report["training"]["psnr"]


@pytest.mark.parametrize("extra", [[], ["loss.adversarial=0.5", "loss.adversarial_start=3"]])
def test_a_stopped_run_continues_exactly(pictures, tmp_path, extra):
    if extra:
        extra = [*extra, "network.image_size=32"]
        pictures = Pictures(pictures.pixels.repeat(2, 1).repeat(2, 2), pictures.regions)
    config = load_image_config(None, [*SMALL, *extra])
    train_image_tokenizer(config, pictures, tmp_path / "straight", job="a")
    trainer = Trainer(config, pictures, tmp_path / "stopped.work")
    trainer.work.mkdir()
    for _ in range(4):
        trainer.train_step()
    trainer.save("a")
    train_image_tokenizer(config, pictures, tmp_path / "stopped", job="a")
    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


def test_state_of_another_job_is_refused(pictures, tmp_path):
    config = load_image_config(None, SMALL)
    trainer = Trainer(config, pictures, tmp_path / "t.work")
    trainer.save("a")
    with pytest.raises(DataError, match="other settings or inputs"):
        train_image_tokenizer(config, pictures, tmp_path / "t", job="b")


def test_dead_codes_come_back(pictures, tmp_path):
    def used(dead_below):
        overrides = [*SMALL, "quantizer.decay=0.5", "quantizer.start=0", f"quantizer.dead_below={dead_below}"]
        trainer = Trainer(load_image_config(None, overrides), pictures, tmp_path)
        trainer.train_step()
        # Codes 8.. are moved far away from any latent: nothing would ever choose them again.
        book = trainer.quantizer._codebook
        book.embed[:, 8:] += 1e4
        book.embed_avg[:, 8:] += 1e4
        for _ in range(30):
            trainer.train_step()
        with torch.no_grad():
            _, codes, _ = trainer.quantizer.eval()(trainer.network.encode(torch.randn(20, 3, 16, 16)).latents)
        return len(torch.unique(codes))

    assert used(0.0) <= 8 < used(0.1)


def test_batches_cover_each_epoch_and_ranks_split_them(pictures, tmp_path, monkeypatch):
    config = load_image_config(None, [*SMALL, "train.batch=4"])
    one = Trainer(config, pictures, tmp_path)
    seen = torch.cat([one.batch(step) for step in range(5)])
    assert sorted(p.numpy().tobytes() for p in seen) == sorted(p.tobytes() for p in pictures.pixels)
    halves = []
    for rank in "01":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        halves.append(Trainer(config, pictures, tmp_path).batch(3))
    assert {p.numpy().tobytes() for h in halves for p in h} == {p.numpy().tobytes() for p in one.batch(3)}
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="not divisible by 3 ranks"):
        Trainer(config, pictures, tmp_path)


def test_schedule_ends_at_steps_or_seconds(pictures, tmp_path):
    config = load_image_config(None, [*SMALL, "train.steps=100", "train.seconds=10", "train.warmup=10"])
    trainer = Trainer(config, pictures, tmp_path)
    assert trainer.rate() == pytest.approx(0.0003)
    trainer.step, trainer.elapsed = 50, 2.0
    assert trainer.progress() == 0.5
    trainer.elapsed = 10.5
    assert trainer.progress() == 1.0 and trainer.rate() == pytest.approx(0.003 * 0.05)


def test_adaptive_weight_balances_the_gradients():
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ours, theirs = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    assert float(adaptive_weight(ours, theirs, layer)) == pytest.approx(10, rel=1e-3)
    assert float(adaptive_weight(ours, theirs * 1e-9, layer)) == 1e4


def test_discriminator_learns_and_treats_pictures_alone():
    torch.manual_seed(0)
    network = PatchDiscriminator(base=16)
    real, fake = torch.ones(4, 3, 32, 32) * 0.5, torch.zeros(4, 3, 32, 32)
    assert torch.allclose(network(torch.cat([real, fake]))[:4], network(real), atol=1e-5)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    first = None
    for _ in range(15):
        loss = discriminator_loss(network(real), network(fake))
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first


def test_feature_distance_from_local_weights(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    distance = FeatureDistance(tmp_path / "resnet")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(distance(x, x)) == 0 and float(distance(x, -x)) > 0
    y = x.clone().requires_grad_()
    distance(x, y + 0.1).backward()
    assert y.grad.abs().sum() > 0 and not any(p.requires_grad for p in distance.parameters())
    with pytest.raises(ConfigError, match="perceptual_path"):
        FeatureDistance(tmp_path)


def test_feature_distance_reads_vgg16(tmp_path):
    from megacm3.tokenizers.image_losses import _Vgg16

    torch.save(_Vgg16().state_dict() | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    distance = FeatureDistance(tmp_path / "vgg16.pth")
    x = torch.rand(1, 3, 32, 32)
    assert len(distance.features(x)) == 5 and float(distance(x, -x)) > 0
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="not torchvision's VGG16"):
        FeatureDistance(tmp_path / "other.pth")


def test_metrics():
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    ours, theirs = torch.from_numpy(a), torch.from_numpy(b)
    assert image_metrics.psnr(ours, theirs) == pytest.approx(skimage.peak_signal_noise_ratio(a[0], b[0]), abs=1e-3)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    assert image_metrics.ssim(ours, theirs) == pytest.approx(
        skimage.structural_similarity(a[0], b[0], **options), abs=0.01
    )
    originals = torch.from_numpy(rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    assert image_metrics.nearest_picture_rate(originals[:3], originals, torch.arange(3)) == 1.0
    assert image_metrics.nearest_picture_rate(originals[:3], originals, torch.tensor([0, 2, 1])) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.chanels=[8]", "did you mean 'network.channels'"),
        ("network.image_size=50", "nearest: 48 or 56"),
        ("network.norm_groups=48", "not divisible by norm_groups"),
        ("loss.perceptual=1", "perceptual_path"),
        ("train.steps=0", "at least 1"),
        ("train.betas=[0.9]", "two numbers"),
        ("network.attention_levels=[4]", r"expected 0\.\.3"),
    ],
)
def test_strict_settings(override, message):
    with pytest.raises(ConfigError, match=message):
        load_image_config(None, [override])


@pytest.mark.parametrize(
    ("name", "parameters", "grid"), [("cm3leon", 66.9e6, 32), ("chameleon", 68.7e6, 32), ("quickstart", None, 6)]
)
def test_presets(name, parameters, grid):
    path = ROOT / "examples" / "configs" / f"image_tokenizer_{name}.yaml"
    if name != "quickstart":
        with pytest.raises(ConfigError, match=r"loss\.perceptual_path"):
            load_image_config(path)
    config = load_image_config(path, [f"loss.perceptual_path={path}"])
    assert config.network.image_size // 2 ** (len(config.network.channels) - 1) == grid
    with torch.device("meta"):
        network = build_network(config.network)
    if parameters:
        # taming's count leaves out nothing but the codebook's own 2.1M, which VQModel has too.
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.002)


def test_pictures_are_prepared_once(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 5))
    shards = find_shards(str(path))
    made = prepare_pictures(shards, 16, tmp_path / "work", job="a")
    assert made.pixels.shape == (5, 16, 16, 3) and not made.regions.any()
    assert np.array_equal(made.pixels[3], prepare_image(open_image(picture(3)), 16))
    before = (tmp_path / "work" / "pictures.u8").stat().st_mtime_ns
    prepare_pictures(shards, 16, tmp_path / "work", job="a")
    assert (tmp_path / "work" / "pictures.u8").stat().st_mtime_ns == before
    assert len(prepare_pictures(shards, 16, tmp_path / "work", job="b", most=2)) == 2
    write_tar(path, [*pairs(0, 3), ("b.png", b"garbage"), ("b.txt", b"x")])
    with pytest.raises(DataError, match=r"1 of 4 rows rejected \(1 unknown_format\)"):
        prepare_pictures(find_shards(str(path)), 16, tmp_path / "work", job="c")


def test_regions_follow_the_crop_and_weigh_pixels(tmp_path):
    # 200 x 100 becomes 32 x 16, then the middle 16 x 16: x loses 8.
    regions = crop_regions([[100, 0, 200, 50, 3.0], [0, 0, 60, 100]], (200, 100), 16)
    assert regions[0].tolist() == [8, 0, 16, 8, 3] and regions[1].tolist() == pytest.approx([0, 0, 1.6, 16, 1])
    assert not regions[2:].any() and not crop_regions(None, (5, 5), 16).any()
    for bad in ("face", [[1, 2, 3]], [[0, 0, 1, float("nan")]], 5):
        with pytest.raises(Reject, match="bad_regions"):
            crop_regions(bad, (200, 100), 16)
    config = load_image_config(None, [*SMALL, "loss.regions=2", "train.batch=1"])
    trainer = Trainer(config, Pictures(np.zeros((1, 16, 16, 3), np.uint8), regions[None]), tmp_path)
    weights = trainer.weights(0)
    assert weights.shape == (1, 1, 16, 16)
    assert weights[0, 0, 4, 12] == 7 and weights[0, 0, 12, 12] == 1 and weights[0, 0, 12, 0] == 3
