"""A stage's configuration is one frozen dataclass; its fields make the command's options, its record and its checks.

    @dataclass(frozen=True)
    class ExtractConfig:
        dataset: str = setting("sample", "where the photographs come from", choices=DATASETS)

    @command(ExtractConfig)
    def main(config: ExtractConfig) -> None: ...

`--config FILE` (TOML, or the config.json of an earlier run) sets any option; flags win over it. A user's mistake is
printed as one message, without a traceback, and the command exits with 2.
"""

from __future__ import annotations

import difflib
import errno
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import click

from data import DataError
from models import ModelError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")
PLAIN_OS_ERRORS = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR,
                   errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG}  # fmt: skip


class UserError(click.ClickException):
    """What was wrong, where, and what mends it; the command prints it and exits with 2."""

    exit_code = 2


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), name: str = "") -> Any:
    """A dataclass field that is also an option: its default, its help line and, where few, its choices."""
    return field(default=default, metadata={"help": help, "choices": choices, "name": name})


def command(
    config_class: type, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[Callable], click.Command]:
    """Turn `main(config)` into a click command whose options are the fields of `config_class`.

    presets: what `--preset NAME` sets, by name and field; --config and flags win over it.
    """

    def decorate(main: Callable) -> click.Command:
        @functools.wraps(main)
        def call(**values: Any) -> None:
            values.pop("config")
            main(config_class(**values))

        types_of = typing.get_type_hints(config_class)
        own = config_class.__annotations__  # what a stage shares with another stands after its own
        options = [_option(item, types_of[item.name]) for item in sorted(fields(config_class), key=lambda f: f.name not in own)]
        if presets:
            chosen = next(option for option in options if option.name == "preset")
            chosen.is_eager, chosen.callback = True, functools.partial(_take_preset, presets)
        return _Command(
            name=main.__module__,
            callback=call,
            params=[*options, _config_option(config_class)],
            help=main.__doc__,
            context_settings={"show_default": True, "max_content_width": 110},
        )

    return decorate


def _take_preset(
    presets: Mapping[str, Mapping[str, Any]], ctx: click.Context, _: click.Parameter, name: str | None
) -> str | None:
    if name is not None:
        ctx.default_map = {**presets[name], **(ctx.default_map or {})}
    return name


class _Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DataError, ModelError) as error:
            raise UserError(str(error)) from error
        except OSError as error:
            if error.errno not in PLAIN_OS_ERRORS:
                raise
            raise UserError(f"{error.filename or 'the output folder'}: {error.strerror}") from error


def _option(item: Any, annotation: Any) -> click.Parameter:
    members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    kind = members[0] if union else annotation
    multiple = typing.get_origin(kind) is tuple
    if multiple:
        kind = typing.get_args(kind)[0]
    if item.metadata["name"]:  # a positional argument
        return click.Argument([item.name], nargs=-1, type=click.Path(path_type=Path), metavar=item.metadata["name"])
    flag = "--" + item.name.replace("_", "-")
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=item.default, help=item.metadata["help"])
    if item.metadata["choices"]:
        kind = _Choice(item.metadata["choices"])
    elif kind is Path:
        kind = click.Path(path_type=Path)
    return click.Option([flag], type=kind, default=item.default, multiple=multiple, help=item.metadata["help"])


class _Choice(click.Choice):
    """A choice whose error names the nearest one: click lists them all, which helps less where there are many."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        near = difflib.get_close_matches(str(value), list(self.choices), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{value!r} is not one of {', '.join(self.choices)}.{hint}"


def _config_option(config_class: type) -> click.Option:
    names = [item.name for item in fields(config_class)]

    def load(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        found = read_config(path)
        for name in found:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
                raise UserError(f"{path}: unknown setting {name!r}{hint}")
        ctx.default_map = {**(ctx.default_map or {}), **{k: v for k, v in found.items() if v is not None}}

    kind = click.Path(path_type=Path)
    text = "settings from a TOML file or an earlier run's config.json; flags win over it"
    return click.Option(["--config"], type=kind, callback=load, is_eager=True, help=text)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, or of the config.json that an earlier run wrote (its `training` part)."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; --config takes a TOML file or an earlier run's config.json")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not settings by name")
    found = found.get("training", found)
    return {name.replace("-", "_"): value for name, value in found.items()}
