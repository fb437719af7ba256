"""Outputs that are whole."""

from pathlib import Path

import pytest

from gcrm_fast.common.files import written_aside


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
