"""Options from dataclass fields, settings from files, and errors without traceback."""

from __future__ import annotations

import errno
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data import DataError
from pipeline.cli import Settings, UserError, command, from_record, setting


@dataclass(frozen=True)
class Config:
    word: str = setting("sample", "a word", choices=("sample", "folder"))
    place: Path | None = setting(None, "a place")
    number: int | None = setting(None, "a number")
    tags: tuple[str, ...] = setting((), "any number")
    quiet: bool = setting(False, "a switch")
    rate: float = setting(0.5, "a number")
    places: tuple[Path, ...] = setting((), "any number")

    def __post_init__(self):
        if self.number == 13:
            raise UserError("--number is 13, it must not be")


seen: list[Config] = []
failing: list[Exception] = []


@command(Config)
def main(config: Config) -> None:
    """A command."""
    seen.append(config)
    if failing:
        raise failing.pop()
    if config.number == 1:
        raise DataError("no photographs; put some there")
    if config.number == 2:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/x")
    if config.number == 3:
        raise KeyError("our own mistake")


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 3 TiB"), RuntimeError("DefaultCPUAllocator: "
                                                                         "can't allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 3 GiB"),
    RuntimeError("Storage size calculation overflowed with sizes=[2]"),
])  # fmt: skip
def test_too_little_memory_is_one_plain_message(error):
    failing.append(error)
    result = run()
    assert (
        result.exit_code == 2
        and result.stderr.count("Error:") == 1
        and "out of memory" in result.stderr
    )


def test_another_runtime_error_keeps_its_traceback():
    failing.append(RuntimeError("our own mistake"))
    assert isinstance(run().exception, RuntimeError)


def test_names_that_stdout_has_no_characters_for_are_printed_all_the_same():
    @command(Config)
    def tell(config: Config) -> None:
        """Print."""
        print("caf\udce9.png: 狗在跑")

    result = CliRunner(charset="ascii").invoke(tell, [])
    assert result.exit_code == 0 and result.stdout == "caf\\udce9.png: \\u72d7\\u5728\\u8dd1\n"


def test_flags_become_fields_with_their_types():
    run(
        "--word",
        "folder",
        "--place",
        "a/b",
        "--number",
        "5",
        "--tags",
        "x=1",
        "--tags",
        "y=2",
        "--quiet",
    )
    assert seen[-1] == Config("folder", Path("a/b"), 5, ("x=1", "y=2"), True)
    run()
    assert seen[-1] == Config()


@pytest.mark.parametrize("suffix", [".toml", ".json", "run.json"])
def test_settings_come_from_a_file_and_flags_win(tmp_path, suffix):
    file = tmp_path / f"config{suffix}"
    values = {"number": 5, "word": "folder", "tags": ["x"], "place": "here"}
    if suffix == ".toml":
        file.write_text('number = 5\nword = "folder"\ntags = ["x"]\nplace = "here"')
    else:
        file.write_text(
            json.dumps({"model": {}, "training": values} if suffix == "run.json" else values)
        )
    assert run("--config", str(file), "--number", "6").exit_code == 0
    assert seen[-1] == Config("folder", Path("here"), 6, ("x",))


