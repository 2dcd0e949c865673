"""Command-line options from a frozen dataclass.

Each field of the dataclass is one option. It has a default, a help text and bounds.

    @dataclass(frozen=True)
    class ExtractConfig(Settings):
        dataset: str = setting("sample", "dataset format", registry=DATASETS, group="data")
        batch: int = setting(32, "images per forward pass", at_least=1, group="machine")

    @command(ExtractConfig)
    def main(config: ExtractConfig) -> None: ...

A setting with a `registry` chooses an extension, such as a task, a dataset or a decoder. An entry
of the registry may have a class `Options`, a dataclass of its own settings. The command accepts the
options of the chosen entries only. --help shows them under their own heading, and
`config.extensions` contains their values.

`--config FILE` (TOML, or the config.json of an earlier run) sets any option. Options on the command
line override it. A user's mistake is printed as one message without a traceback, and the exit code
is 2.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from data import DataError
from data.remote import as_path, is_remote
from models import ModelError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "bf16", "fp32")
LARGEST_INT = 2**63 - 1
TYPE_NAMES = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


class UserError(click.ClickException):
    """A user's mistake. The message says what is wrong, where, and how to fix it.

    The command prints the message and exits with code 2.
    """

    exit_code = 2


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    registry: Mapping[str, Any] | None = None,
    name: str = "",
    group: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    may_change_on_resume: bool = False,
    remote: bool = False,
) -> Any:
    """Return a dataclass field that is also a command-line option.

    Args:
        default: value of the field if the option is not passed.
        help: text for --help. The part after two spaces and "[" describes the default.
        choices: the allowed values.
        registry: extensions by name; the option chooses one of them.
        name: name of a positional argument in --help. Empty for an option.
        group: heading of the option in --help.
        at_least, above, at_most, below: bounds of a number.
        may_change_on_resume: whether a resumed run accepts another value.
        remote: whether a path may be remote, such as s3://bucket/folder.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "registry": registry,
        "name": name,
        "group": group,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "may_change_on_resume": may_change_on_resume,
        "remote": remote,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base class of the configurations of all commands.

    Attributes:
        extensions: the options of the chosen extensions. The keys are the names of the settings
            that choose an extension (such as "task"); the values map option names to values.

    Raises:
        UserError: a value is outside its bounds, or an extension or its option does not exist.
    """

    extensions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, flag = getattr(self, item.name), flag_of(item.name)
            check_bounds(item, value)
            options = {option.name: option for option in options_of(item, value)}
            for name, option_value in self.extensions.get(item.name, {}).items():
                if name not in options:
                    raise UserError(f"{flag} {value} has no option {name!r}")
                check_bounds(options[name], option_value)
            if (registry := item.metadata.get("registry")) is not None:
                if value is None and item.default is None:  # nothing is chosen
                    continue
                if value not in registry:
                    raise UserError(f"{flag} is {value!r}, not one of {', '.join(registry)}")
                self.options(item.name)  # raises UserError for invalid options

    def options(self, name: str) -> Any:
        """Return the options of the extension that setting `name` chooses.

        The result is an instance of the extension's `Options`, or None if it has no options.
        """
        item = next(item for item in fields(self) if item.name == name)
        options_class = _options_class(item, getattr(self, name))
        return options_class(**self.extensions.get(name, {})) if options_class else None

    def record(self) -> dict[str, Any]:
        """Return all settings and extension options by name, as JSON values."""
        values = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name != "extensions"
        }
        for options in self.extensions.values():
            values |= options
        return {name: _as_json(value) for name, value in values.items()}


def from_record(options_class: type, record: Mapping[str, Any]) -> Any:
    """Create options from JSON values, the reverse of `Settings.record`.

    record: values by name; other names are ignored, and missing ones get their defaults.
    """
    annotations = typing.get_type_hints(options_class)
    values: dict[str, Any] = {}
    for item in fields(options_class):
        if item.name in record:
            value_type, multiple = _value_type(annotations[item.name])
            value = record[item.name]
            elements = value if multiple else [value]
            if value_type is Path:
                elements = [as_path(element) for element in elements if element is not None]
            values[item.name] = tuple(elements) if multiple else next(iter(elements), None)
    return options_class(**values)


def _as_json(value: Any) -> Any:
    """Return a setting as a JSON value: a path as text, a tuple as a list."""
    if isinstance(value, tuple | list):
        return [_as_json(element) for element in value]
    return value if isinstance(value, bool | int | float | str | dict | None) else str(value)


def flag_of(name: str) -> str:
    """Return the command-line option of a setting: "max_length" gives "--max-length"."""
    return "--" + name.replace("_", "-")


def _options_class(item: Field, entry: Any) -> type | None:
    """Return the `Options` class of an entry of the setting's registry, or None."""
    registry = item.metadata.get("registry")
    return getattr(registry.get(entry), "Options", None) if registry else None


