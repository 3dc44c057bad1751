"""Writes deploy/reference.md: commands, exit codes, settings and metrics, as the programs say them.

    python -m deploy.reference

Nothing is said a second time here: commands and their options are typer's own, settings are the
models of common/config.py, exit codes the errors of common/errors.py, metrics what the collectors
show of empty databases. A test says when the file is not what this makes of it.
"""

import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel

from client.cli import app as client_app
from client.figures import DeviceFigures
from common import errors
from common.command import INTERRUPTED, command_of
from common.config import FarmConfig, ServerConfig
from common.settings import ENVIRONMENT_PREFIX
from common.topics import DeviceState, Telemetry
from server import telemetry
from server.cli import app as server_app
from server.identity import Authority
from server.metrics import StateCollector
from server.registry import Registry
from server.store import Store
from server.telemetry import TelemetryStore

FILE: Final = Path(__file__).with_name("reference.md")
PROGRAMS: Final = {"fieldfed-server": server_app, "fieldfed-client": client_app}
FILES: Final[Mapping[str, type[BaseModel]]] = {"server.toml": ServerConfig, "farm.toml": FarmConfig}
BETWEEN_EXAMPLES: Final = "   |   "
KINDS: Final = {"integer": "whole number", "number": "number", "string": "text"}
BEGIN: Final = """\
# Reference

What the programs say of themselves. `make reference` writes this file; it is not edited.

- [Commands](#commands)
- [Exit codes](#exit-codes)
- [Settings](#settings)
- [Metrics](#metrics)
"""


