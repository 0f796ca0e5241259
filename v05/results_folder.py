"""The folder of a study or an evaluation: its settings, and each finished result as a line, so that it can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v05.errors import InputError
from v05.files import write_text


class ResultsFolder:
    """Results by key, in `results.jsonl`, of a study with the settings in `settings.json`."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], keys: Sequence[str], on_disk: Sequence[str] = ()
    ) -> None:
        """Open a folder, new or of a study with the same settings.

        Args:
            path: made where missing.
            settings: everything that a result depends on beside its key, as JSON can hold it.
            keys: fields that name a result.
            on_disk: fields that are too much for memory, and are in the file alone.

        Raises:
            InputError: the folder has a study with other settings.
        """
        self.path, self.keys, self.on_disk = path, tuple(keys), frozenset(on_disk)
        path.mkdir(parents=True, exist_ok=True)
        file = path / "settings.json"
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            saved, asked = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
            name = next(name for name in sorted({*saved, *asked}) if saved.get(name) != asked.get(name))
            values = f"{name} is {asked.get(name)!r} and was {saved.get(name)!r}"
            raise InputError(f"{path} has a study with other settings: {values}; allowed: the same, or another folder")
        if not file.exists():
            write_text(file, text)
        self.results: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._file = path / "results.jsonl"
        if not self._file.exists():
            return
        with self._file.open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # a line that was being written when it was stopped
                    self._keep(json.loads(line))

    def _keep(self, row: Mapping[str, Any]) -> None:
        kept = {name: value for name, value in row.items() if name not in self.on_disk}
        self.results[self._key(row)] = kept

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.keys)

    def has(self, **key: Any) -> bool:
        """Return whether a result is there."""
        return self._key(key) in self.results

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a result; it is on the disk when this returns."""
        with self._file.open("ab+") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            cut_off = stream.read(1) not in (b"", b"\n")
            stream.write((("\n" if cut_off else "") + json.dumps(row) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._keep(row)
