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

import contextlib
import difflib
import errno
import functools
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
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
LARGEST = 2**63 - 1  # of a whole number
KINDS = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}


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


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistakes and what the system refuses, as UserError; a mistake of ours keeps its traceback."""
    try:
        yield
    except (DataError, ModelError) as error:
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "the system gives no more"
        raise UserError(f"out of memory: {reason}; smaller sizes or a smaller --batch need less") from error
    except OSError as error:
        if error.errno is None or error.errno == errno.EPIPE:  # not of the system; `| head`, which click handles
            raise
        files = [os.fsdecode(name) if isinstance(name, str | bytes) else f"file descriptor {name}"
                 for name in (error.filename, error.filename2) if name is not None]  # fmt: skip
        reason = error.strerror or os.strerror(error.errno)
        raise UserError(f"{' to '.join(files) or 'a file or folder (the system does not say which)'}: {reason}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is numpy's or torch's (on a CPU or a GPU) for arrays that are too large."""
    return isinstance(error, MemoryError) or "alloc" in str(error) or "size calculation overflowed" in str(error)


class _Command(click.Command):
    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with plain_errors():  # --config is read here
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        if hasattr(sys.stdout, "reconfigure"):  # a name or a caption that the terminal has no characters for ends nothing
            sys.stdout.reconfigure(errors="backslashreplace")
        with plain_errors():
            return super().invoke(ctx)


def _kind_of(annotation: Any) -> tuple[type, bool]:
    """The type of an option's value, and whether it may be given several times."""
    members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    kind = members[0] if union else annotation
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False


def _option(item: Any, annotation: Any) -> click.Parameter:
    kind, multiple = _kind_of(annotation)
    if item.metadata["name"]:  # a positional argument
        return click.Argument([item.name], nargs=-1, type=click.Path(path_type=Path), metavar=item.metadata["name"])
    flag = "--" + item.name.replace("_", "-")
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=item.default, help=item.metadata["help"])
    if item.metadata["choices"]:
        kind = _Choice(item.metadata["choices"])
    else:
        kind = {Path: click.Path(path_type=Path), int: _Int(), float: _Float()}.get(kind, kind)
    return click.Option([flag], type=kind, default=item.default, multiple=multiple, help=item.metadata["help"])


class _Int(click.types.IntParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = super().convert(value, param, ctx)
        return found if abs(found) <= LARGEST else self.fail("the number is too large", param, ctx)


class _Float(click.types.FloatParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"{value!r} is not a finite number", param, ctx)


class _Choice(click.Choice):
    """A choice whose error names the nearest one: click lists them all, which helps less where there are many."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        near = difflib.get_close_matches(str(value), list(self.choices), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{value!r} is not one of {', '.join(self.choices)}.{hint}"


def _config_option(config_class: type) -> click.Option:
    kinds = {name: _kind_of(annotation) for name, annotation in typing.get_type_hints(config_class).items()}
    names = [item.name for item in fields(config_class)]

    def load(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        found = read_config(path)
        for name, value in found.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
                raise UserError(f"{path}: unknown setting {name[:80]!r}{hint}")
            if value is not None and (wrong := _what_is_wrong(value, *kinds[name])):
                raise UserError(f"{path}: {name} is {wrong} (--{name.replace('_', '-')})")
        ctx.default_map = {**(ctx.default_map or {}), **{k: v for k, v in found.items() if v is not None}}

    kind = click.Path(path_type=Path)
    text = "settings from a TOML file or an earlier run's config.json; flags win over it"
    return click.Option(["--config"], type=kind, callback=load, is_eager=True, help=text)


def _what_is_wrong(value: Any, kind: type, multiple: bool) -> str:
    """What a setting's value is in place of what it should be; "" where it is right."""
    if multiple and isinstance(value, list):
        return next((f"a list with {wrong}" for each in value if (wrong := _what_is_wrong(each, kind, False))), "")
    types_of = {Path: str, float: int | float}.get(kind, kind)
    if multiple or not isinstance(value, types_of) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "a table", list: "a list"}
        shown = names.get(type(value)) or f"{type(value).__name__} {str(value)[:80]!r}"
        return f"{shown}, not {'a list, each ' if multiple else ''}{KINDS[kind]}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number that is too large"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, not a finite number"
    if isinstance(value, str) and ("\0" in value or not _encodes(value)):
        return "text with a character that no file name or caption has"
    return ""


def _encodes(text: str) -> bool:
    try:
        return bool(os.fsencode(text)) or not text
    except UnicodeEncodeError:
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, or of the config.json that an earlier run wrote (its `training` part)."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; --config takes a TOML file or an earlier run's config.json")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of both languages, of the encoding, of numbers with 5,000 digits
        raise UserError(f"{path} cannot be read: {error}") from error
    found = found.get("training", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not settings by name")
    return {name.replace("-", "_"): value for name, value in found.items()}
