"""Tokens on disk: read back as built, rebuilt where damaged or foreign, built once by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gcrm_fast.data.encoding import cache_key, encode_pairs, tokenize_pairs
from gcrm_fast.data.records import Pair
from gcrm_fast.data.token_cache import TokenCache, cache_folder
from gcrm_fast.data.tokenization import train_tokenizer
from support.chat import TEXTS

TOKENIZER = train_tokenizer(TEXTS, 300)
PAIRS = [Pair("hello", " world 1", " world 2"), Pair("hello", " yes", " 3", chosen_cut=True)]


def unexpected() -> dict[str, np.ndarray]:
    raise AssertionError("the entry is there")


def fill(folder: Path) -> Path:
    """The one entry of a cache of PAIRS."""
    with TokenCache(folder) as cache:
        tokenize_pairs(TOKENIZER, PAIRS, 100, cache=cache)
    [entry] = folder.iterdir()
    return entry


def check_entry(folder: Path) -> None:
    """The entry of PAIRS is there, and as it is built."""
    built = encode_pairs(TOKENIZER, PAIRS)
    with TokenCache(folder) as cache:
        found = cache.get(cache_key(TOKENIZER, PAIRS), unexpected)
        assert not cache.holds_lock
    assert found.keys() == built.keys()
    for name, array in built.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_entry_is_read_back_as_it_was_built(tmp_path):
    fill(tmp_path / "cache")
    check_entry(tmp_path / "cache")


def test_key_is_all_that_tokens_depend_on():
    other = train_tokenizer(TEXTS, 280)
    no_bos = train_tokenizer(TEXTS, 300)
    no_bos.bos_token = None
    ends_turns = train_tokenizer(TEXTS, 300)
    ends_turns.chat_template = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    variants = [
        (TOKENIZER, PAIRS[:1]),
        (TOKENIZER, PAIRS[::-1]),
        (TOKENIZER, [Pair("hell", "o world 1", " world 2"), PAIRS[1]]),  # the same text, cut elsewhere
        (TOKENIZER, [PAIRS[0], Pair("hello", " yes", " 3")]),
        (other, PAIRS),
        (no_bos, PAIRS),
        (ends_turns, PAIRS),
    ]
    keys = {cache_key(tokenizer, pairs) for tokenizer, pairs in [(TOKENIZER, PAIRS), *variants]}
    assert len(keys) == 1 + len(variants)
    elsewhere = [
        Pair(p.prompt, p.chosen, p.rejected, margin=1.0, where="x:1", fields={"n": 1}, chosen_cut=p.chosen_cut)
        for p in PAIRS
    ]
    assert cache_key(TOKENIZER, elsewhere) in keys  # margins, places and fields have no tokens


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change_a_token(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def other_program(path: Path) -> None:
    save_file({"ids": np.zeros(3, dtype=np.int32)}, path)


def other_entry(path: Path) -> None:
    with TokenCache(path.parent) as cache:
        cache.get("other", lambda: encode_pairs(TOKENIZER, PAIRS[:1]))
    path.write_bytes((path.parent / "other.safetensors").read_bytes())


def text(path: Path) -> None:
    path.write_text("not a cache")


@pytest.mark.parametrize("damage", [cut_short, change_a_token, other_program, other_entry, text])
def test_damaged_or_foreign_entry_is_told_and_rebuilt(tmp_path, capsys, damage):
    entry = fill(tmp_path / "cache")
    damage(entry)
    capsys.readouterr()
    with TokenCache(tmp_path / "cache") as cache:
        assert len(tokenize_pairs(TOKENIZER, PAIRS, 100, cache=cache)[0]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"gcrm train: warning: {entry}: is damaged or not a token cache of this program: tokenizing again"
    check_entry(tmp_path / "cache")


def test_error_leaves_nothing(tmp_path):
    def fail() -> None:
        with TokenCache(tmp_path / "cache") as cache:
            cache.get("a", lambda: encode_pairs(TOKENIZER, PAIRS))
            assert cache.holds_lock
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_used_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with TokenCache(tmp_path / "file" / "cache") as cache:
        assert len(tokenize_pairs(TOKENIZER, PAIRS, 100, cache=cache)[0]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the token cache cannot be used (Not a directory): continuing without it" in line


def test_folder_of_the_option(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder("auto") == Path("/x/gcrm_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "gcrm_fast"
    assert cache_folder("none") is None
    assert cache_folder("some/where") == Path("some/where")


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
import numpy as np
from gcrm_fast.data.token_cache import TokenCache
def build():
    print("built", flush=True)
    time.sleep(1)
    return {"ids": np.arange(5)}
sys.stdin.read()  # all start at once
with TokenCache(Path(sys.argv[1])) as cache:
    assert cache.get("key", build)["ids"].tolist() == [0, 1, 2, 3, 4]
"""


def test_one_of_several_processes_builds(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_SLOWLY, str(tmp_path / "cache")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdin
        worker.stdin.close()
    said = [worker.stdout.read() for worker in workers if worker.stdout]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert sorted(said) == ["", "", "built\n"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key.safetensors"]
