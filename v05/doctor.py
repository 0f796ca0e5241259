"""What runs here: versions, devices, and which backend runs each op, with the reason why the others do not."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from v05 import __version__
from v05.kernels import dispatch

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "vllm", "trl", "verl", "tabpfn", "flash-attn")


@dataclass(frozen=True)
class BackendReport:
    """One op on one device: the backend chosen, and for each backend None or the reason why it cannot run."""

    op: str
    device: str
    chosen: str
    reasons: dict[str, str | None]


def versions() -> dict[str, str]:
    """Return the version of v05, Python and each package that v05 can use; `"-"` where it is not installed."""
    found = {"v05": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    found["torch"] = str(torch.__version__)  # names the build (+cu132), which a wheel's own name may not
    return found


def devices() -> dict[str, str]:
    """Return the processor with its vector units and threads, and every GPU."""
    vector = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{platform.machine()}, {vector}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    return found


def backends() -> list[BackendReport]:
    """Return for every op, on the CPU and on a GPU where there is one, what runs and why the rest does not."""
    types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        BackendReport(
            op,
            kind,
            dispatch.choose(op, kind),
            {name: dispatch.why_not(op, name, kind) for name in dispatch.BACKENDS},
        )
        for kind in types
        for op in dispatch.OPS
    ]
