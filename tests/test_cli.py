"""Options from dataclass fields, settings from files, and errors without traceback."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from data import DataError
from pipeline.cli import UserError, command, setting


@dataclass(frozen=True)
class Config:
    word: str = setting("sample", "a word", choices=("sample", "folder"))
    place: Path | None = setting(None, "a place")
    number: int | None = setting(None, "a number")
    tags: tuple[str, ...] = setting((), "any number")
    quiet: bool = setting(False, "a switch")

    def __post_init__(self):
        if self.number == 13:
            raise UserError("--number is 13, it must not be")


seen: list[Config] = []


@command(Config)
def main(config: Config) -> None:
    """A command."""
    seen.append(config)
    if config.number == 1:
        raise DataError("no photographs; put some there")
    if config.number == 2:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/x")
    if config.number == 3:
        raise KeyError("our own mistake")


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_flags_become_fields_with_their_types():
    run("--word", "folder", "--place", "a/b", "--number", "5", "--tags", "x=1", "--tags", "y=2", "--quiet")
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
        file.write_text(json.dumps({"model": {}, "training": values} if suffix == "run.json" else values))
    assert run("--config", str(file), "--number", "6").exit_code == 0
    assert seen[-1] == Config("folder", Path("here"), 6, ("x",))


@pytest.mark.parametrize(
    ("text", "message"),
    [("numbr = 5", "unknown setting 'numbr'; did you mean 'number'?"), ("word = ", "cannot be read"),
     ("number = 'x'", "--number"), ("word = 'samle'", "Did you mean 'sample'?")],
)  # fmt: skip
def test_a_wrong_settings_file_is_named(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    result = run("--config", str(tmp_path / "c.toml"))
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert run("--config", str(tmp_path / "absent.toml")).exit_code == 2


@pytest.mark.parametrize(
    ("number", "message"),
    [("1", "Error: no photographs; put some there"), ("2", "Error: cache/x: No space left on device"),
     ("13", "Error: --number is 13, it must not be")],
)  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_2(number, message):
    result = run("--number", number)
    assert (result.exit_code, result.output.strip()) == (2, message)


def test_our_own_mistake_keeps_its_traceback():
    assert isinstance(run("--number", "3").exception, KeyError)


def test_an_unknown_choice_is_answered_with_the_nearest():
    result = run("--word", "sampel")
    assert result.exit_code == 2 and "Did you mean 'sample'?" in result.output
