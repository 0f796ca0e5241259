"""The command line as a whole: help that is quick and says what the commands say of themselves."""

import dataclasses
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from v05.cli import COMMANDS, app, load
from v05.training.config import TrainConfig
from v05.training.model_config import ModelConfig
from v05.training.stream_config import StreamConfig


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom v05.cli import main\nsys.argv[0] = 'v05'\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(("name", "place", "said"), COMMANDS, ids=[name for name, _, _ in COMMANDS])
def test_help_says_what_the_command_says(name: str, place: str, said: str) -> None:
    assert get_command(load(place)).help == said
    result = CliRunner().invoke(app, [name, "--help"], prog_name="v05")
    assert result.exit_code == 0
    assert f"Usage: v05 {name} " in result.output
    assert "--help" in result.output
    assert "--install-completion" not in result.output
    assert CliRunner().invoke(app, [name, "--no-such-option"]).exit_code == 2


@pytest.mark.parametrize("kind", [TrainConfig, ModelConfig, StreamConfig])
def test_help_of_train_shows_the_default_of_every_setting(kind: type) -> None:
    settings = {field.name: field.default for field in dataclasses.fields(kind) if field.default != ""}
    options = {option.name: option for option in get_command(load("v05.cli.train:train")).params}
    shown = {name: getattr(options[name], "show_default", None) for name in settings if name in options}
    assert shown
    assert shown == {name: str(settings[name]) for name in shown}
