"""What must be refused, with the tensor's name, and nothing written."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megacm3.convert.to_hf import Export, to_hf
from megacm3.errors import CheckpointError, ConfigError, DataError
from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers.checkpoints import with_vocabulary
from tests.unit.convert.conftest import import_hf

Folders = Callable[[str], Path]


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path, tmp_path: Path) -> Path:
    """The same weights in several shards, with their index."""
    return to_hf(Export.of(import_hf(folder, tmp_path / "whole")), tmp_path / "sharded", shard_bytes=20_000)


def refused(folder: Path, tmp_path: Path, *told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_hf(folder, tmp_path / "out")
    assert all(text in str(caught.value) for text in told), caught.value
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_missing_folders_and_files(copy: Folders, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "nowhere does not exist")
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path, "neither model.safetensors nor", "pytorch_model.bin is a pickle")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "config.json is not JSON")


def test_a_truncated_shard(copy: Folders, tmp_path: Path) -> None:
    file = copy("llama") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refused(
        file.parent, tmp_path, "is cut off: tensor ", f"the file has {len(data) - 9 - struct.unpack('<Q', data[:8])[0]}"
    )
    file.write_bytes(data[:100])
    refused(file.parent, tmp_path, "is not a whole safetensors file")


def test_index_paths_outside_the_folder(copy: Folders, tmp_path: Path) -> None:
    folder = sharded(copy("llama"), tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for wrong in ("../whole/x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "x.bin", 7):
        index["weight_map"]["model.norm.weight"] = wrong
        path.write_text(json.dumps(index))
        refused(folder, tmp_path, "tensor model.norm.weight lies in", "expected a file of this folder")


def test_swapped_missing_and_half_written_shards(copy: Folders, tmp_path: Path) -> None:
    folder = sharded(copy("llama"), tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = min(name for name, file in names.items() if file == first.name)
    first.rename(folder / "spare")
    refused(folder, tmp_path, f"{first} is missing; model.safetensors.index.json says that it holds {held}")
    second.rename(first)
    (folder / "spare").rename(second)
    refused(folder, tmp_path, f"{first} does not hold {held}, which model.safetensors.index.json says lies in it")


def test_overlapping_offsets(copy: Folders, tmp_path: Path) -> None:
    file = copy("llama") / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    a, b = [name for name in header if name.endswith("mlp.up_proj.weight")][:2]
    header[b]["data_offsets"] = header[a]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])
    assert len(text) <= length
    refused(file.parent, tmp_path, ".mlp.up_proj.weight begins at byte", "it overlaps the tensor before it")


@pytest.mark.parametrize("kind", ["chameleon", "qwen3"])
def test_missing_norms_of_queries_and_keys(kind: str, copy: Folders, tmp_path: Path) -> None:
    """transformers loads such a folder with norms of one, and only logs it."""
    folder = copy(kind)
    change_tensors(folder, lambda values: values.pop("model.layers.1.self_attn.k_norm.weight"))
    refused(folder, tmp_path, "lacks model.layers.1.self_attn.k_norm.weight")


def test_tensors_too_many_or_of_another_shape(copy: Folders, tmp_path: Path) -> None:
    folder = copy("llama")
    change_tensors(
        folder, lambda values: values.update({"model.layers.0.adapter.weight": values["model.norm.weight"].clone()})
    )
    refused(folder, tmp_path, "holds model.layers.0.adapter.weight", "no place")
    folder = copy("opt")
    change_config(folder, max_position_embeddings=95)
    refused(folder, tmp_path, "model.decoder.embed_positions.weight has shape [98, 32]; config.json asks for [97, 32]")


def test_mixed_dtypes(copy: Folders, tmp_path: Path) -> None:
    folder = copy("llama")
    change_tensors(folder, lambda values: values.update({"model.norm.weight": values["model.norm.weight"].bfloat16()}))
    refused(folder, tmp_path, "mixes dtypes", "model.norm.weight is BF16")


def test_image_ids_that_do_not_rise_with_the_codes(copy: Folders, tmp_path: Path) -> None:
    """transformers' class would take one code for the other, in silence."""
    folder = copy("chameleon")
    native = import_hf(folder, tmp_path / "native")
    ids = json.loads((folder / "config.json").read_text())["vocabulary_map"]
    swapped = ids | {"IMGIMGHZ": ids["IMGIMGIZ"], "IMGIMGIZ": ids["IMGIMGHZ"]}
    change_config(folder, vocabulary_map=swapped)
    refused(folder, tmp_path, "IMGIMGHZ has id 12 and IMGIMGIZ has 11", "ids that rise with the codes")
    with_vocabulary(native, Vocabulary.chameleon(700, 32, 16, swapped))
    with pytest.raises(CheckpointError, match="IMGIMGHZ has id 12 and IMGIMGIZ has 11"):
        Export.of(native)


@pytest.mark.parametrize(
    "kind, fields, told",
    [
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral'; expected one of opt, llama, qwen3, chameleon"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ("llama", {"attention_bias": True}, "attention_bias is True; these layers have only False"),
        ("llama", {"head_dim": 16}, "head_dim is 16; these layers have only 8"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_attention_heads is 4, which is no multiple of num_key_value_heads 3",
        ),
        ("opt", {"enable_bias": True}, "enable_bias is True"),
        ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("chameleon", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
    ],
)
def test_settings_that_the_layers_lack(
    kind: str, fields: dict[str, Any], told: str, copy: Folders, tmp_path: Path
) -> None:
    folder = copy(kind)
    change_config(folder, **fields)
    refused(folder, tmp_path, "config.json", told)


def test_layouts_that_the_model_lacks(copy: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 4 is more than model\.kv_heads = 2"):
        import_hf(copy("llama"), tmp_path / "out", 4, 1)
    assert not (tmp_path / "out").exists()


def test_half_written_checkpoints_and_taken_outputs(copy: Folders, tmp_path: Path) -> None:
    native = import_hf(copy("llama"), tmp_path / "native")
    with pytest.raises(DataError, match="exists already"):
        to_hf(Export.of(native), native)
    with pytest.raises(ConfigError, match="--dtype int8; expected one of float32, bfloat16, float16"):
        Export.of(native, "int8")
    (native / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no valid checkpoint step"):
        Export.of(native)


KILLED = """
import os, signal, sys
from megacm3.convert import to_hf as module
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
module._write_configs = killed
module.to_hf(module.Export.of(sys.argv[1]), sys.argv[2], replace=True)
"""


def test_a_killed_export_leaves_the_old_one_whole(copy: Folders, tmp_path: Path) -> None:
    """Killed with the weights written and no config yet: what lies there is refused by name, and the next run works."""
    native, output = import_hf(copy("llama"), tmp_path / "native"), tmp_path / "hf"
    to_hf(Export.of(native), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(native), str(output)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (half,) = tmp_path.glob(".hf.*.tmp")
    assert (half / "model.safetensors").is_file()
    refused(half, tmp_path, "config.json does not exist")
    to_hf(Export.of(native), output, replace=True)
    assert {path.name for path in output.iterdir()} == before.keys()
