"""Pretokenization: right pairs, the same bytes for any workers and after any kill, named rejects, clear refusals."""

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megacm3.data.executors import ExecutorOptions, running_job
from megacm3.data.images import open_image, prepare_image
from megacm3.data.pretokenize import PretokenizeOptions, pretokenize
from megacm3.data.store import Store, verify_store
from megacm3.data.units import UnitSettings
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_manifest
from megacm3.tokenizers.chameleon_text import train_chameleon
from megacm3.tokenizers.image import ImageTokenizer, save_image_tokenizer
from megacm3.tokenizers.image_config import NetworkConfig
from megacm3.tokenizers.image_network import build_network
from megacm3.tokenizers.text import TextTokenizer, save_chameleon, train_text_tokenizer
from tests.unit.data.makers import pairs, picture, write_tar

ROOT = Path(__file__).resolve().parents[3]
SMALL = NetworkConfig(
    image_size=32, channels=[8, 8, 16], layers_per_block=1, latent_channels=8, codebook_size=64, code_dim=8,
    norm_groups=4, middle_attention=False,
)  # fmt: skip


def image_tokenizer(folder, seed):
    torch.manual_seed(seed)
    network = build_network(SMALL)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    return save_image_tokenizer(network, SMALL.image_size, folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_text_tokenizer([f"caption number {n}" for n in range(50)], 300, folder / "text")
    image_tokenizer(folder / "image", 0)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for n in range(4):
        write_tar(folder / f"s-{n}.tar", pairs(10 * n, 6 + n))
    return folder


def options(tokenizers, inputs, output, **changes):
    given = {"workers": 1, "threads": 2, "settings": UnitSettings(batch=4)} | changes
    where = {name: given.pop(name) for name in ("executor", "workers", "threads", "device", "slurm") if name in given}
    given["where"] = ExecutorOptions(**where)
    text, image = str(tokenizers / "text"), str(tokenizers / "image")
    return PretokenizeOptions((str(inputs),), text, image, str(output), **given)


@pytest.fixture(scope="module")
def reference(tokenizers, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "store"
    report = pretokenize(options(tokenizers, shards / "*.tar", output))
    assert report.documents == 30 and not report.rejects
    assert os.listdir(output.parent) == ["store"]
    return output


def same(a, b):
    return (
        read_manifest(a, "store", verify="sha256").fingerprint == read_manifest(b, "store", verify="sha256").fingerprint
    )


def test_every_caption_keeps_its_picture(tokenizers, reference):
    text = TextTokenizer.load(tokenizers / "text")
    image = ImageTokenizer.load(tokenizers / "image")
    store = Store.open(reference)
    table = store.metadata().to_pylist()
    assert len(store) == 30 and verify_store(reference).image_segments == 30
    for row in table:
        number = int(row["key"])
        caption, codes = store.document(row["doc_id"]).segments
        assert text.decode(caption.tokens) == row["caption"] == f"caption number {number}"
        pixels = prepare_image(open_image(picture(number)), 32)
        # One picture alone may differ from a batch in the last bit of a distance, hence in a code now and then.
        assert (codes.tokens == image.encode(pixels[None].copy()).numpy()[0]).mean() > 0.9
        assert (row["width"], row["height"], row["images"]) == (64, 64, 1)
    assert [row["key"] for row in table] == sorted(row["key"] for row in table)
    assert store.inputs["image_tokenizer"] == image.fingerprint


@pytest.mark.parametrize("workers", [2, pytest.param(7, marks=pytest.mark.long)])
def test_same_bytes_for_any_workers_and_place(tokenizers, shards, reference, tmp_path, workers):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(shards)
    pretokenize(options(tokenizers, moved, tmp_path / "store", workers=workers, threads=workers))
    assert same(reference, tmp_path / "store")


@pytest.mark.long
def test_ray_gives_the_same_bytes(tokenizers, shards, reference, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the package ray (extra `ray`) is not installed")
    # Ray's workers start from a bare interpreter.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        pretokenize(options(tokenizers, shards / "*.tar", tmp_path / "store", executor="ray", workers=2))
    finally:
        ray.shutdown()
    assert same(reference, tmp_path / "store")


def command(tokenizers, inputs, output, *more):
    return [
        sys.executable, str(ROOT / "tools" / "pretokenize.py"), "--input", str(inputs), "--output", str(output),
        "--text-tokenizer", str(tokenizers / "text"), "--image-tokenizer", str(tokenizers / "image"),
        "--batch", "4", *more,
    ]  # fmt: skip


def test_killed_at_any_point_and_run_again(tokenizers, shards, reference, tmp_path):
    output, units = tmp_path / "store", tmp_path / "store.work" / "units"
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in shards.iterdir():
        (inputs / path.name).symlink_to(path)
    process = subprocess.Popen(
        command(tokenizers, inputs, output, "--workers", "1"), start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (units.is_dir() and any(not p.name.startswith(".") for p in units.iterdir())):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not output.exists():
        assert units.is_dir()
    pretokenize(options(tokenizers, inputs, output))
    assert same(reference, output) and not units.exists()


def test_a_killed_worker_is_an_error_not_a_wait(tokenizers, shards, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for n in range(60):
        (inputs / f"s-{n}.tar").symlink_to(shards / f"s-{n % 4}.tar")
    given = command(tokenizers, inputs, tmp_path / "store", "--workers", "2")
    process = subprocess.Popen(given, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        deadline, found = time.monotonic() + 60, []
        while not found:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
            found = list((tmp_path / "store.work" / "progress").glob("[!.]*"))
        # As the system does when memory is short.
        os.kill(int(found[0].name.rpartition("-")[2]), signal.SIGKILL)
        assert process.wait(timeout=20) == 3
        assert "a worker was killed" in process.stderr.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert pretokenize(options(tokenizers, inputs, tmp_path / "store")).documents == 450


def test_leftovers_and_false_marks_are_not_trusted(tokenizers, shards, reference, tmp_path):
    output, work = tmp_path / "store", tmp_path / "store.work"
    with pytest.raises(DataError, match="more than --max-reject-rate"):
        pretokenize(options(tokenizers, faulty(tmp_path), output))
    other = tmp_path / "other.work"
    work.rename(other)
    # A unit that was marked complete by the executor but whose part is not whole, and a half-written one.
    (work / "log" / "completions").mkdir(parents=True)
    (work / "log" / "completions" / "00000").touch()
    (work / "units" / "00001").mkdir(parents=True)
    (work / "units" / "00001" / "tokens.bin").write_bytes(b"half")
    (work / "units" / ".00002.abc").mkdir()
    (tmp_path / ".store.4321.tmp" / "tokens").mkdir(parents=True)
    pretokenize(options(tokenizers, shards, output))
    assert same(reference, output) and not work.exists() and not (tmp_path / ".store.4321.tmp").exists()


def faulty(tmp_path):
    members = pairs(0, 3)
    members += [("b1.png", b"garbage"), ("b1.txt", b"x"), ("b2.png", picture(1)), ("b2.txt", b"\xff\xfe")]
    members += [("b3.png", picture(1, size=8)), ("b3.txt", b"tiny"), *pairs(5, 2)]
    return write_tar(tmp_path / "faulty" / "a.tar", members)


def test_rejects_are_named_and_limited(tokenizers, tmp_path):
    path, output = faulty(tmp_path), tmp_path / "store"
    with pytest.raises(DataError, match=r"3 of 8 rows are rejected .* more than --max-reject-rate 0\.05"):
        pretokenize(options(tokenizers, path, output))
    assert not output.exists()
    listing = pq.read_table(tmp_path / "store.rejects.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in listing} == {
        "b1": "unknown_format", "b2": "invalid_utf8", "b3": "too_small",
    }  # fmt: skip
    report = pretokenize(options(tokenizers, path, output, max_reject_rate=0.5))
    assert report.documents == 5 and sum(report.rejects.values()) == 3 and report.rejects["too_small"] == 1
    store = Store.open(output)
    assert [row["key"] for row in store.metadata(["key"]).to_pylist()] == ["00000", "00001", "00002", "00005", "00006"]
    assert verify_store(output).rejects == 3


def test_one_damaged_shard_does_not_stop_the_others(tokenizers, shards, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in shards.iterdir():
        (inputs / path.name).write_bytes(path.read_bytes())
    whole = (inputs / "s-1.tar").read_bytes()
    (inputs / "s-1.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1 of 4 shards cannot be used: .*s-1\.tar is damaged"):
        pretokenize(options(tokenizers, inputs, tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    assert sorted(p.name for p in (tmp_path / "store.work" / "units").iterdir()) == ["00000", "00002", "00003"]
    before = [p.stat().st_ino for p in finished(tmp_path)]
    settings = UnitSettings(batch=4, allow_partial=True)
    with pytest.raises(DataError, match=r"more than --max-reject-rate"):
        given = options(tokenizers, inputs, tmp_path / "store", settings=settings, max_reject_rate=0.0)
        pretokenize(given)
    assert [p.stat().st_ino for p in finished(tmp_path) if "00001" not in str(p)] == before
    # What was taken of a damaged shard is not what a whole one gives.
    with pytest.raises(DataError, match="unfinished work made with allow_partial = True then, False now"):
        pretokenize(options(tokenizers, inputs, tmp_path / "store"))
    report = pretokenize(options(tokenizers, inputs, tmp_path / "store", settings=settings, max_reject_rate=0.2))
    assert report.rejects["damaged_shard"] == 1 and 23 < report.documents < 30


def finished(tmp_path):
    return sorted((tmp_path / "store.work" / "units").glob("*/tokens.bin"))


def test_a_repaired_shard_costs_that_shard_alone(tokenizers, shards, reference, tmp_path):
    inputs = tmp_path / "in"
    shutil.copytree(shards, inputs)
    whole = (inputs / "s-1.tar").read_bytes()
    (inputs / "s-1.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"run again after the repair"):
        pretokenize(options(tokenizers, inputs, tmp_path / "store"))
    before = [p.stat().st_ino for p in finished(tmp_path)]
    # A shard that is done already is another matter: its part would be of other data than the rest of the input.
    done = (inputs / "s-0.tar").read_bytes()
    write_tar(inputs / "s-0.tar", pairs(90, 6))
    with pytest.raises(DataError, match="unfinished work made with other input files"):
        pretokenize(options(tokenizers, inputs, tmp_path / "store"))
    (inputs / "s-0.tar").write_bytes(done)
    (inputs / "s-1.tar").write_bytes(whole)
    pretokenize(options(tokenizers, inputs, tmp_path / "store"))
    assert same(reference, tmp_path / "store")
    after = [(tmp_path / "store" / "tokens" / f"part-{n:05d}.bin").stat().st_ino for n in (0, 2, 3)]
    assert before == after


def test_finished_work_is_not_done_again(tokenizers, shards, reference, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*")}
    report = pretokenize(options(tokenizers, shards, reference))
    assert report.documents == 30 and report.seconds == 0
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*")}


def test_other_settings_inputs_or_tokenizers_are_refused(tokenizers, shards, reference, tmp_path):
    with pytest.raises(DataError, match="mode = crop then, pad now"):
        pretokenize(options(tokenizers, shards, reference, settings=UnitSettings(batch=4, mode="pad")))
    with pytest.raises(DataError, match="other input files"):
        pretokenize(options(tokenizers, shards / "s-0.tar", reference))
    other = tmp_path / "tokenizers"
    other.mkdir()
    (other / "text").symlink_to(tokenizers / "text")
    image_tokenizer(other / "image", 1)
    with pytest.raises(DataError, match="another image tokenizer"):
        pretokenize(options(other, shards, reference))


def test_overwrite_replaces_a_store_only(tokenizers, shards, tmp_path):
    output = tmp_path / "store"
    pretokenize(options(tokenizers, shards / "s-0.tar", output))
    assert pretokenize(options(tokenizers, shards / "s-1.tar", output, overwrite=True)).documents == 7
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dear.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="is no store"):
        pretokenize(options(tokenizers, shards, photos, overwrite=True))
    assert (photos / "dear.jpg").exists()


def test_text_only_and_interleaved(tokenizers, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    (tmp_path / "a.jsonl").write_text('{"text": "only text"}\n{"texts": ["one", null], "images": [null, "0.png"]}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a <image> b <image><image>", "images": ["0.png", "1.png", "2.png"]}\n')
    pretokenize(options(tokenizers, tmp_path / "*.jsonl", tmp_path / "store", settings=UnitSettings(batch=2)))
    store = Store.open(tmp_path / "store")
    kinds = [[kind for kind, _ in store.segment_lengths(n)] for n in range(3)]
    assert kinds == [[0], [0, 1], [0, 1, 0, 1, 1]]
    assert store.metadata(["images"])["images"].to_pylist() == [0, 1, 3]
    one, again = store.document(1).segments[1].tokens, store.document(2).segments[1].tokens
    assert (one == again).mean() > 0.9


def on_a_full_disk(given, answer):
    # A file size limit stands in for a full disk: the kernel refuses the write in the same way.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    try:
        pretokenize(given)
        answer.send("nothing")
    except Exception as fault:
        answer.send((type(fault).__name__, str(fault)))


def test_full_disk_is_a_clear_error(tokenizers, tmp_path):
    inputs = write_tar(tmp_path / "in" / "a.tar", pairs(0, 6))
    here, there = multiprocessing.Pipe()
    given = options(tokenizers, inputs, tmp_path / "store")
    child = multiprocessing.get_context("fork").Process(target=on_a_full_disk, args=(given, there))
    child.start()
    name, message = here.recv()
    child.join()
    assert name == "DataError" and "File too large" in message
    assert not (tmp_path / "store").exists()
    assert pretokenize(given).documents == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "spark"}, "--executor spark"),
        ({"max_reject_rate": 2.0}, "--max-reject-rate"),
        ({"settings": UnitSettings(mode="stretch")}, "--mode stretch"),
        ({"workers": -1}, "--workers"),
        ({"executor": "slurm"}, "partition"),
        ({"device": "cuda:7"}, "no GPU is visible"),
    ],
)
def test_bad_flags(tokenizers, shards, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        pretokenize(options(tokenizers, shards, tmp_path / "store", **changes))
    assert not (tmp_path / "store").exists()


SBATCH = """#!/bin/bash
# Runs a job script here and now, one array task after the other, as a Slurm of one node would.
script="${@: -1}"
echo "$@" >> "$SLURM_FAKE/calls"
cp "$script" "$SLURM_FAKE/$(wc -l < "$SLURM_FAKE/calls").sh"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if ! grep -q merge_stats "$script"; then
  for task in $(seq 0 "$tasks"); do
    RUN_OFFSET=0 SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" > "$SLURM_FAKE/task-$task.log" 2>&1
  done
fi
echo "Submitted batch job 42"
"""


@pytest.mark.long
def test_slurm(tokenizers, shards, reference, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',
        "squeue": "#!/bin/bash\ncat $SLURM_FAKE/queue\n",
    }
    answers["scontrol"] = "#!/bin/bash\necho here\n"
    for name, text in answers.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(tmp_path))
    given = {"executor": "slurm", "slurm": {"partition": "gpu", "account": "me", "time": "01:00:00"}, "workers": 3}
    report = pretokenize(options(tokenizers, shards / "*.tar", tmp_path / "store", **given))
    assert "submitted" in report.submitted and not (tmp_path / "store").exists()
    script = (tmp_path / "1.sh").read_text()
    for line in ("--partition=gpu", "--account=me", "--time=01:00:00", "--array=0-3%3"):
        assert f"#SBATCH {line}" in script, script
    (tmp_path / "queue").write_text("42 gpu pretokenize R\n")
    assert "42 is still" in pretokenize(options(tokenizers, shards / "*.tar", tmp_path / "store", **given)).submitted
    (tmp_path / "queue").write_text("")
    report = pretokenize(options(tokenizers, shards / "*.tar", tmp_path / "store", **given))
    assert report.documents == 30, (tmp_path / "task-0.log").read_text()
    assert same(reference, tmp_path / "store")


def test_two_runs_at_once_are_refused(tokenizers, shards, tmp_path):
    import fcntl

    work = tmp_path / "store.work"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is at work"):
            pretokenize(options(tokenizers, shards, tmp_path / "store"))


def test_a_run_that_waited_for_another_one_finds_its_store(tokenizers, shards, reference, tmp_path):
    import fcntl

    work, output = tmp_path / "store.work", tmp_path / "store"
    work.mkdir()
    with open(work / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(pretokenize, options(tokenizers, shards, output))
        time.sleep(1)
        shutil.copytree(reference, output)
        shutil.rmtree(work)
        fcntl.flock(lock, fcntl.LOCK_UN)
        report = waiting.result()
    assert report.documents == 30 and report.seconds == 0
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("answer", "there"),
    [
        ("echo 42 gpu pretokenize R", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1", True),
    ],
)
def test_a_job_is_gone_when_squeue_says_so_not_when_squeue_fails(tmp_path, monkeypatch, answer, there):
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "submitted.json").write_text('{"job": 42}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert running_job(tmp_path) == ("42" if there else None)


def test_bad_folders(tokenizers, shards, tmp_path):
    with pytest.raises(DataError, match="matches no file"):
        pretokenize(options(tokenizers, tmp_path / "*.tar", tmp_path / "store"))
    with pytest.raises(DataError, match="is of kind 'image_tokenizer'; expected 'text_tokenizer'"):
        wrong = PretokenizeOptions(
            (str(shards),), str(tokenizers / "image"), str(tokenizers / "image"), str(tmp_path / "s")
        )
        pretokenize(wrong)
    assert list(tmp_path.iterdir()) == []


def test_alpha_is_on_white_in_the_store(tokenizers, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(buffer, "PNG")
    write_tar(tmp_path / "a.tar", [("0.png", buffer.getvalue()), ("0.txt", b"nothing")])
    pretokenize(options(tokenizers, tmp_path / "a.tar", tmp_path / "store"))
    white = ImageTokenizer.load(tokenizers / "image").encode(np.full((1, 32, 32, 3), 255, np.uint8))
    assert Store.open(tmp_path / "store").document(0).segments[1].tokens.tolist() == white[0].tolist()


def test_specials_in_a_caption_stay_text(tokenizers, tmp_path):
    caption = "a <break> b </s><pad><sentinel:0> <eoss>"
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.txt", caption.encode())])
    pretokenize(options(tokenizers, tmp_path / "a.tar", tmp_path / "store"))
    store = Store.open(tmp_path / "store")
    ids = store.document(0).segments[0].tokens
    assert store.vocabulary().is_text(ids).all()
    assert TextTokenizer.load(tokenizers / "text").decode(ids) == caption


def test_chameleon_s_table_goes_into_the_store(tokenizers, tmp_path):
    text = train_chameleon([f"caption number {n}" for n in range(9)], 9000)
    save_chameleon(text, 65536, tmp_path / "text", settings={}, inputs={}, overwrite=False)
    torch.manual_seed(0)
    network = build_network(NetworkConfig(**vars(SMALL) | {"codebook_size": 8192}))
    save_image_tokenizer(network, 32, tmp_path / "image")
    write_tar(tmp_path / "a.tar", pairs(0, 2))
    pretokenize(options(tmp_path, tmp_path / "a.tar", tmp_path / "store"))
    store = Store.open(tmp_path / "store")
    vocabulary = store.vocabulary()
    assert vocabulary.family == "chameleon" and vocabulary.boi == 8197 and vocabulary.image_tokens == 64
    assert (
        vocabulary.is_text(store.document(0).segments[0].tokens).all()
        and verify_store(tmp_path / "store").documents == 2
    )
