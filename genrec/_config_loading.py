"""From dataclasses, YAML files and `key=value` words to one checked config, its help and its reference page."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import genrec

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A config can't be read, or a key or value in it is wrong. The message names the key and where it stands."""


def config_directory() -> Path:
    """The folder of the shipped configs: `recipes/` of a checkout, else the package's own copy."""
    package = Path(genrec.__file__).parent
    checkout = package.parent / "recipes"
    return (
        checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "recipes/configs"
    )


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config."""
    return {path.stem: path for path in sorted(config_directory().glob("*.yaml"))}


def find_config(name: str, beside: Path | None = None) -> Path:
    """The file of a config given by its path or by the name of a shipped one.

    Args:
        name: For example "ranking_ml100k" or "my/config.yaml".
        beside: A folder in which paths are looked for first.

    Raises:
        ConfigError: There is none; the message lists the shipped ones.
    """
    for path in ([beside / name] if beside else []) + [Path(name).expanduser()]:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    known = shipped_configs()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"No config '{name}'.{hint} It is a .yaml file's path or one of: {', '.join(known)}.")


def load_config(schema: type[Schema], config: str | Path | None = None, overrides: Sequence[str] = ()) -> Schema:
    """The config of `schema`, then a YAML file with those that it is based on, then `key=value` words.

    Args:
        schema: A dataclass.
        config: Name of a shipped config or path of a YAML file; None for the schema's defaults.
        overrides: Words such as "trainer.max_epochs=3".

    Raises:
        ConfigError: Unknown keys, wrong types, no such file.
    """
    layers: list[tuple[str, DictConfig]] = []
    if config is not None:
        layers += _read_with_bases(find_config(str(config)))
    layers.append(("the command line", _read_overrides(overrides)))
    merged = OmegaConf.structured(schema)
    for source, layer in layers:
        _check_keys(schema, typing.cast(dict, OmegaConf.to_container(layer, resolve=False)), source)
        merged = _merge(schema, merged, layer, source)
    try:
        return typing.cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"The config can't be resolved: {_first_line(error)}.") from error


def to_yaml(config: Any) -> str:
    """A config as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its `base:` leads back to itself.")
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected `key: value` lines at its top.")
    base = layer.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must be the name or path of one config.")
    below = _read_with_bases(find_config(base, path.parent), (*seen, path.resolve())) if base else []
    return [*below, (str(path), layer)]


def _read_overrides(words: Sequence[str]) -> DictConfig:
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(
                f"Can't read '{word}': write key=value without dashes or spaces, e.g. trainer.max_epochs=3."
            )
    try:
        return OmegaConf.from_dotlist(list(words))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"Can't read the command line: {_first_line(error)}.") from error


def _check_keys(schema: type, layer: Mapping[Any, Any], source: str, prefix: str = "") -> None:
    """Raise on the first key that the schema doesn't have, with the nearest one that it has."""
    known = _field_types(schema)
    for key in layer:
        if key not in known:
            raise ConfigError(_unknown_key(f"{prefix}{key}", known, prefix, source))
        if is_dataclass(known[key]) and isinstance(layer[key], Mapping):
            _check_keys(typing.cast(type, known[key]), layer[key], source, f"{prefix}{key}.")


def _unknown_key(key: str, known: Mapping[str, Any], prefix: str, source: str) -> str:
    close = difflib.get_close_matches(key.removeprefix(prefix), known, n=1)
    hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
    return f"Unknown key '{key}' in {source}.{hint} Keys there: {', '.join(prefix + name for name in known)}."


def _merge(schema: type, config: Any, layer: DictConfig, source: str) -> Any:
    try:
        return OmegaConf.merge(config, layer)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or _culprit(config, layer)
        wanted = next((type_name(field.type) for field in list_fields(schema) if field.key == key), "a section")
        raise ConfigError(f"Wrong value for '{key}' in {source}: {_first_line(error)}. Expected: {wanted}.") from error


def _culprit(config: Any, layer: DictConfig, prefix: str = "") -> str:
    """The key at which a merge fails, where OmegaConf doesn't name it."""
    for key in map(str, layer):
        inner = layer[key]
        if isinstance(inner, DictConfig) and isinstance(config[key], DictConfig):
            if found := _culprit(config[key], inner, f"{prefix}{key}."):
                return found
        else:
            try:
                OmegaConf.merge(config, OmegaConf.create({key: inner}))
            except (OmegaConfBaseException, TypeError, ValueError):
                return f"{prefix}{key}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")


@dataclass(frozen=True)
class ConfigField:
    """A leaf of a schema: its dotted key, type, default or present value, and documentation."""

    key: str
    type: Any
    value: Any
    doc: str


def list_fields(schema: Any, prefix: str = "") -> Iterator[ConfigField]:
    """Every leaf of a config dataclass, or of an instance of one, in order.

    Raises:
        TypeError: A field has no line under `Args:` in its class's docstring.
    """
    instance = schema() if isinstance(schema, type) else schema
    docs = field_docs(type(instance))
    for name, kind in _field_types(type(instance)).items():
        value = getattr(instance, name)
        if is_dataclass(value):
            yield from list_fields(value, f"{prefix}{name}.")
            continue
        if name not in docs:
            raise TypeError(f"{type(instance).__name__}.{name} has no line under `Args:` in the class's docstring.")
        yield ConfigField(prefix + name, kind, value, docs[name])


def _field_types(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


def field_docs(schema: type) -> dict[str, str]:
    """Field -> its text under `Args:` in the docstrings of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, flags=re.M):
            docs[name] = " ".join(text.split())
    return docs


def type_name(kind: Any) -> str:
    """A type as a user writes its values: `int`, `number | null`, `hstu | sasrec`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return "[" + ", ".join(type_name(argument) for argument in arguments) + "]"
    if origin is list:
        return f"[{type_name(arguments[0])}, ...]"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    return {type(None): "null", Any: "any", int: "int", float: "float", str: "str", bool: "bool"}.get(kind, str(kind))


def value_text(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def help_text(config: Any, usage: str, description: str) -> str:
    """What `--help` prints: how to call, the shipped configs, and every key with its value and meaning."""
    names = "\n".join(f"  {name:24}{_headline(path)}" for name, path in shipped_configs().items())
    lines = [f"usage: {usage}", "", description, "", "shipped configs:", names, "", "keys, with their values here:"]
    section = ""
    for field in list_fields(config):
        head = field.key.rpartition(".")[0]
        if head != section:
            section = head
            lines.append("")
        lines.append(f"  {field.key}={value_text(field.value)}   ({type_name(field.type)})")
        lines += textwrap.wrap(field.doc, 104, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _headline(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def reference_page(schemas: Mapping[str, type], introduction: str) -> str:
    """The config reference in Markdown: a table for each section of each schema."""
    parts = [introduction.strip()]
    for title, schema in schemas.items():
        parts.append(f"## {title}\n\n{inspect.cleandoc(schema.__doc__ or '').partition(chr(10))[0]}")
        section: str | None = None
        for field in list_fields(schema):
            head = field.key.rpartition(".")[0]
            if head != section:
                section = head
                parts.append(
                    f"### {title}: {head or 'top level'}\n\n| Key | Type | Default | Meaning |\n|---|---|---|---|"
                )
            cells = [f"`{field.key}`", f"`{type_name(field.type)}`", f"`{value_text(field.value)}`", field.doc]
            parts[-1] += "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return "\n\n".join(parts) + "\n"
