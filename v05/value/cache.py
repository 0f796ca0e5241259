"""Embeddings on disk: found by content, bounded in size, shared by any number of processes."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from safetensors.torch import load, save
from torch import Tensor

from v05.errors import InputError

DEFAULT_LIMIT: Final = 4 * 2**30  # bytes
FORMAT: Final = 1  # part of every key: a change of what is stored finds nothing old
WAIT_SECONDS: Final = 60.0  # for another process's write
BATCH: Final = 500  # keys in one query
SQLITE: Final = b"SQLite format 3\0"  # how a database begins


def default_folder() -> Path:
    """Return the user's cache folder, $XDG_CACHE_HOME/v05 or ~/.cache/v05."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v05"


def content_key(*parts: str) -> bytes:
    """Return a key of 32 bytes that depends on every part and on where one ends and the next begins."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for part in parts:
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.digest()


class EmbeddingCache:
    """Tensors by content key in one SQLite file; the ones used longest ago go first when it is full."""

    def __init__(self, file: Path, limit: int = DEFAULT_LIMIT) -> None:
        """Open or make a cache; a damaged one is replaced, any other file is left alone.

        Args:
            file: of the cache; its folder is made where missing.
            limit: bytes of stored tensors at most.

        Raises:
            ValueError: `limit` is not above 0.
            InputError: the file is something else, or cannot be opened or made.
        """
        if not limit > 0:
            raise ValueError(f"limit is {limit}; allowed: above 0 bytes")
        self.file, self.limit = file, limit
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
        except (OSError, sqlite3.OperationalError) as error:  # such as locked or read-only: it may be whole
            raise InputError(f"cache {file}: {error}; allowed: a file in a folder that can be written") from None
        except sqlite3.DatabaseError:
            with file.open("rb") as stream:
                if stream.read(len(SQLITE)) != SQLITE:
                    raise InputError(f"{file} is no cache of embeddings; allowed: one, or a free name") from None
            for path in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
                path.unlink(missing_ok=True)
            self._connect()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, dict[str, Tensor]]:
        """Return the stored tensors of those keys that are there, and mark them as used."""
        found: dict[bytes, dict[str, Tensor]] = {}
        unique = list(dict.fromkeys(keys))
        for start in range(0, len(unique), BATCH):
            part = unique[start : start + BATCH]
            marks = ",".join("?" * len(part))
            rows = self.connection.execute(f"SELECT key, value FROM entries WHERE key IN ({marks})", part)
            found |= {bytes(key): load(value) for key, value in rows}
        if found:
            with self.connection:
                now = time.time_ns()
                self.connection.executemany("UPDATE entries SET used = ? WHERE key = ?", [(now, key) for key in found])
        return found

    def put(self, entries: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Store tensors by key, all or none; then remove what was used longest ago until the limit is kept."""
        rows = []
        for key, tensors in entries.items():
            value = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            rows.append((key, time.time_ns(), len(value), value))
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", rows)
            self._evict()

    @property
    def size(self) -> int:
        """Return the bytes stored."""
        return int(self.connection.execute("SELECT COALESCE(SUM(size), 0) FROM entries").fetchone()[0])

    def __len__(self) -> int:
        """Return the number of keys."""
        return int(self.connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        self.connection.close()

    def _connect(self) -> None:
        self.connection = sqlite3.connect(self.file, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, used INTEGER, size INTEGER, value BLOB)"
            )
            self.connection.execute("CREATE INDEX IF NOT EXISTS by_use ON entries (used, size)")
        except sqlite3.DatabaseError:
            self.connection.close()
            raise

    def _evict(self) -> None:
        excess = self.size - self.limit
        if excess <= 0:
            return
        old = []
        for key, size in self.connection.execute("SELECT key, size FROM entries ORDER BY used, rowid"):
            if excess <= 0:
                break
            old.append((key,))
            excess -= size
        self.connection.executemany("DELETE FROM entries WHERE key = ?", old)
