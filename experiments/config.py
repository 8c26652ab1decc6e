"""Typed configuration: strict loading from YAML and from `key=value` overrides.

Every problem is a `ConfigError` whose message is one line naming the key, with near matches.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(Exception):
    """A mistake of the user: printed as one line, exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


@dataclasses.dataclass(frozen=True)
class Component:
    """A thing built by name, with the keywords that stand beside the name."""

    name: str
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from; `root` is relative to the current folder."""

    name: Literal["digits", "mnist", "cifar10", "folder"]
    root: str = "data"
    download: bool = False


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up of the learning rate, then its decay to zero at the last step."""

    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "none"] = "none"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a training run; `dtype` is that of the model, data stay as they are."""

    dataset: DatasetConfig
    model: Component
    optimizer: Component
    steps: int
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: int = 128
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    run_dir: str | None = None
    eval_every: int = 100
    checkpoint_every: int = 100

    def to_dict(self) -> dict[str, Any]:
        """Returns the nested mapping that loads back to this configuration."""
        plain = dataclasses.asdict(self)
        for key in ("model", "optimizer"):
            component: Component = getattr(self, key)
            plain[key] = {"name": component.name, **component.keywords}
        return plain


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (1e-3 is a number, `no` and dates are text), no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given twice")
        return super().construct_mapping(node, deep)


# A new table: the inherited one belongs to SafeLoader, for everybody.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_value(text: str) -> Any:
    """Reads one YAML value such as `1e-3`, `true` or `[0.9, 0.99]`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the value {text!r}: {error}") from error


def near_matches(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'a'?" or "; choose from ..." for an error message."""
    names = sorted(known)
    # Compared in lower case, so that 'adam' finds 'Adam'.
    by_lower = {name.lower(): name for name in names}
    close = [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)]
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    if len(names) > 30:
        return ""
    return f"; choose from {', '.join(names)}" if names else "; it takes no keys"


def _describe(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _load_value(kind: Any, value: Any, key: str) -> Any:
    """Checks `value` against one type annotation and returns it, converted where that is exact."""
    if kind is Component:
        return load_component(value, key)
    if dataclasses.is_dataclass(kind):
        return load_section(typing.cast(type, kind), value, key)
    if typing.get_origin(kind) is dict:
        item_kind = typing.get_args(kind)[1]
        return {
            name: _load_value(item_kind, item, f"{key}.{name}") for name, item in _check_mapping(value, key).items()
        }
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {_describe(value)}")
        (item_kind,) = typing.get_args(kind)
        return [_load_value(item_kind, item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(kind, types.UnionType):  # the only one: str | None
        return None if value is None else _load_value(str, value, key)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            close = near_matches(str(value), choices)
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {_describe(value)}{_only_near(close)}")
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    # bool is a subclass of int, so the exact type is compared.
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(f"{key} must be {names[kind]}, got {_describe(value)}")
    return value


def _only_near(text: str) -> str:
    return text if text.startswith("; did") else ""


def _check_mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key or 'the configuration'} must be a section of keys, got {_describe(value)}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"key {name!r} of {key or 'the configuration'} must be text")
    return value


def load_component(value: Any, key: str) -> Component:
    """Builds a `Component` from a mapping with a `name`; `key` is its place in the file, for messages."""
    section = _check_mapping(value, key)
    if "name" not in section:
        raise ConfigError(f"missing key '{key}.name'")
    keywords = {name: item for name, item in section.items() if name != "name"}
    return Component(_load_value(str, section["name"], f"{key}.name"), keywords)


def load_section(section_type: type, value: Any, key: str) -> Any:
    """Builds the dataclass `section_type` from a mapping; `key` is its place in the file, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a wrong type.
    """
    section = _check_mapping(value, key)
    prefix = f"{key}." if key else ""
    hints = typing.get_type_hints(section_type)
    for name in section:
        if name not in hints:
            raise ConfigError(f"unknown key '{prefix}{name}'{near_matches(name, hints)}")
    for field in dataclasses.fields(section_type):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and field.name not in section:
            raise ConfigError(f"missing key '{prefix}{field.name}'")
    return section_type(**{name: _load_value(hints[name], item, prefix + name) for name, item in section.items()})


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """Builds a `Config` from a nested mapping.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value out of bounds.
    """
    config: Config = load_section(Config, raw, "")
    for key, low in (("steps", 1), ("batch_size", 1), ("eval_every", 1), ("checkpoint_every", 1), ("seed", 0)):
        value = getattr(config, key)
        if not low <= value < 2**63:
            raise ConfigError(f"{key} must be at least {low} (and below 2**63), got {value}")
    warmup = config.schedule.warmup_steps
    if not 0 <= warmup <= config.steps:
        raise ConfigError(f"schedule.warmup_steps must be between 0 and steps ({config.steps}), got {warmup}; set both")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        siblings = [str(item) for item in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = _only_near(near_matches(str(path), siblings))
        raise ConfigError(f"there is no configuration file {path}{hint}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {_describe(raw)}")
    return raw


def split_override(text: str) -> tuple[str, str]:
    """Splits `key=value`; dots in the key lead into sections."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(f"cannot read the argument {text!r}: write key=value, for example optimizer.lr=0.01")
    return key, value


def _is_text_key(path: Sequence[str]) -> bool:
    """Whether the key holds text, so that `run_dir=7` on the command line means the folder "7"."""
    kind: Any = Config
    for name in path:
        if kind is Component:
            return name == "name"
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind is str or isinstance(kind, types.UnionType) or typing.get_origin(kind) is Literal


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of the nested mapping with every `key=value` set in it."""
    result = {key: dict(item) if isinstance(item, Mapping) else item for key, item in raw.items()}
    for override in overrides:
        key, text = split_override(override)
        *sections, leaf = path = key.split(".")
        target = result
        for depth, name in enumerate(sections):
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"unknown key '{key}': '{'.'.join(path[: depth + 1])}' is not a section")
        is_text = _is_text_key(path) and text not in ("", "null", "~")
        target[leaf] = text if is_text else parse_value(text)
    return result


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Loads a YAML file and sets the overrides; the file must be valid by itself."""
    raw = read_yaml(path)
    try:
        config = config_from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not overrides:
        return config
    return config_from_dict(apply_overrides(config.to_dict(), overrides))