def text() -> str:
    """The whole page."""
    parts = [BEGIN, *_commands(), *_exit_codes(), *_settings(), *_metrics()]
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(_cell(one) for one in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- commands ------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its words, in the order of ``--help``."""
    for name, app in PROGRAMS.items():
        yield from _below(name, command_of(app))


def _below(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            yield from _below(f"{path} {name}", one)
    else:
        yield path, command


def _commands() -> Iterator[str]:
    yield "## Commands\n\nEvery command takes `--help`.\n"
    for path, command in commands():
        yield f"### {path}\n"
        yield _usage(path, command)
        yield inspect.cleandoc(command.help or "") + "\n"
        yield _table(("", "what", "default"), [_parameter(one) for one in command.params])
        yield "\n".join(["```sh", *examples(command), "```\n"])


def _usage(path: str, command: click.Command) -> str:
    words = [_shown(one) for one in command.params if isinstance(one, click.Argument)]
    needed = [
        f"{one.opts[0]} {_kind(one).upper()}"
        for one in command.params
        if isinstance(one, click.Option) and one.required
    ]
    return f"`{' '.join([path, *words, *needed])}`\n"


def _shown(argument: click.Argument) -> str:
    name = (argument.name or "").upper()
    name = f"{name} ..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _parameter(one: click.Parameter) -> tuple[str, str, str]:
    said = getattr(one, "help", None) or ""
    if isinstance(one, click.Argument):
        return f"`{(one.name or '').upper()}`", said, "required" if one.required else ""
    flag = isinstance(one, click.Option) and one.is_flag
    name = f"`{', '.join([*one.opts, *one.secondary_opts])}`"
    default = "required" if one.required else _value(None if flag else one.default)
    return (name if flag else f"{name} {_kind(one)}"), said, default


def _kind(one: click.Parameter) -> str:
    kind = one.type
    if isinstance(kind, click.Choice):
        return " or ".join(map(str, kind.choices))
    name = kind.name.removesuffix(" range")
    words = {"integer": "whole number", "float": "number"}.get(name, name)
    lowest, highest = getattr(kind, "min", None), getattr(kind, "max", None)
    return f"{words}{_bounds(lowest, None, highest, None)}"


def examples(command: click.Command) -> list[str]:
    """The lines that a command shows as examples."""
    _, _, lines = (command.epilog or "").partition(": ")
    return lines.split(BETWEEN_EXAMPLES)


# --- exit codes ----------------------------------------------------------------------------------


def exit_codes() -> dict[int, str]:
    """What each code means."""
    found = {0: "done"}
    for kind in _kinds(errors.FieldfedError):
        if kind is errors.FieldfedError or "exit_code" in vars(kind):
            found[kind.exit_code] = _first_line(kind)
    return {**dict(sorted(found.items())), INTERRUPTED: "interrupted (Ctrl-C)"}


def _kinds(kind: type[errors.FieldfedError]) -> Iterator[type[errors.FieldfedError]]:
    yield kind
    for one in kind.__subclasses__():
        if one.__module__ == errors.__name__:
            yield from _kinds(one)


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield _table(("code", "meaning"), [(str(code), said) for code, said in exit_codes().items()])


# --- settings ------------------------------------------------------------------------------------


def settings(kind: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, list[list[str]]]]:
    """Each section of a file: its name, what it is, and its keys."""
    schema = kind.model_json_schema()
    yield from _section(schema, schema.get("$defs", {}), path, "")


def _section(
    schema: Mapping[str, Any], parts: Mapping[str, Any], path: str, absent: str
) -> Iterator[tuple[str, str, list[list[str]]]]:
    keys, below = [], []
    for name, field in schema["properties"].items():
        part = _part(field, parts)
        if part is not None:
            inner = f"{path}.{name}".lstrip(".")
            inner = f"[{inner}]" if "items" in field else inner  # as TOML has tables of a list
            below.append((inner, part, field.get("description", "")))
            continue
        default = "required" if name in schema.get("required", ()) else _value(field.get("default"))
        keys.append([name, _words(field), default, field.get("description", "")])
    said = inspect.cleandoc(schema.get("description", "")).replace("``", "`")
    if absent:
        said += f"\n\n{absent[0].upper()}{absent[1:]}."
    yield path, said, keys
    for name, part, what in below:
        yield from _section(part, parts, name, what)


def _part(field: Mapping[str, Any], parts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a field is, if it is one."""
    for one in (field, field.get("items", {}), *field.get("anyOf", ())):
        if "$ref" in one:
            found: Mapping[str, Any] = parts[one["$ref"].rpartition("/")[2]]
            return found
    return None


def _words(field: Mapping[str, Any]) -> str:
    """The type of a key, as one reads it."""
    if "anyOf" in field:
        return " or ".join(_words(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return " or ".join(f"`{one}`" for one in field["enum"])
    kind = field["type"]
    if kind == "boolean":
        return "`true` or `false`"
    if kind == "array":
        each = field.get("prefixItems") or [field["items"]]
        count = f" of {len(each)}" if "prefixItems" in field else ""
        return f"list{count}, each: {_words(each[0])}"
    if kind == "object":
        return f"table, each: {_words(field['additionalProperties'])}"
    if "pattern" in field:
        return f"text like `{field['pattern']}`"
    kind = {"path": "path", "password": "secret text"}.get(field.get("format", ""), KINDS[kind])
    names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    return kind + _bounds(*(field.get(name) for name in names))


def _bounds(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    if least is not None and most is not None:
        return f", {_number(least)} to {_number(most)}"
    said = {"at least": least, "above": above, "at most": most, "below": below}
    words = [f"{word} {_number(value)}" for word, value in said.items() if value is not None]
    return f", {' and '.join(words)}" if words else ""


def _number(value: float) -> str:
    return f"{int(value):_}" if value >= 100_000 else f"{value:g}"


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"`{_number(value)}`"
    return f"`{value}`" if isinstance(value, str | Path) else f"`{value!r}`"


def _settings() -> Iterator[str]:
    yield (
        "## Settings\n\nAn unknown key is an error that names it. "
        f"`{ENVIRONMENT_PREFIX}SERVER__PORT=9000` in the environment overrides `[server] port`; a "
        "section that may be absent is there as soon as the file has a line for it.\n"
    )
    for file, kind in FILES.items():
        for path, said, keys in settings(kind):
            yield f"### {file}{f' [{path}]' if path else ''}\n"
            yield f"{said}\n"
            if keys:
                rows = [[f"`{name}`", *rest] for name, *rest in keys]
                yield _table(("key", "type", "default", "what"), rows)


# --- metrics -------------------------------------------------------------------------------------


def metrics() -> dict[str, list[Metric]]:
    """Every family, by who shows it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Registry.create(folder, "reference").close()
        Authority.create(folder / "identity", "reference", [])
        Store.open(folder / "fieldfed.db").close()
        TelemetryStore.open(folder / telemetry.NAME).close()
        of_server = StateCollector(folder).collect()
    device = DeviceFigures()
    device.state, device.telemetry = DeviceState(farm="a", release=""), Telemetry(uptime_seconds=0)
    return {"server": of_server, "device": device.collect()}


def full_name(family: Metric) -> str:
    """As it stands in a query; of a histogram what its series begin with."""
    ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
    return family.name + ending


def _metrics() -> Iterator[str]:
    where = {"server": "`[metrics]` of server.toml", "device": "`[metrics]` of farm.toml"}
    yield "## Metrics\n"
    for name, families in metrics().items():
        yield f"### With {where[name]}\n"
        yield _table(
            ("family", "type", "labels", "what"),
            [
                (f"`{full_name(one)}`", one.type, ", ".join(_labels(one)), one.documentation)
                for one in families
            ],
        )


def _labels(family: Metric) -> tuple[str, ...]:
    """What tells its series apart; those of an info are its samples'."""
    if family.type == "info":
        return tuple(family.samples[0].labels)
    return tuple(getattr(family, "_labelnames", ()))


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote '{FILE}'")
