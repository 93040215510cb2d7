"""A resolved config from YAML and dotted overrides, strict about keys.

Order of precedence: the defaults of `config.py` < the preset < the YAML file < `key=value` overrides. What is resolved
is saved as `config.yaml` in the run's folder.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.rules import check


def field_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every leaf key below a config dataclass."""
    names = []
    for item in dataclasses.fields(schema):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names += field_names(item.type, f"{prefix}{item.name}.")
        else:
            names.append(f"{prefix}{item.name}")
    return names


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def check_keys(flat: dict[str, Any], schema: type, source: str) -> None:
    """Raise ConfigError for a key that `schema` does not have, naming the nearest one that it has."""
    known = field_names(schema)
    for key in flat:
        parts = key.split(".")
        if any(".".join(parts[:depth]) in known for depth in range(1, len(parts) + 1)):
            continue
        if any(name.startswith(key + ".") for name in known) and not flat[key]:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        near = near or [name for name in known if name.split(".")[-1] == parts[-1]]
        hint = (
            f"; did you mean '{near[0]}'?"
            if near
            else f"; sections are {', '.join(sorted({k.split('.')[0] for k in known}))}"
        )
        raise ConfigError(f"{source}: unknown key '{key}'{hint}")


def merge(schema: type, layers: list[tuple[str, dict[str, Any]]]) -> Any:
    """An instance of the dataclass `schema` from nested or dotted dicts, later ones over earlier ones.

    layers: (where it came from, values). Raises ConfigError for unknown keys and wrong types.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(schema)
    for source, values in layers:
        flat = _flatten(values)
        check_keys(flat, schema, source)
        for key, value in flat.items():
            try:
                OmegaConf.update(tree, key, value, force_add=False)
            except (OmegaConfBaseException, IndexError, ValueError) as fault:
                raise ConfigError(f"{source}: {key} = {value!r}: {str(fault).splitlines()[0]}") from fault
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as fault:
        raise ConfigError(str(fault).splitlines()[0]) from fault


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, not YAML or not a mapping."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise ConfigError(f"config {path} does not exist") from fault
    except OSError as fault:
        raise ConfigError(f"config {path} cannot be read: {fault.strerror}; expected a YAML file") from fault
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ConfigError(f"config {path} is not YAML: {str(fault).splitlines()[0]}") from fault
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds a {type(tree).__name__}; expected sections such as 'model:'")
    return tree


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["train.steps=10"]` -> `{"train.steps": 10}`, values read as YAML. Raises ConfigError for anything else."""
    import yaml

    flat = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"argument '{text}' is not key=value (for example train.steps=100)")
        try:
            flat[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as fault:
            raise ConfigError(f"override '{text}': the value is not YAML") from fault
        if isinstance(flat[key.strip()], str):
            flat[key.strip()] = _number(flat[key.strip()])
    return flat


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-4 as a string; a learning rate is meant.
    try:
        return float(text)
    except ValueError:
        return text


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The resolved config of a YAML file and dotted overrides. Raises ConfigError."""
    from megacm3.presets import preset

    given = read_yaml(path) if path else {}
    flat = parse_overrides(overrides or [])
    name = flat.get("model.preset", (given.get("model") or {}).get("preset", ""))
    if name and not isinstance(name, str):
        raise ConfigError(f"model.preset = {name}; expected the name of one in megacm3/presets.py")
    layers = [(f"preset {name}", preset(name))] if name else []
    layers += [(str(path), given), ("command line", flat)]
    config = merge(Config, _one_length(layers))
    check(config)
    return config


def _one_length(layers: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    # A later train.steps replaces an earlier train.tokens, and the other way round; both in one place is an error.
    flats = [(source, _flatten(values)) for source, values in layers]
    for index, (_, flat) in enumerate(flats):
        for key, other in (("train.steps", "train.tokens"), ("train.tokens", "train.steps")):
            if flat.get(key):
                for _, earlier in flats[:index]:
                    earlier.pop(other, None)
    return flats


def save_config(config: Config, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write the resolved config as YAML, with `extra` (such as library versions) under `resolved_with`."""
    import yaml

    from megacm3.files import new_file

    tree = dataclasses.asdict(config)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for key, value in (extra or {}).items():
        text += f"# {key}: {value}\n"
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