def options_of(item: Field, entry: Any) -> list[Field]:
    """Return the options of an entry of the setting's registry, as dataclass fields."""
    options_class = _options_class(item, entry)
    return list(fields(options_class)) if options_class else []


def extension_options(items: Iterable[Field]) -> Iterator[tuple[Field, str, Field]]:
    """Yield all options of all registries as (setting, entry name, option)."""
    for item in items:
        for entry in item.metadata.get("registry") or ():
            for option in options_of(item, entry):
                yield item, entry, option


def check_bounds(item: Field, value: Any) -> None:
    """Raise UserError if a number is outside the bounds of its setting."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    at_least, above, at_most, below = (
        item.metadata.get(name) for name in ("at_least", "above", "at_most", "below")
    )
    above_lower = (at_least is None or value >= at_least) and (above is None or value > above)
    below_upper = (at_most is None or value <= at_most) and (below is None or value < below)
    if above_lower and below_upper:
        return
    if at_least is not None and below is not None:
        bounds = f"in [{at_least:g}, {below:g})"
    elif at_least is not None and value < at_least:
        bounds = f"at least {at_least:g}"
    elif above is not None and value <= above:
        bounds = f"above {above:g}"
    else:
        bounds = f"at most {at_most:,}" if at_most is not None else f"below {below:,}"
    raise UserError(f"{flag_of(item.name)} is {value}, it must be {bounds}")


def command(
    config_class: type,
    sections: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    implied: Mapping[str, tuple[str, str]] | None = None,
) -> Callable[[Callable], _Command]:
    """Return a decorator that turns `main(config)` into a click command.

    The fields of `config_class` become the options.

    Args:
        config_class: a subclass of `Settings`.
        sections: additional sections of --help. Each heading has rows of a name and a text.
        implied: by flag, another flag and its value, if the first is passed without the second.
    """

    def decorate(main: Callable) -> _Command:
        items = [item for item in fields(config_class) if item.name != "extensions"]

        def create(values: dict[str, Any]) -> Settings:
            del values["config"]  # already read by the callback of --config
            settings = {item.name: values.pop(item.name) for item in items}
            passed = {name: value for name, value in values.items() if value not in (None, ())}
            extensions: dict[str, dict[str, Any]] = {}
            for item in items:
                names = [option.name for option in options_of(item, settings[item.name])]
                if options := {name: passed[name] for name in names if name in passed}:
                    extensions[item.name] = options
            return config_class(**settings, **({"extensions": extensions} if extensions else {}))

        @functools.wraps(main)
        def call(**values: Any) -> None:
            main(create(values))

        types_by_name = typing.get_type_hints(config_class)
        own_names = config_class.__annotations__
        own_first = sorted(items, key=lambda item: item.name not in own_names)
        click_command = _Command(
            name=main.__module__,
            callback=call,
            params=[
                *(_option(item, types_by_name[item.name]) for item in own_first),
                _config_option(config_class),
            ],
            help=main.__doc__,
            context_settings={"show_default": True, "max_content_width": 110},
        )
        click_command.create = create
        click_command.registries = {
            item.name: item for item in items if item.metadata.get("registry") is not None
        }
        click_command.sections = sections or {}
        click_command.implied = implied or {}
        return click_command

    return decorate


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Convert users' mistakes and errors of the operating system to UserError.

    Programming errors keep their traceback.
    """
    try:
        yield
    except (DataError, ModelError) as error:
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip()
        reason = text.splitlines()[0][:200] if text else "the system has no more memory"
        raise UserError(
            f"out of memory: {reason}; use smaller sizes or a smaller --batch"
        ) from error
    except OSError as error:
        # without errno it is not an error of the system; click handles EPIPE, as with `| head`
        if error.errno is None or error.errno == errno.EPIPE:
            raise
        files = [os.fsdecode(name) if isinstance(name, str | bytes) else f"file descriptor {name}"
                 for name in (error.filename, error.filename2) if name is not None]  # fmt: skip
        reason = error.strerror or os.strerror(error.errno)
        raise UserError(
            f"{' to '.join(files) or 'a file or folder (the system does not say which)'}: {reason}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that numpy or torch could not allocate memory."""
    return (
        isinstance(error, MemoryError)
        or "alloc" in str(error)
        or "size calculation overflowed" in str(error)
    )


class _Command(click.Command):
    create: Callable[[dict[str, Any]], Settings]  # the configuration from the values of options
    registries: Mapping[str, Field]  # the settings that choose an extension, by name
    sections: Mapping[str, Sequence[tuple[str, str]]]
    implied: Mapping[str, tuple[str, str]]

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with plain_errors():  # --config is read here
            return super().make_context(*args, **kwargs)

    def configuration(self, args: Sequence[str]) -> Settings:
        """Return the configuration of a command line, without running the command."""
        with plain_errors():
            return self.create({**self.make_context(self.name, [*args]).params})

    def invoke(self, ctx: click.Context) -> Any:
        # a character that the terminal cannot print must not stop the command
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        with plain_errors():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for flag, (other, value) in self.implied.items():
            if _value_of(flag, args) and not _value_of(other, args):
                args = [other, value, *args]
        ctx.meta["extensions"] = self._chosen_entries(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            self._explain_option_of_other_entry(ctx, error)
            raise

    def _chosen_entries(self, ctx: click.Context, args: Sequence[str]) -> dict[str, str]:
        """Return the chosen registry entry of each setting.

        The command line overrides --config, and --config overrides the defaults.
        """
        config: Mapping[str, Any] = {}
        if path := _value_of("--config", args):
            config = _read_once(ctx, Path(path))
        entries = {}
        for name, item in self.registries.items():
            entry = _value_of(flag_of(name), args) or config.get(name) or item.default
            if isinstance(entry, str) and entry in item.metadata["registry"]:
                entries[name] = entry
            else:
                ctx.meta.setdefault("unknown entries", {})[name] = entry
        return entries

    def _explain_option_of_other_entry(self, ctx: click.Context, error: click.NoSuchOption) -> None:
        """Raise UserError if the unknown option belongs to an entry that is not chosen."""
        for item, entry, option in extension_options(self.registries.values()):
            flag, setting_flag = flag_of(option.name), flag_of(item.name)
            if error.option_name in (flag, f"--no-{flag[2:]}"):
                if item.name in ctx.meta.get("unknown entries", {}):
                    param = next(each for each in self.params if each.name == item.name)
                    # raises the error that names the entries
                    param.type_cast_value(ctx, ctx.meta["unknown entries"][item.name])
                chosen = ctx.meta["extensions"].get(item.name, item.default)
                raise UserError(
                    f"{error.option_name} is an option of {setting_flag} {entry}; "
                    f"{setting_flag} is {chosen} here"
                ) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [
            *super().get_params(ctx),
            *(option for _, options in self._extension_options(ctx) for option in options),
        ]

    def _extension_options(self, ctx: click.Context) -> Iterator[tuple[str, list[click.Parameter]]]:
        """Yield a heading and the options of each chosen entry that has options.

        The options are created once per context.
        """
        params = ctx.meta.setdefault("extension options", {})
        for name, entry in ctx.meta.get("extensions", {}).items():
            item = self.registries[name]
            if options := options_of(item, entry):
                if name not in params:
                    types_by_name = typing.get_type_hints(_options_class(item, entry))
                    params[name] = [
                        _extension_option(option, types_by_name[option.name]) for option in options
                    ]
                yield f"Options of {flag_of(name)} {entry}", params[name]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.params:
            if row := param.get_help_record(ctx):
                heading = getattr(param, "group", "")
                sections.setdefault(
                    f"{heading.capitalize()} options" if heading else "Options", []
                ).append(row)
        for heading, options in self._extension_options(ctx):
            sections[heading] = [row for option in options if (row := option.get_help_record(ctx))]
        help_option = self.get_help_option(ctx)
        if help_option and (row := help_option.get_help_record(ctx)):
            sections.setdefault("Options", []).append(row)
        for heading in sorted(sections, key=lambda heading: heading == "Options"):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])
        for heading, rows in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    """Return the last value of an option on the command line, or None.

    The value is given as `--flag value` or as `--flag=value`.
    """
    value = None
    for index, argument in enumerate(args):
        if argument == "--":
            break
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag and index + 1 < len(args):
            value = args[index + 1]
    return value


