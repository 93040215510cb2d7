"""The image tokenizer's job: made once, found done, refused when asked for something else, stopped and continued."""

import os
import signal
import threading
import time

import pytest

from megacm3.errors import ConfigError, DataError, Stopped
from megacm3.tokenizers.image_config import load_image_config
from megacm3.tokenizers.image_job import run_job
from tests.unit.data.makers import pairs, write_tar

SMALL = [
    "network.image_size=16", "network.channels=[8,8]", "network.layers_per_block=1", "network.middle_attention=false",
    "network.latent_channels=8", "network.codebook_size=16", "network.code_dim=4", "network.norm_groups=4",
    "train.batch=4", "train.steps=3", "quantizer.start=1",
]  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    return [str(write_tar(tmp_path / "in" / "a.tar", pairs(0, 8)))]


def test_done_once(inputs, tmp_path):
    config, output = load_image_config(None, SMALL), tmp_path / "tokenizer"
    report = run_job(config, inputs, output, held_out=inputs)
    assert report["steps"] == 3 and "finished_before" not in report and report["held_out"]["pictures"] == 8
    assert sorted(os.listdir(tmp_path)) == ["in", "tokenizer"]
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run_job(load_image_config(None, [*SMALL, "train.threads=1"]), inputs, output)["finished_before"]
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def test_other_settings_or_pictures_are_refused(inputs, tmp_path):
    config, output = load_image_config(None, SMALL), tmp_path / "tokenizer"
    run_job(config, inputs, output)
    other = load_image_config(None, [*SMALL, "train.steps=4"])
    with pytest.raises(DataError, match="other pictures or settings; give another --output, or --overwrite"):
        run_job(other, inputs, output)
    assert run_job(other, inputs, output, overwrite=True)["steps"] == 4
    write_tar(tmp_path / "in" / "a.tar", pairs(1, 8))
    with pytest.raises(DataError, match="other pictures or settings"):
        run_job(other, inputs, output)


def test_pictures_of_other_limits_are_made_anew(inputs, tmp_path):
    output = tmp_path / "tokenizer"
    with pytest.raises(ConfigError, match="GPU"):
        run_job(load_image_config(None, [*SMALL, "train.device=cuda"]), inputs, output)
    assert (tmp_path / "tokenizer.work" / "training" / "pictures.json").is_file()
    with pytest.raises(DataError, match=r"8 of 8 rows rejected \(8 too_small\)"):
        run_job(load_image_config(None, SMALL), inputs, output, min_side=128)


def test_ctrl_c_keeps_the_state(inputs, tmp_path):
    config, output = load_image_config(None, [*SMALL, "train.steps=100000"]), tmp_path / "tokenizer"

    def press():
        while not (tmp_path / "tokenizer.work" / "training" / "pictures.json").is_file():
            time.sleep(0.01)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(Stopped, match=r"stopped after step \d+; run the same command again"):
        run_job(config, inputs, output)
    assert (tmp_path / "tokenizer.work" / "state.pt").is_file() and not output.exists()
    with pytest.raises(DataError, match="belongs to a run with other settings"):
        run_job(load_image_config(None, SMALL), inputs, output)
    assert run_job(load_image_config(None, SMALL), inputs, output, overwrite=True)["steps"] == 3


def test_bad_inputs(inputs, tmp_path):
    config = load_image_config(None, SMALL)
    with pytest.raises(DataError, match="matches no file"):
        run_job(config, [str(tmp_path / "none" / "*.tar")], tmp_path / "t")
    with pytest.raises(DataError, match="rows rejected"):
        run_job(config, inputs, tmp_path / "t", min_side=100)
    assert not (tmp_path / "t").exists()
