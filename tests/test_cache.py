"""The embedding cache: found by content, bounded, shared by processes, and never trusted when damaged."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from v05.errors import InputError
from v05.value.cache import EmbeddingCache, content_key, default_folder


def entry(value: float, size: int = 100) -> dict[str, torch.Tensor]:
    return {"states": torch.full((size,), value, dtype=torch.bfloat16)}


def test_a_key_depends_on_every_part_and_on_where_it_ends() -> None:
    keys = [
        content_key("a", "b"),
        content_key("ab", ""),
        content_key("a", "c"),
        content_key("a"),
        content_key("\ud800"),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key("a", "b") == keys[0]


def test_what_is_put_is_found_by_another_object(tmp_path: Path) -> None:
    file, keys = tmp_path / "deep" / "cache.sqlite", [content_key(str(number)) for number in range(3)]
    EmbeddingCache(file).put({keys[0]: entry(1.5), keys[1]: {"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(0)}})
    found = EmbeddingCache(file).get([keys[1], keys[0], keys[2], keys[0]])
    assert set(found) == set(keys[:2])
    assert found[keys[0]]["states"].dtype == torch.bfloat16
    assert torch.equal(found[keys[0]]["states"], entry(1.5)["states"])
    assert torch.equal(found[keys[1]]["a"], torch.arange(6).reshape(2, 3))
    assert EmbeddingCache(file).get([]) == {}


def test_the_limit_is_kept_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache.sqlite", limit=4000)
    keys = [content_key(str(number)) for number in range(30)]
    for number, key in enumerate(keys):
        cache.put({key: entry(number)})
        assert cache.size <= 4000
        assert keys[0] in cache.get(keys[:1])  # used at every step, hence never removed
    assert keys[-1] in cache.get(keys[-1:])
    assert keys[1] not in cache.get(keys[1:2])
    assert 8 < len(cache) < 20
    cache.put({content_key("too large"): entry(0, 9000)})
    assert cache.size <= 4000


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom v05.value.cache import EmbeddingCache, content_key\n"
        "cache = EmbeddingCache(Path(sys.argv[1]), limit=60_000)\n"
        "for number in range(150):\n"
        "    key = content_key(sys.argv[2], str(number))\n"
        "    cache.put({key: {'states': torch.full((50,), float(number))}})\n"
        "    assert float(cache.get([key])[key]['states'][0]) == number\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(file), name]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    cache = EmbeddingCache(file, limit=60_000)
    assert cache.size <= 60_000
    assert cache.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    newest = [content_key(name, "149") for name in "ab"]
    assert cache.get(newest)
    assert len(cache) > 100


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    EmbeddingCache(file).close()
    file.write_bytes(file.read_bytes()[:100] + b"no longer a database" * 500)
    cache = EmbeddingCache(file)
    cache.put({content_key("x"): entry(2.0)})
    assert len(EmbeddingCache(file)) == 1


def test_what_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "done.jsonl"
    file.write_text('{"prompt": "mine", "score": 1}\n' * 99)
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"done.jsonl is no cache of embeddings"):
        EmbeddingCache(file)
    assert file.read_bytes() == before
    for place in (tmp_path, file / "cache.sqlite"):
        with pytest.raises(InputError, match="allowed: a file in a folder that can be written"):
            EmbeddingCache(place)


def test_a_cache_that_another_process_has_locked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.sqlite"
    holder = sqlite3.connect(file)
    holder.execute("CREATE TABLE other (x)")
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("v05.value.cache.WAIT_SECONDS", 0.05)
    with pytest.raises(InputError, match="locked"):
        EmbeddingCache(file)
    holder.rollback()
    assert holder.execute("SELECT COUNT(*) FROM other").fetchone() == (0,)
    assert file.exists()


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        EmbeddingCache(tmp_path / "c", limit=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "v05"
