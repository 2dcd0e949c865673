"""A command's configuration is one frozen dataclass; its fields make the options, their checks and
the record.

    @dataclass(frozen=True)
    class ExtractConfig(Settings):
        dataset: str = setting("sample", "layout of the photographs", registry=DATASETS,
            group="data")
        batch: int = setting(32, "images per forward pass", at_least=1, group="machine")

    @command(ExtractConfig)
    def main(config: ExtractConfig) -> None: ...

A setting with a `registry` names an extension (a task, a dataset, a decoder). Each entry of the
registry may have `Options`, a dataclass of its own settings: the command takes those of the names
that are chosen, by flags or by --config, shows them under a heading of their own, and hands them
over in `config.extensions`.

`--config FILE` (TOML, or the config.json of an earlier run) sets any option; flags win over it. A
user's mistake is printed as one message, without a traceback, and the command exits with 2.
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
from dataclasses import dataclass, field, fields
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
KINDS = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


class UserError(click.ClickException):
    """A user's mistake: what is wrong, where, and what fixes it. The command prints it and exits
    with 2.
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
) -> Any:
    """A dataclass field that is also an option.

    choices: the values that it may have. registry: entries by name, of which it chooses one.
    name: the name of a positional argument. group: the heading of its help.
    at_least, above, at_most, below: bounds of a number.
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
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base class of all command configurations: checks bounds, and holds the options of the chosen
    extensions.

    extensions: for each setting that chooses an extension (such as "task"), the given options by
    name.
    """

    extensions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            check_bounds(item, getattr(self, item.name))
            for option, value in self.extensions.get(item.name, {}).items():
                known = {each.name: each for each in options_of(item, getattr(self, item.name))}
                if option not in known:
                    raise UserError(
                        f"{flag_of(item.name)} {getattr(self, item.name)} has no option {option!r}"
                    )
                check_bounds(known[option], value)
            if (registry := item.metadata.get("registry")) is not None:
                if getattr(self, item.name) not in registry:
                    raise UserError(
                        f"{flag_of(item.name)} is {getattr(self, item.name)!r}, not one of "
                        f"{', '.join(registry)}"
                    )
                self.options(item.name)  # raises UserError for invalid options

    def options(self, name: str) -> Any:
        """The options of the extension that setting `name` chooses, as an instance of its
        `Options`; None if it has none.
        """
        item = next(item for item in fields(self) if item.name == name)
        kind = _options_class(item, getattr(self, name))
        return kind(**self.extensions.get(name, {})) if kind else None

    def record(self) -> dict[str, Any]:
        """All settings and extension options by name, as JSON values."""
        values = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name != "extensions"
        }
        for given in self.extensions.values():
            values |= given
        return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options_class(item: Any, chosen: Any) -> type | None:
    """The `Options` class of entry `chosen` in a setting's registry, or None."""
    registry = item.metadata.get("registry")
    return getattr(registry.get(chosen), "Options", None) if registry else None


def options_of(item: Any, chosen: Any) -> list[Any]:
    """The fields of the options of entry `chosen` in a setting's registry."""
    kind = _options_class(item, chosen)
    return list(fields(kind)) if kind else []


def extension_options(items: Iterable[Any]) -> Iterator[tuple[Any, str, Any]]:
    """All options of all entries in the registries of `items`: (setting, entry name, option)."""
    for item in items:
        for entry in item.metadata.get("registry") or ():
            for option in options_of(item, entry):
                yield item, entry, option


