"""Read settings: TOML files, then environment, then flags.

Unknown keys are errors that name the key. ``FIELDFED_SERVER__PORT=9000`` in the environment sets
``[server] port``.
"""

import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from common.errors import ConfigError

ENVIRONMENT_PREFIX = "FIELDFED_"

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(kind: type[Settings], path: Path, **overrides: dict[str, Any]) -> Settings:
    """Read a TOML file, apply the environment, then ``section={key: value}`` overrides.

    Raises:
        ConfigError: the file is missing or not TOML, or a key or value is wrong; names it.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no settings at '{path}'; create them with the init command") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"'{path}' is not readable TOML: {error}") from error
    _merge(values, _from_environment(kind))
    _merge(values, overrides)
    return validate(kind, values, str(path))


def validate(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """Validate plain values; the error names each key at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error


def _from_environment(kind: type[BaseModel]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        section, separator, key = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        if section in kind.model_fields:
            _merge(values, {section: {key: text}} if separator else {section: text})
    return values


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
