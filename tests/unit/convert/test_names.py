import pytest

from megacm3.checkpoint.boxes import whole
from megacm3.convert.configs import vocabulary_map
from megacm3.convert.names import export_kind, head_rows, names
from megacm3.errors import ConfigError
from megacm3.presets import PRESETS
from megacm3.resolve import load_config
from megacm3.tokenizers.vocabulary import Vocabulary


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_class(preset: str) -> None:
    config = load_config(None, [f"model.preset={preset}"])
    kind = export_kind(config.model)
    assert kind == {"cm3leon": "opt", "chameleon": "chameleon", "modern": "qwen3"}[config.model.family]
    table = names(kind, config.model)
    for column in ("logical", "hf"):
        values = [getattr(name, column) for name in table]
        assert len(values) == len(set(values))


def test_the_counts_of_parameters_are_the_presets_own() -> None:
    for preset, count in (("cm3leon_350m", 373_293_056), ("cm3leon_760m", 786_432_000), ("cm3leon_7b", 6_727_663_616)):
        model = load_config(None, [f"model.preset={preset}"]).model
        assert sum(whole(name.shape).numel for name in names("opt", model)) == count


@pytest.mark.parametrize(
    "override", ["model.activation=swiglu", "model.norm_order=swin", "model.norm_eps=1e-6", "model.kv_heads=2"]
)
def test_combinations_that_no_class_holds(override: str) -> None:
    config = load_config(None, ["model.preset=tiny_cm3leon", override])
    with pytest.raises(ConfigError, match=r"no Hugging Face class holds model\.norm = layernorm"):
        export_kind(config.model)


def test_llama_is_qwen_without_its_norms() -> None:
    plain = load_config(None, ["model.preset=tiny_modern", "model.qk_norm=none"]).model
    assert export_kind(plain) == "llama"
    assert not [name for name in names("llama", plain) if "q_norm" in name.hf]
    with pytest.raises(ConfigError, match=r"qk_norm_groups = 2"):
        export_kind(load_config(None, ["model.preset=tiny_modern", "model.qk_norm_groups=2"]).model)


def test_head_rows_are_those_of_the_layers() -> None:
    assert head_rows(1, 4) == [0, 0, 0, 0]
    assert head_rows(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert head_rows(4, 4) == [0, 1, 2, 3]


def test_a_map_that_is_not_monotone_keeps_its_pairs() -> None:
    """transformers' own table sorts ids and codes apart; ours goes by the names."""
    names_of = vocabulary_map(Vocabulary.chameleon(700, 32, 16))
    swapped = names_of | {"IMGIMGAZ": names_of["IMGIMGBZ"], "IMGIMGBZ": names_of["IMGIMGAZ"]}
    vocabulary = Vocabulary.chameleon(700, 32, 16, swapped)
    assert list(vocabulary.code_to_id[:3]) == [5, 4, 6]
    assert vocabulary_map(vocabulary) == swapped