@pytest.mark.parametrize(
    ("text", "message"),
    [("numbr = 5", "unknown setting 'numbr'; did you mean 'number'?"), ("word = ", "cannot be "
                                                                                   "read"),
     ("number = 'x'", "--number"), ("word = 'samle'", "Did you mean 'sample'?")],
)  # fmt: skip
def test_a_wrong_settings_file_is_named(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    result = run("--config", str(tmp_path / "c.toml"))
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert run("--config", str(tmp_path / "absent.toml")).exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"number": [1]}', "number is a list, not a whole number (--number)"),
        ('{"number": {"a": 1}}', "number is a table, not a whole number"),
        ('{"number": 1.5}', "number is float '1.5', not a whole number"),
        ('{"number": true}', "number is bool 'True', not a whole number"),
        ('{"number": "5"}', "number is str '5', not a whole number"),
        ('{"number": 1e999}', "number is float 'inf', not a whole number"),
        ('{"number": NaN}', "number is float 'nan', not a whole number"),
        (f'{{"number": {10**30}}}', "number is a number that is too large"),
        (f'{{"number": {"9" * 5000}}}', "cannot be read"),
        (f'{{"rate": {"9" * 400}}}', "rate is a number that is too large"),
        ('{"rate": NaN}', "rate is nan, not a finite number"),
        ('{"rate": -Infinity}', "rate is -inf, not a finite number"),
        ('{"rate": [0.1]}', "rate is a list, not a number"),
        ('{"word": ["sample"]}', "word is a list, not text"),
        ('{"word": 5}', "word is int '5', not text"),
        ('{"quiet": "perhaps"}', "quiet is str 'perhaps', not true or false"),
        ('{"quiet": 1}', "quiet is int '1', not true or false"),
        ('{"quiet": []}', "quiet is a list, not true or false"),
        ('{"tags": "left"}', "tags is str 'left', not a list, each text"),
        ('{"tags": [["a"]]}', "tags is a list with a list, not text"),
        ('{"tags": [null]}', "tags is a list with NoneType 'None', not text"),
        ('{"places": {"a": "b"}}', "places is a table, not a list, each a path"),
        ('{"place": 3}', "place is int '3', not a path"),
        ('{"place": "a\\u0000b"}', "place is text with a character"),
        ('{"tags": ["\\ud800"]}', "tags is a list with text with a character"),
        ('{"number": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read"),
        ('{"training": [1]}', "holds list, not settings by name"),
        ('[{"number": 1}]', "holds list, not settings by name"),
        ("5", "holds int, not settings by name"),
        ("null", "holds NoneType, not settings by name"),
        ("", "cannot be read"),
        ('{"\\n' + "x" * 5000 + '": 1}', "unknown setting"),
    ],
)
def test_hostile_json_is_one_plain_message(tmp_path, text, message):
    check_hostile(tmp_path / "c.json", text, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number = [1]", "number is a list, not a whole number (--number)"),
        ("[number]\na = 1", "number is a table, not a whole number"),
        ("number = 1979-05-27", "number is date '1979-05-27', not a whole number"),
        ("word = 07:32:00", "word is time '07:32:00', not text"),
        ("rate = nan", "rate is nan, not a finite number"),
        ("rate = inf", "rate is inf, not a finite number"),
        ("number = 0x" + "f" * 10_000, "number is a number that is too large"),
        ("number = " + "9" * 5000, "cannot be read"),
        ("number = " + "[" * 50_000 + "]" * 50_000, "cannot be read"),
        ("number = 1\nnumber = 2", "cannot be read"),
        ("[[training]]\nnumber = 1", "holds list, not settings by name"),
        ("tags = 'left'", "tags is str 'left', not a list, each text"),
    ],
)
def test_hostile_toml_is_one_plain_message(tmp_path, text, message):
    check_hostile(tmp_path / "c.toml", text, message)


def check_hostile(file, text, message):
    file.write_text(text)
    result = run("--config", str(file))
    assert result.exit_code == 2 and message in result.output and str(file) in result.output
    assert isinstance(result.exception, SystemExit) and len(result.output) < 1000


