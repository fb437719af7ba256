"""Outputs that are whole, lines that any reader takes, messages that a terminal only shows."""

import json
import math
from pathlib import Path

import pytest

from gcrm_fast.checkpoints.locating import MODEL_FILES, TOKENIZER_FILES, locate
from gcrm_fast.common.command_line import exit_code
from gcrm_fast.common.errors import UserError
from gcrm_fast.common.files import written_aside
from gcrm_fast.common.json_lines import json_line


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_is_complete_or_as_before(kind: str, tmp_path: Path) -> None:
    path, partial = tmp_path / "out", tmp_path / "out.partial"

    def write(where: Path, text: str) -> None:
        if kind == "folder":
            where.mkdir()
        (where / text if kind == "folder" else where).write_text(text)

    def read() -> list[str]:
        return [p.read_text() for p in ([path] if kind == "file" else path.iterdir())]

    def fail() -> None:
        with written_aside(path) as aside:
            write(aside, "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(tmp_path.iterdir())
    write(partial, "of a run that was killed")
    with written_aside(path) as aside:
        write(aside, "first")
        assert not path.exists()
    with written_aside(path) as aside:
        write(aside, "second")
        assert read() == ["first"]  # what is there is replaced in the end
    assert read() == ["second"]
    with pytest.raises(ZeroDivisionError):
        fail()
    assert read() == ["second"]
    (tmp_path / "link").symlink_to(path)
    with written_aside(tmp_path / "link") as aside:
        write(aside, "third")
    assert read() == ["third"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", path]


def test_output_lines_are_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json_line({"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf, "d": "NaN"}], "e": "\ud800", "f": True})
    read = json.loads(line, parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, None, {"c": None, "d": "NaN"}], "e": "\ud800", "f": True}


def test_messages_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("field 'x' is \x1b[2J\x07\nédit\udcff")

    assert exit_code("gcrm score", fail) == 2
    assert capsys.readouterr().err == "gcrm score: field 'x' is \\x1b[2J\\x07\\nédit\\udcff\n"


def test_the_folder_of_a_run_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=f"MODEL {tmp_path}: is the folder of a run: name its model, {tmp_path}/model$"):
        locate(str(tmp_path), "MODEL", MODEL_FILES)
    (tmp_path / "config.json").touch()
    assert locate(str(tmp_path), "MODEL", MODEL_FILES) == tmp_path


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--model {tmp_path}: holds no config.json"):
        locate(str(tmp_path), "--model", MODEL_FILES)
    assert locate(str(tmp_path), "--tokenizer", TOKENIZER_FILES) == tmp_path