def _value_type(annotation: Any) -> tuple[type, bool]:
    """Return the type of an option's value, and whether the option may be repeated."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    value_type = members[0] if union else annotation
    if typing.get_origin(value_type) is tuple:
        return typing.get_args(value_type)[0], True
    return value_type, False


def _option(item: Field, annotation: Any) -> click.Parameter:
    value_type, multiple = _value_type(annotation)
    metadata = item.metadata
    if metadata.get("name"):  # a positional argument
        param_type: Any = _Path(False) if value_type is Path else None
        return click.Argument([item.name], nargs=-1, type=param_type, metavar=metadata["name"])
    flag = flag_of(item.name)
    if value_type is bool:
        option = click.Option(
            [f"{flag}/--no-{flag[2:]}"], default=item.default, help=metadata["help"]
        )
    else:
        if metadata.get("registry") is not None:
            param_type = _RegistryName(metadata["registry"])
        elif metadata.get("choices"):
            param_type = _Choice(metadata["choices"])
        else:
            path_type = _Path(metadata.get("remote", False))
            param_types = {Path: path_type, int: _Int(), float: _Float()}
            param_type = param_types.get(value_type, value_type)
        option = click.Option(
            [flag], type=param_type, default=item.default, multiple=multiple, help=metadata["help"]
        )
    # an attribute that click does not have: --help groups the options by it
    option.group = metadata.get("group", "")  # type: ignore[attr-defined]
    return option


def _extension_option(item: Field, annotation: Any) -> click.Parameter:
    """Return the option without a default, because a preset may replace the extension's default."""
    option = _option(item, annotation)
    option.default = () if option.multiple else None
    if item.default not in (None, ()):
        option.help = f"{option.help}  [{item.default}]"
    return option


