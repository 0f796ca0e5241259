"""What tests of the command line share: a file of JSON Lines, and a command with its status and what it says."""

import json
import sys

import pytest

from v05.cli import main


def write(path, *lines):
    """Writes records, and text as it is; gives the path as text."""
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(capsys, monkeypatch, *arguments):
    """The exit status, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["v05", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err
