"""Settings: defaults, files, overrides, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from v05.errors import InputError
from v05.training.config import TrainConfig, make_config
from v05.training.loss_config import LossConfig
from v05.training.model_config import ModelConfig
from v05.training.stream_config import StreamConfig

COMMANDS = (Path(__file__).resolve().parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")


def test_fewer_than_twenty_settings() -> None:
    assert len(dataclasses.fields(TrainConfig)) < 20


@pytest.mark.parametrize(
    ("name", "text"), [("run.toml", 'algorithm = "grpo:8"\nrollouts = 512\n'), ("run.json", '{"algorithm": "grpo:8"}')]
)
def test_files_override_defaults_and_options_override_files(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert make_config(file).algorithm == "grpo:8"
    assert make_config(file, {"algorithm": "rloo", "seed": 3}).algorithm == "rloo"
    assert make_config(file, {"seed": 3}).seed == 3


def test_settings_survive_json() -> None:
    config = make_config(None, {"cost": 0.01, "learning_rate": 1})
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("rolouts = 5\n")
    with pytest.raises(InputError, match=r"unknown key 'rolouts' in .*run.toml; allowed: .*rollouts"):
        make_config(file)
    with pytest.raises(InputError, match="unknown key 'x'"):
        make_config(None, {"x": 1})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rollouts", 0, "1 or more"),
        ("rollouts", 12.5, "int"),
        ("rollouts", True, "int"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("temperature", float("inf"), "finite"),
        ("seed", -1, "0 or more"),
        ("cost", float("inf"), "finite"),
        ("prior", "oracle", "v0, history, constant, none"),
        ("algorithm", 4, "str"),
    ],
)
def test_bad_values_are_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError, match=f"{name} is .*allowed: .*{allowed}"):
        make_config(None, {name: value})


def test_bad_files_are_refused(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.toml", "rollouts =", "a.toml"),
        ("a.json", "[1]", "holds a list"),
        ("a.yaml", "rollouts: 1", "allowed: .toml, .json"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            make_config(tmp_path / name)


@pytest.mark.parametrize(
    ("table", "kind"),
    [("top level", TrainConfig), ("`[model]`", ModelConfig), ("`[sampling]`", StreamConfig), ("`[loss]`", LossConfig)],
)
def test_the_documented_settings_are_all_there_are_with_their_defaults(table: str, kind: type) -> None:
    [rows] = re.findall(
        rf"^\| {re.escape(table)} \| default \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", COMMANDS, re.MULTILINE
    )
    documented = [tuple(row.split(" | ", 2)) for row in rows.splitlines()]
    expected = [
        (f"| `{field.name}`", "none" if field.default is None else f"`{json.dumps(field.default)}`")
        for field in dataclasses.fields(kind)
    ]
    assert [row[:2] for row in documented] == expected
    assert all(len(meaning) > 8 for _, _, meaning in documented)
