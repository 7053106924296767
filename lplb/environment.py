"""What `lplb env` tells: versions, devices, what this build can do, and what is missing."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import lplb
from lplb import _C, devices
from lplb.placement import Placement
from lplb.planner import Planner

__all__ = ["facts", "text"]

_EXAMPLE = "64 ranks, 256 experts, 512 slots"
_EXAMPLE_TOKENS, _EXAMPLE_PICKS = 4096, 8
_H100 = {"shared memory per block": 232448, "multiprocessors": 132}  # where there is no device to plan for


def facts() -> dict[str, Any]:
    """Everything there is to tell, by name, as JSON can hold it; lists have one entry per line of `text`."""
    seen = _devices()
    return {
        **_versions(),
        "devices": seen,
        "backends": [_cpu(), _cuda()],
        "linear algebra": _linear_algebra(),
        "MathDx": _C.mathdx_version or "not in this build",
        "DeepEP": _package("deep_ep") or "not installed",
        "NVSHMEM": _nvshmem(),
        "workspace": [_cpu_workspace(), *_cuda_workspace(seen[0] if seen else _H100)],
        "missing": list(_missing()),
    }


def text(told: dict[str, Any], as_json: bool = False) -> str:
    """The facts, one per line, or as JSON.

    Args:
        told: what `facts` returned.
        as_json: whether to write JSON.
    """
    if as_json:
        return json.dumps(told, indent=2)
    lines = []
    for name, value in told.items():
        for entry in value if isinstance(value, list) else [value]:
            words = ", ".join(f"{k} {v}" for k, v in entry.items()) if isinstance(entry, dict) else entry
            lines.append(f"{name}: {words}")
        if value == []:
            lines.append(f"{name}: none")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    can_say = driver is not None and torch.cuda.is_available()
    number = driver() if driver is not None and can_say else 0
    return {
        "lplb": lplb.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "CUDA of the build": _C.cuda_version or "none",
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of the driver": f"{number // 1000}.{number % 1000 // 10}" if can_say else "unknown",
    }


def _devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "shared memory per block": devices.shared_bytes(i),
                "code in this build": "no" if devices.no_code_for((properties.major, properties.minor)) else "yes",
            }
        )
    return found


def _cpu() -> dict[str, Any]:
    return {"backend": "CPU", "instruction set": _C.instruction_set, "threads": torch.get_num_threads()}


def _cuda() -> dict[str, Any]:
    return {"backend": "CUDA", "targets": " ".join(_C.cuda_targets) if _C.cuda else "none, not in this build"}


def _linear_algebra() -> dict[str, str]:
    try:
        chosen = devices.linalg()
    except (RuntimeError, ValueError) as error:
        chosen = f"none: {error}"
    given = os.environ.get("LPLB_LINALG")
    return {"in use": chosen, "LPLB_LINALG": given or "not set", "built": " ".join(_C.linalgs)}


def _package(module: str) -> str | None:
    """The version of an installed package, without importing it; ``None`` if it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in importlib.metadata.packages_distributions().get(module, []):
        return importlib.metadata.version(name)
    return "of unknown version"


def _nvshmem() -> dict[str, str]:
    wheels = [d for d in importlib.metadata.distributions() if (d.name or "").startswith("nvidia-nvshmem")]
    wheel = f"{wheels[0].name} {wheels[0].version}" if wheels else "not installed"
    return {"NVSHMEM_DIR": os.environ.get("NVSHMEM_DIR") or "not set", "wheel": wheel, "needed by": "DeepEP, not lplb"}


def _example() -> Placement:
    own = torch.arange(256, device="cpu").view(64, 4)
    return Placement(torch.cat([own, own.roll(-1, 0)], dim=1).flatten(), 64)


def _cpu_workspace() -> dict[str, Any]:
    return {"backend": "CPU", "example": _EXAMPLE, "bytes": Planner.from_placement(_example()).workspace_bytes}


def _cuda_workspace(device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not _C.cuda:
        return
    placement = _example()
    try:
        planner = _C.CudaPlanner(
            placement.phy2log.tolist(),
            placement.n_logical,
            placement.n_ranks,
            placement.n_ranks,
            [1.0] * placement.n_ranks,
            devices.linalg(),
            device["shared memory per block"],
            device["multiprocessors"],
        )
    except (RuntimeError, ValueError) as error:
        yield {"backend": "CUDA", "example": _EXAMPLE, "refused": str(error)}
        return
    yield {
        "backend": "CUDA",
        "example": _EXAMPLE,
        "tables": len(planner.tables),
        "scratch bytes": planner.scratch_bytes,
    }
    n = _EXAMPLE_TOKENS * _EXAMPLE_PICKS
    for kernel, blocks, threads, shared in planner.launches(n, 8, device["multiprocessors"], 1):
        yield {
            "backend": "CUDA",
            "kernel": kernel,
            "blocks": blocks,
            "threads": threads,
            "shared memory": shared,
            "for": f"{_EXAMPLE_TOKENS} x {_EXAMPLE_PICKS} int64 indices",
        }


def _missing() -> Iterator[str]:
    yield from devices.missing()
    for device in _devices():
        lacking = devices.no_code_for(torch.cuda.get_device_capability(device["device"]))
        if lacking:
            yield f"{device['device']}: {lacking}"
    if not _C.mathdx_version:
        yield f"cuSolverDx is not in this build (LPLB_LINALG=cusolverdx would select it): {devices.GET_MATHDX}"
    if not _package("deep_ep"):
        yield (
            "DeepEP is not installed (nothing needs it; Planner.init_from_deep_ep takes its buffers): "
            "https://github.com/deepseek-ai/DeepEP"
        )
    if not (_package("rich") and _package("matplotlib")):
        yield 'the commands beside env need rich, pictures matplotlib: pip install "lplb[demo]"'
    if not _package("plotly"):
        yield 'the report of lplb simulate needs plotly: pip install "lplb[report]"'
