"""All settings of one run together: of the algorithm, of a user's model, of sampling, and of the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from v05.errors import InputError
from v05.training.config import CHANGEABLE, TABLES, TrainConfig, make_config, read_settings
from v05.training.loss_config import PLAIN, LossConfig, make_loss_config
from v05.training.model_config import ModelConfig, make_model_config
from v05.training.stream_config import BATCHES, StreamConfig, make_stream_config

MODEL_RATE: Final = 1e-6  # learning rate of a user's model where none is given


@dataclass(frozen=True)
class Settings:
    """What a run is started with and resumed with.

    Attributes:
        config: of the algorithm.
        model: of a model of the user's and its data; None for the task and the small policy that `config` names.
        stream: of sampling.
        loss: its options.
    """

    config: TrainConfig
    model: ModelConfig | None = None
    stream: StreamConfig = BATCHES
    loss: LossConfig = PLAIN

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Return the settings by name of each file in the run's folder; a file without settings is not written."""
        return {
            "config.json": self.config.to_dict(),
            "model.json": {} if self.model is None else self.model.to_dict(),
            "sampling.json": self.stream.to_dict() if self.stream.streams else {},
            "loss.json": {} if self.loss == PLAIN else self.loss.to_dict(),
        }


def make_settings(
    file: Path | None,
    folder: Path,
    resume: bool,
    given: Mapping[str, Any],
    model: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> Settings:
    """Return the settings of a new run, or those of the run to resume; what is given overrides both.

    Args:
        file: TOML or JSON, with tables `TABLES`; None for none.
        folder: of the run.
        resume: go on with the run in `folder` where there is one.
        given, model, sampling: settings by name, as on the command line.

    Raises:
        InputError: a setting or a file that is not allowed.
    """
    saved = resume and file is None and (folder / "config.json").exists()
    if saved:
        file = folder / "config.json"
        places = {name: folder / f"{name}.json" for name in TABLES}
        tables = {name: read_settings(place) for name, place in places.items() if place.exists()}
    else:
        if file is not None and not file.exists():
            raise InputError(f"--config is {file}, which does not exist")
        tables = {} if file is None else read_settings(file)
        before = read_settings(folder / "config.json") if resume and (folder / "config.json").exists() else {}
        given = {name: before[name] for name in CHANGEABLE if name in before and name not in tables} | dict(given)
    where = str(folder if saved else file)
    user = make_model_config(tables.get("model", {}), model, where)
    if user is not None and not saved and "learning_rate" not in {**tables, **given}:
        given = {**given, "learning_rate": MODEL_RATE}
    stream = make_stream_config(tables.get("sampling", {}), sampling, where)
    return Settings(make_config(file, given), user, stream, make_loss_config(tables.get("loss", {}), where))
