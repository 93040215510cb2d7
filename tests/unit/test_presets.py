"""Presets: parameter counts of the real networks, the published numbers, and a source beside every number."""

import ast
import inspect
import math
import tokenize
from pathlib import Path

import pytest
import torch

from megacm3 import presets
from megacm3.planning.counts import logical_shapes, parameters
from megacm3.resolve import load_config

COUNTS = {
    "cm3leon_350m": 373_293_056,
    "cm3leon_760m": 786_432_000,
    "cm3leon_7b": 6_727_663_616,
    "chameleon_7b": 7_013_158_912,
    "chameleon_34b": 34_293_448_704,
    "modern_1b": 1_241_583_616,
    "modern_7b": 6_207_844_352,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    assert parameters(load_config(None, [f"model.preset={name}"]).model) == COUNTS[name]


def test_counts_are_those_of_the_papers() -> None:
    """Chameleon's tables say 7B and 34B; with the released table of 65,536 ids these are 7.01 and 34.29."""
    assert round(COUNTS["chameleon_7b"] / 1e9, 2) == 7.01
    assert round(COUNTS["chameleon_34b"] / 1e9, 2) == 34.29
    # By hand: a tied table, 4,096 positions, and 12 h^2 a layer.
    for name, layers, hidden in (("cm3leon_350m", 24, 1024), ("cm3leon_760m", 24, 1536), ("cm3leon_7b", 32, 4096)):
        assert COUNTS[name] == (65536 + 4096) * hidden + 12 * layers * hidden**2


@pytest.mark.parametrize("name", [*COUNTS, "tiny_cm3leon", "tiny_chameleon_34b", "tiny_modern"])
def test_the_real_network_has_these_tensors(name: str) -> None:
    """Built by the trainer's own code on the meta device."""
    from megacm3.model.loss import LossState
    from megacm3.model.stages import Network, list_stages
    from megacm3.parallel.context import build_context
    from megacm3.parallel.cpu import prepare, pretending
    from megacm3.parallel.dryrun import META, fake_world
    from megacm3.parallel.parts import named_parts

    prepare(torch.device("cpu"))
    config = load_config(None, [f"model.preset={name}"])
    with pretending(META), fake_world(1, 0):
        kinds = torch.zeros(config.model.vocab_size, dtype=torch.uint8, device="cpu")
        network = Network(list_stages(config, build_context(config, META), kinds, LossState()))
    assert all(parameter.is_meta for parameter in network.parameters())
    found = {part.name: part.global_shape for _, part in named_parts(network)}
    assert found == logical_shapes(config.model)
    if name in COUNTS:
        assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[name]
        assert sum(math.prod(shape) for shape in found.values()) == COUNTS[name]


def test_published_shapes() -> None:
    """CM3Leon table 3; Chameleon table 1 and the released files."""
    shapes = {name: load_config(None, [f"model.preset={name}"]) for name in COUNTS}

    def shape(name: str) -> tuple[int, ...]:
        model = shapes[name].model
        return model.layers, model.hidden_size, model.heads, model.kv_heads, model.ffn_size

    assert shape("cm3leon_350m") == (24, 1024, 16, 16, 4096)
    assert shape("cm3leon_760m") == (24, 1536, 16, 16, 6144)
    assert shape("cm3leon_7b") == (32, 4096, 32, 32, 16384)
    assert shape("chameleon_7b") == (32, 4096, 32, 32, 11008)
    assert shape("chameleon_34b") == (48, 8192, 64, 8, 22016)
    for name, config in shapes.items():
        model, tokens = config.model, config.train.global_batch * config.model.sequence_length
        assert (model.vocab_size, model.sequence_length) == (65536, 4096)
        assert tokens == (3 * 2**22 if name == "chameleon_34b" else 2**23)
    for name in ("cm3leon_350m", "cm3leon_760m", "cm3leon_7b"):
        model = shapes[name].model
        assert (model.norm, model.norm_order, model.activation, model.positions) == (
            "layernorm",
            "pre",
            "relu",
            "learned",
        )
        assert (model.qk_norm, model.tied, model.dropout, model.init_residual) == ("none", True, 0.0, "zero")
        assert (model.init_std, model.init_positions_std) == (0.006, 0.0002)
        assert shapes[name].objective.z_loss == 0
    seven, big = shapes["chameleon_7b"], shapes["chameleon_34b"]
    assert (seven.model.norm_order, seven.model.dropout) == ("pre", 0.1)
    assert (big.model.norm_order, big.model.dropout) == ("swin", 0.0)
    for config in (seven, big):
        model = config.model
        assert (model.norm, model.activation, model.positions) == ("rmsnorm", "swiglu", "rope")
        assert (model.qk_norm, model.tied, model.rope_theta) == ("layernorm", False, 10000.0)
        assert (config.objective.z_loss, config.optimizer.eps, config.data.rotation) == (1e-5, 1e-5, 0.5)


def test_every_number_names_its_source() -> None:
    """A line of presets.py with a number has a comment with a source, "inferred" or "our choice"; twins are ours."""
    path = Path(presets.__file__)
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    twins = {line for function in (presets._twin, *_twins()) for line in _lines(function)}
    bare = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.lineno not in twins:
            comment = comments.get(node.lineno, "")
            if not any(mark in comment for mark in ("[", "inferred", "our choice")):
                bare.append(f"line {node.lineno}: {node.value}")
    assert not bare, bare


def _twins() -> list[object]:
    return [function for name, function in presets.PRESETS.items() if name.startswith("tiny_")]


def _lines(function: object) -> range:
    source, first = inspect.getsourcelines(function)  # type: ignore[arg-type]
    return range(first, first + len(source))