class _Path(click.Path):
    """A local path, or also a remote one (`data.remote.as_path`)."""

    def __init__(self, remote: bool) -> None:
        super().__init__(path_type=Path)
        self.remote = remote

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_remote(value):
            return super().convert(value, param, ctx)
        if self.remote:
            return as_path(value)
        folder = str(value).rstrip("/").rpartition("/")[2]
        self.fail(
            f"{value} is remote, and this option takes a local path. Copy it first: "
            f"python -m data.remote {value} {folder}",
            param,
            ctx,
        )


class _Int(click.types.IntParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if abs(number) > LARGEST_INT:
            self.fail("the number is too large", param, ctx)
        return number


class _Float(click.types.FloatParamType):
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class _Choice(click.Choice):
    """A choice whose error message suggests the most similar value."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        similar = difflib.get_close_matches(str(value), list(self.choices), n=1)
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        return f"{value!r} is not one of {', '.join(self.choices)}.{hint}"


class _RegistryName(click.ParamType):
    """The name of a registry entry. Entries may be added after the command is defined."""

    name = "name"

    def __init__(self, registry: Mapping[str, Any]) -> None:
        self.registry = registry

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return f"[{'|'.join(self.registry)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return _Choice(tuple(self.registry)).convert(value, param, ctx)


def _config_option(config_class: type) -> click.Option:
    setting_types = {
        name: _value_type(annotation)
        for name, annotation in typing.get_type_hints(config_class).items()
        if name != "extensions"
    }

    def load(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        known_types = dict(setting_types)
        for item in fields(config_class):
            entry = ctx.meta.get("extensions", {}).get(item.name)
            if options_class := _options_class(item, entry):
                annotations = typing.get_type_hints(options_class)
                known_types |= {name: _value_type(hint) for name, hint in annotations.items()}
        values = dict(_read_once(ctx, path))
        for name, value in [*values.items()]:
            if name not in known_types and _is_default_of_other_entry(config_class, name, value):
                del values[name]
                continue
            if name not in known_types:
                similar = difflib.get_close_matches(name, known_types, n=1)
                hint = (
                    f"did you mean {similar[0]!r}?"
                    if similar
                    else f"known: {', '.join(known_types)}"
                )
                raise UserError(f"{path}: unknown setting {name[:80]!r}; {hint}")
            # older versions recorded a single path for options that may now be repeated
            if known_types[name] == (Path, True) and isinstance(value, str):
                values[name] = value = [value]
            if value is not None and (problem := _type_error(value, *known_types[name])):
                raise UserError(f"{path}: {name} is {problem} ({flag_of(name)})")
        ctx.default_map = {
            **(ctx.default_map or {}),
            **{name: value for name, value in values.items() if value is not None},
        }

    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        callback=load,
        is_eager=True,
        help="read settings from a TOML file or an earlier run's config.json; options on the "
        "command line override it",
    )


def setting_types(config_class: type) -> dict[str, list[tuple[type, bool]]]:
    """Return the types of all settings of a configuration and of all its extensions.

    Returns:
        By name, the type of the value and whether the option may be repeated. Settings of several
        extensions with one name may have several types.
    """
    classes = [_options_class(item, entry) for item in fields(config_class)
               for entry in item.metadata.get("registry") or ()]  # fmt: skip
    types_by_name: dict[str, list[tuple[type, bool]]] = {}
    for options_class in (config_class, *filter(None, classes)):
        for name, annotation in typing.get_type_hints(options_class).items():
            if name != "extensions":
                types_by_name.setdefault(name, []).append(_value_type(annotation))
    return types_by_name


def type_error(value: Any, accepted: Iterable[tuple[type, bool]]) -> str:
    """Return what is wrong with the type of a value, or "" if one of the types accepts it.

    accepted: types as `setting_types` returns them. A text is also accepted as a list of one.
    """
    problems = [
        _type_error([value] if multiple and isinstance(value, str) else value, kind, multiple)
        for kind, multiple in accepted
    ]
    return "" if "" in problems else problems[0]


def _is_default_of_other_entry(config_class: type, name: str, value: Any) -> bool:
    """Return whether a setting is the default of an option of an entry that is not chosen.

    Such settings are ignored, because older versions recorded the options of all entries.
    """
    return any(
        option.name == name and option.default == value
        for _, _, option in extension_options(fields(config_class))
    )


def _type_error(value: Any, value_type: type, multiple: bool) -> str:
    """Return what is wrong with the type or the range of a value, or "" for a valid value."""
    if multiple and isinstance(value, list):
        problems = (_type_error(element, value_type, False) for element in value)
        return next((f"a list with {problem}" for problem in problems if problem), "")
    accepted = {Path: str, float: int | float}.get(value_type, value_type)
    bool_as_number = isinstance(value, bool) and value_type is not bool
    if multiple or bool_as_number or not isinstance(value, accepted):
        containers: dict[type, str] = {dict: "a table", list: "a list"}
        actual = containers.get(type(value)) or f"{type(value).__name__} {str(value)[:80]!r}"
        return f"{actual}, not {'a list, each ' if multiple else ''}{TYPE_NAMES[value_type]}"
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return "a number that is too large"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, not a finite number"
    if isinstance(value, str) and ("\0" in value or not _encodes(value)):
        return "text with a character that is not valid in a file name or a caption"
    return ""


def _encodes(text: str) -> bool:
    """Return whether the file system's encoding has all characters of the text."""
    try:
        return bool(os.fsencode(text)) or not text
    except UnicodeEncodeError:
        return False


def _read_once(ctx: click.Context, path: Path) -> Mapping[str, Any]:
    """Return the settings of a file. The file is read once per command line."""
    configs = ctx.meta.setdefault("configs", {})
    if path not in configs:
        configs[path] = read_config(path)
    return configs[path]


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file, or from the `training` part of a run's config.json.

    Returns:
        The settings by name, with "-" replaced by "_" in the names.

    Raises:
        UserError: the file does not exist, cannot be parsed, or has no settings by name.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; --config takes a TOML file or an earlier run's config.json"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    # ValueError: invalid JSON, TOML or UTF-8, and integers that have too many digits
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    settings = content.get("training", content) if isinstance(content, dict) else content
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {type(settings).__name__}, not settings by name")
    return {name.replace("-", "_"): value for name, value in settings.items()}
