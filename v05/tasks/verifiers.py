"""Verifiers: functions of prompt, completion and record that say what an answer is worth."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final, Protocol

from v05.errors import InputError
from v05.tasks.exact import Exact
from v05.tasks.mathematics import Mathematics


class Verifier(Protocol):
    """Judges one answer."""

    def __call__(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        """Return the reward, in the task's range, of answering `completion` to `prompt`.

        Args:
            prompt: as the policy got it, without the chat template.
            completion: the answer without special tokens.
            record: the data's line: `prompt`, `answer` and whatever else it holds.
        """
        ...


VERIFIERS: Final[Mapping[str, Callable[[tuple[float, float]], Verifier]]] = MappingProxyType(
    {"exact": Exact, "math": Mathematics}
)


def make_verifier(name: str, reward_range: tuple[float, float]) -> Verifier:
    """Return the verifier called `name`.

    Args:
        name: one of `VERIFIERS`; or the import path of a callable, `package.module:function`; or one in a file,
            `folder/file.py:function`.
        reward_range: smallest and largest reward.

    Returns:
        The verifier; of an imported one nothing is known but that it can be called.

    Raises:
        InputError: no verifier has that name, or it cannot be imported.
    """
    if name in VERIFIERS:
        return VERIFIERS[name](reward_range)
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute):
        allowed = f"{', '.join(VERIFIERS)}, package.module:function or file.py:function"
        raise InputError(f"verifier is {name!r}; allowed: {allowed}")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise InputError(f"verifier {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(f"verifier {name!r} is a {type(function).__name__}; allowed: a callable")
    found: Verifier = function
    return found


def needs_answer(verifier: Verifier) -> bool:
    """Return whether a verifier reads `answer` from every record."""
    return bool(getattr(verifier, "needs_answer", False))


def source_digest(verifier: Verifier) -> str:
    """Return 16 hexadecimal digits that depend on the file that defines a verifier; empty where it has none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(verifier) if inspect.isroutine(verifier) else type(verifier))
    except TypeError:
        file = None
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"v05_verifier_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    return module