def check_bounds(item: Any, value: Any) -> None:
    """Raise UserError if a number is outside the bounds of its field."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    at_least, above, at_most, below = (
        item.metadata.get(name) for name in ("at_least", "above", "at_most", "below")
    )
    good = (at_least is None or value >= at_least) and (above is None or value > above)
    if good and (at_most is None or value <= at_most) and (below is None or value < below):
        return
    if at_least is not None and below is not None:
        wanted = f"in [{at_least:g}, {below:g})"
    elif at_least is not None and value < at_least:
        wanted = f"at least {at_least:g}"
    elif above is not None and value <= above:
        wanted = f"above {above:g}"
    else:
        wanted = f"at most {at_most:,}" if at_most is not None else f"below {below:,}"
    raise UserError(f"{flag_of(item.name)} is {value}, it must be {wanted}")


def command(
    config_class: type, sections: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> Callable[[Callable], click.Command]:
    """Turn `main(config)` into a click command whose options are the fields of `config_class`.

    sections: further sections of --help, as rows of a name and a text by heading.
    """

    def decorate(main: Callable) -> click.Command:
        @functools.wraps(main)
        def call(**values: Any) -> None:
            values.pop("config")
            own = {item.name for item in fields(config_class)}
            given = {name: values.pop(name) for name in [*values] if name not in own}
            extensions: dict[str, dict[str, Any]] = {}
            for item in fields(config_class):
                names = [option.name for option in options_of(item, values.get(item.name))]
                if found := {
                    name: given[name] for name in names if given.get(name) not in (None, ())
                }:
                    extensions[item.name] = found
            main(config_class(**values, **({"extensions": extensions} if extensions else {})))

        types_of = typing.get_type_hints(config_class)
        # options shared with other commands come last
        own = config_class.__annotations__
        items = [item for item in fields(config_class) if item.name != "extensions"]
        options = [
            _option(item, types_of[item.name])
            for item in sorted(items, key=lambda f: f.name not in own)
        ]
        found = _Command(
            name=main.__module__,
            callback=call,
            params=[*options, _config_option(config_class)],
            help=main.__doc__,
            context_settings={"show_default": True, "max_content_width": 110},
        )
        found.registries = {
            item.name: item for item in items if item.metadata.get("registry") is not None
        }
        found.sections = sections or {}
        return found

    return decorate


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn users' mistakes and system errors into UserError. Programming errors keep their
    traceback.
    """
    try:
        yield
    except (DataError, ModelError) as error:
        raise UserError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (
            str(error).strip().splitlines()[0][:200]
            if str(error).strip()
            else "the system gives no more"
        )
        raise UserError(
            f"out of memory: {reason}; use smaller sizes or a smaller --batch"
        ) from error
    except OSError as error:
        # not of the system; `| head`, which click handles
        if error.errno is None or error.errno == errno.EPIPE:
            raise
        files = [os.fsdecode(name) if isinstance(name, str | bytes) else f"file descriptor {name}"
                 for name in (error.filename, error.filename2) if name is not None]  # fmt: skip
        reason = error.strerror or os.strerror(error.errno)
        raise UserError(
            f"{' to '.join(files) or 'a file or folder (the system does not say which)'}: {reason}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy or torch (on a CPU or a GPU) failed to allocate an array."""
    return (
        isinstance(error, MemoryError)
        or "alloc" in str(error)
        or "size calculation overflowed" in str(error)
    )


class _Command(click.Command):
    registries: Mapping[str, Any]  # the settings that choose an extension, by name
    sections: Mapping[str, Sequence[tuple[str, str]]]

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with plain_errors():  # --config is read here
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        # a character that the terminal cannot print must not stop the command
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        with plain_errors():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["extensions"] = self._chosen(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            self._refuse_option_of_another(ctx, error)
            raise

    def _chosen(self, ctx: click.Context, args: Sequence[str]) -> dict[str, str]:
        """The extension names chosen by the command line, else by --config, else by the
        defaults.
        """
        recorded: Mapping[str, Any] = {}
        if path := _value_of("--config", args):
            recorded = _read_once(ctx, Path(path))
        chosen = {}
        for name, item in self.registries.items():
            value = _value_of(flag_of(name), args) or recorded.get(name) or item.default
            if isinstance(value, str) and value in item.metadata["registry"]:
                chosen[name] = value
        return chosen

    def _refuse_option_of_another(self, ctx: click.Context, error: click.NoSuchOption) -> None:
        for item, other, option in extension_options(self.registries.values()):
            flag, setting_flag = flag_of(option.name), flag_of(item.name)
            if error.option_name in (flag, f"--no-{flag[2:]}"):
                now = ctx.meta["extensions"].get(item.name, item.default)
                raise UserError(
                    f"{error.option_name} is an option of {setting_flag} {other}; "
                    f"{setting_flag} is {now} here"
                ) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [
            *super().get_params(ctx),
            *(option for _, options in self._extension_options(ctx) for option in options),
        ]

    def _extension_options(self, ctx: click.Context) -> Iterator[tuple[str, list[click.Parameter]]]:
        """Yield the heading and the options of each chosen extension. They are created once per
        context.
        """
        made = ctx.meta.setdefault("extension options", {})
        for name, chosen in ctx.meta.get("extensions", {}).items():
            item = self.registries[name]
            if options := options_of(item, chosen):
                if name not in made:
                    kinds = typing.get_type_hints(_options_class(item, chosen))
                    made[name] = [
                        _extension_option(option, kinds[option.name]) for option in options
                    ]
                yield f"Options of {flag_of(name)} {chosen}", made[name]

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
    """The last value of an option on the command line, given as `--flag value` or
    `--flag=value`.
    """
    found = None
    for number, text in enumerate(args):
        if text == "--":
            break
        if text.startswith(f"{flag}="):
            found = text.partition("=")[2]
        elif text == flag and number + 1 < len(args):
            found = args[number + 1]
    return found


def _kind_of(annotation: Any) -> tuple[type, bool]:
    """The type of an option's value, and whether the option may be repeated."""
    members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    kind = members[0] if union else annotation
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True
    return kind, False


def _option(item: Any, annotation: Any) -> click.Parameter:
    kind, multiple = _kind_of(annotation)
    metadata = item.metadata
    if metadata.get("name"):  # a positional argument
        paths = click.Path(path_type=Path) if kind is Path else None
        return click.Argument([item.name], nargs=-1, type=paths, metavar=metadata["name"])
    flag = flag_of(item.name)
    if kind is bool:
        option = click.Option(
            [f"{flag}/--no-{flag[2:]}"], default=item.default, help=metadata["help"]
        )
    else:
        if metadata.get("registry") is not None:
            reader: Any = _Registered(metadata["registry"])
        elif metadata.get("choices"):
            reader = _Choice(metadata["choices"])
        else:
            readers = {Path: click.Path(path_type=Path), int: _Int(), float: _Float()}
            reader = readers.get(kind, kind)
        option = click.Option(
            [flag], type=reader, default=item.default, multiple=multiple, help=metadata["help"]
        )
    # our own attribute: --help is grouped by it
    option.group = metadata.get("group", "")  # type: ignore[attr-defined]
    return option


def _extension_option(item: Any, annotation: Any) -> click.Parameter:
    """As `_option`, with None as default: a preset or the extension's own default applies."""
    option = _option(item, annotation)
    option.default = () if option.multiple else None
    if item.default not in (None, ()):
        option.help = f"{option.help}  [{item.default}]"
    return option


class _Int(click.types.IntParamType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = super().convert(value, param, ctx)
        return found if abs(found) <= LARGEST else self.fail("the number is too large", param, ctx)


class _Float(click.types.FloatParamType):
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found = super().convert(value, param, ctx)
        return (
            found
            if math.isfinite(found)
            else self.fail(f"{value!r} is not a finite number", param, ctx)
        )


class _Choice(click.Choice):
    """A choice whose error names the nearest value; click would list all values."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        near = difflib.get_close_matches(str(value), list(self.choices), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{value!r} is not one of {', '.join(self.choices)}.{hint}"


class _Registered(click.ParamType):
    """A name in a registry, which may grow after the command was defined."""

    name = "name"

    def __init__(self, registry: Mapping[str, Any]) -> None:
        self.registry = registry

    def get_metavar(self, *_: Any, **__: Any) -> str:
        return f"[{'|'.join(self.registry)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return _Choice(tuple(self.registry)).convert(value, param, ctx)


def _config_option(config_class: type) -> click.Option:
    own = {
        name: _kind_of(annotation)
        for name, annotation in typing.get_type_hints(config_class).items()
        if name != "extensions"
    }

    def load(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        kinds = dict(own)
        for item in fields(config_class):
            chosen = ctx.meta.get("extensions", {}).get(item.name)
            if options := _options_class(item, chosen):
                types_of = typing.get_type_hints(options)
                kinds |= {name: _kind_of(annotation) for name, annotation in types_of.items()}
        found = dict(_read_once(ctx, path))
        for name, value in [*found.items()]:
            if name not in kinds and _is_default_of_another(config_class, name, value):
                del found[name]
            elif name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(kinds)}"
                raise UserError(f"{path}: unknown setting {name[:80]!r}{hint}")
            if kinds[name] == (Path, True) and isinstance(value, str):  # of older versions
                found[name] = value = [value]
            if value is not None and (wrong := _what_is_wrong(value, *kinds[name])):
                raise UserError(f"{path}: {name} is {wrong} ({flag_of(name)})")
        ctx.default_map = {
            **(ctx.default_map or {}),
            **{k: v for k, v in found.items() if v is not None},
        }

    kind = click.Path(path_type=Path)
    text = (
        "read settings from a TOML file or an earlier run's config.json; command-line options "
        "override it"
    )
    return click.Option(["--config"], type=kind, callback=load, is_eager=True, help=text)


def _is_default_of_another(config_class: type, name: str, value: Any) -> bool:
    """Whether a recorded setting is the default of an extension that is not chosen; older runs
    recorded all options.
    """
    return any(
        option.name == name and option.default == value
        for _, _, option in extension_options(fields(config_class))
    )


def _what_is_wrong(value: Any, kind: type, multiple: bool) -> str:
    """Describe a value of a wrong type; "" for a valid one."""
    if multiple and isinstance(value, list):
        return next(
            (
                f"a list with {wrong}"
                for each in value
                if (wrong := _what_is_wrong(each, kind, False))
            ),
            "",
        )
    types_of = {Path: str, float: int | float}.get(kind, kind)
    if (
        multiple
        or not isinstance(value, types_of)
        or (isinstance(value, bool) and kind is not bool)
    ):
        names: dict[type, str] = {dict: "a table", list: "a list"}
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


def _read_once(ctx: click.Context, path: Path) -> Mapping[str, Any]:
    """`read_config`, cached for one command line: it chooses extensions and sets options."""
    kept = ctx.meta.setdefault("configs", {})
    if path not in kept:
        kept[path] = read_config(path)
    return kept[path]


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings from a TOML file, or from the `training` part of an earlier run's
    config.json.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; --config takes a TOML file or an earlier run's config.json"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSON, TOML or encoding errors, and numbers with 5,000 digits
        raise UserError(f"{path} cannot be read: {error}") from error
    found = found.get("training", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not settings by name")
    return {name.replace("-", "_"): value for name, value in found.items()}