def test_a_settings_file_that_the_system_does_not_give_is_one_plain_message(tmp_path, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text("number = 5")

    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(Path, "read_text", refuse)
    result = run("--config", str(file))
    assert (result.exit_code, result.output) == (2, f"Error: {file}: Input/output error\n")
    assert run("--config", str(tmp_path)).exit_code == run("--config", "a" * 5000).exit_code == 2


def test_settings_of_windows_and_whole_numbers_for_others_are_read(tmp_path):
    (tmp_path / "c.JSON").write_bytes(
        b'\xef\xbb\xbf{"rate": 1, "places": ["a"], "number": null, "quiet": true}'
    )
    assert run("--config", str(tmp_path / "c.JSON")).exit_code == 0
    assert seen[-1] == Config(rate=1.0, places=(Path("a"),), quiet=True)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused_as_a_flag_too(value):
    result = run("--rate", value)
    assert result.exit_code == 2 and "is not a finite number" in result.output
    result = run("--number", str(10**30))
    assert result.exit_code == 2 and "too large" in result.output


@pytest.mark.parametrize(
    ("number", "message"),
    [("1", "Error: no photographs; put some there"), ("2", "Error: cache/x: No space left on "
                                                           "device"),
     ("13", "Error: --number is 13, it must not be")],
)  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_2(number, message):
    result = run("--number", number)
    assert (result.exit_code, result.output.strip()) == (2, message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOLCK, "No locks available", "cache/shard.h5"),
            "cache/shard.h5: No locks available",
        ),
        (OSError(errno.EIO, "Input/output error", b"a/b"), "a/b: Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle", 7), "file descriptor 7: Stale file handle"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
            "a to b: Invalid cross-device link",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file or folder (the system does not say which): No space left",
        ),
        (OSError(errno.ELOOP, None, "a"), "a: Too many levels of symbolic links"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (
            TimeoutError(errno.ETIMEDOUT, "Connection timed out", "nfs/x"),
            "nfs/x: Connection timed out",
        ),
    ],
)
def test_whatever_the_system_refuses_is_one_plain_message(error, message):
    failing.append(error)
    result = run()
    assert (
        result.exit_code == 2 and result.output.startswith("Error: ") and message in result.output
    )
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [OSError("no errno"), ValueError("x"), AssertionError(), RuntimeError("x"), TypeError("x")],
)
def test_an_error_that_is_not_of_the_system_keeps_its_traceback(error):
    failing.append(error)
    assert run().exception is error


def test_our_own_mistake_keeps_its_traceback():
    assert isinstance(run("--number", "3").exception, KeyError)


def test_an_unknown_choice_is_answered_with_the_nearest():
    result = run("--word", "sampel")
    assert result.exit_code == 2 and "Did you mean 'sample'?" in result.output


@pytest.mark.parametrize("stage", ["extract", "train", "evaluate", "caption", "ask"])
def test_every_setting_of_every_command_is_checked_and_a_run_s_own_record_is_taken(
    stage, tmp_path, monkeypatch
):
    main = importlib.import_module(f"pipeline.{stage}").main
    options = [each for each in main.params if each.name != "config"]
    file = tmp_path / "c.json"
    for option in options:
        file.write_text(json.dumps({option.name: {"a": 1}}))
        result = CliRunner().invoke(main, ["--config", str(file)])
        assert (
            result.exit_code == 2 and f"{file}: {option.name} is a table, not" in result.output
        ), option.name
    taken = []
    monkeypatch.setattr(main, "callback", lambda **values: taken.append(values))
    defaults = {each.name: each.default for each in options if isinstance(each, click.Option)}
    file.write_text(json.dumps({"model": {}, "training": defaults}, default=str))
    main.main(["--config", str(file)], standalone_mode=False)
    assert defaults.items() <= taken[0].items()


@dataclass(frozen=True)
class Several(Settings):
    file: Path | None = setting(None, "a file")
    files: tuple[Path, ...] = setting((), "files")
    number: int | None = setting(None, "a number")
    flag: bool = setting(False, "a flag")
    names: tuple[str, ...] = setting((), "names")


@pytest.mark.parametrize(
    "settings",
    [Several(), Several(Path("a"), (Path("b"), Path("c")), 3, True, ("d", "e"))],
)
def test_a_record_of_settings_gives_them_back_with_their_types(settings):
    record = json.loads(json.dumps(settings.record()))
    assert from_record(Several, {**record, "other": 1}) == settings
