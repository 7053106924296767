"""Which devices this build of lplb and this torch can run on, and what is missing where they cannot."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from lplb import _C

LINALGS = ("builtin", "cusolverdx")
"""Values of the environment variable LPLB_LINALG: whose Cholesky factorisation the CUDA backend uses."""

# opt-in shared memory of a block, in bytes, by capability: for torch before 2.6, whose properties do not tell
_SHARED_BYTES = {
    (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448,
    (10, 0): 232448, (10, 1): 232448, (10, 3): 232448, (12, 0): 101376, (12, 1): 101376,
}  # fmt: skip


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a device that this build, this torch or this machine cannot run on.

    Args:
        name: what the caller calls the device.
        device: the device; "cuda" without a number stands for the current one.

    Raises:
        RuntimeError: with what is missing and how to get it.
    """
    if device.type == "cpu":
        return
    instead = "Or keep the tensors on the CPU: tensor.cpu(), or device='cpu' where they are made"
    if device.type != "cuda":
        raise RuntimeError(
            f"{name} is {str(device)!r}, and lplb has no {device.type.upper()} backend, allowed are the CPU and, in "
            f"builds with it, CUDA. {instead}"
        )
    lacking = next(missing(), None)
    if lacking is None and device.index is not None and device.index >= torch.cuda.device_count():
        lacking = f"torch sees {torch.cuda.device_count()} CUDA devices; allowed is an index below that"
    if lacking is None:
        lacking = no_code_for(torch.cuda.get_device_capability(device))
    if lacking is not None:
        raise RuntimeError(f"{name} is {str(device)!r}, and {lacking}. {instead}")


def made_current(device: object) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device current; for anything else, also what will be refused, change nothing."""
    try:
        found = torch.device(device)  # type: ignore[call-overload, unused-ignore]
        check_backend("device", found)
    except (RuntimeError, TypeError):
        return contextlib.nullcontext()
    return torch.cuda.device(found) if found.type == "cuda" else contextlib.nullcontext()


def refuse_capture(device: torch.device, method: str) -> None:
    """Refuse what waits for the device while a CUDA graph is captured, before it spoils the capture."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{method} waits for the device, which CUDA graph capture does not allow; run can be captured"
        )


def missing() -> Iterator[str]:
    """What the CUDA backend lacks whatever the device, and how to get it; nothing where all is there."""
    if not _C.cuda:
        yield (
            "this build of lplb has no CUDA backend, only the CPU's: build it where there is a CUDA toolkit (nvcc on "
            "PATH, or CUDA_HOME); LPLB_CUDA=1 in the environment of the build makes it say what it does not find"
        )
    if torch.version.cuda is None:
        yield f"this torch ({torch.__version__}) has no CUDA: install one that has, https://pytorch.org/get-started"
    elif not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield (
            "torch finds no CUDA device: nvidia-smi tells whether there is a driver and a device, and "
            f"CUDA_VISIBLE_DEVICES is {'not set' if visible is None else repr(visible)}"
        )


def no_code_for(capability: tuple[int, int]) -> str | None:
    """Say that the build has no machine code and no PTX for a compute capability; ``None`` where it has."""
    if any(_runs_on(target, capability) for target in _C.cuda_targets):
        return None
    major, minor = capability
    if capability < (8, 0):
        return f"it has compute capability {major}.{minor}, allowed is 8.0 or newer"
    return (
        f"it has compute capability {major}.{minor}, for which this build has no code, only {' '.join(_C.cuda_targets)}"
        f": build lplb with LPLB_CUDA_TARGETS=sm_{major}{minor}"
    )


def _runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Machine code runs within its major version, from its minor on; PTX on whatever is not older; sm_90a only there.

    The rules are those of the CUDA programming guide, "Binary Compatibility" and "PTX Compatibility".
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target)
    if parts is None:
        return False
    version = int(parts[2]), int(parts[3])
    if parts[4] == "a":
        return version == capability
    if parts[1] == "sm" or parts[4] == "f":
        return version[0] == capability[0] and version[1] <= capability[1]
    return version <= capability


def shared_bytes(device: torch.device | int) -> int:
    """Shared memory that one block may have on a CUDA device when it asks for it, in bytes."""
    told = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return int(told) if told else _SHARED_BYTES.get(torch.cuda.get_device_capability(device), 101376)


def linalg() -> str:
    """The linear algebra of the CUDA backend: LPLB_LINALG in the environment, by default "builtin".

    Raises:
        ValueError: it is neither of `LINALGS`.
        RuntimeError: it is not in this build; the message says how to get it.
    """
    name = os.environ.get("LPLB_LINALG") or LINALGS[0]
    if name not in LINALGS:
        raise ValueError(f"LPLB_LINALG is {name!r}, allowed is {' or '.join(map(repr, LINALGS))}")
    if name not in _C.linalgs:
        raise RuntimeError(f"LPLB_LINALG is {name!r}, and this build has {', '.join(_C.linalgs)} only: {GET_MATHDX}")
    return name


GET_MATHDX = (
    "get MathDx (pip install nvidia-libmathdx-cu13, or ./download-mathdx.sh and MATHDX_HOME) and build lplb with CUDA "
    "and LPLB_MATHDX=1"
)


def arithmetic(device: torch.device) -> str:
    """What the bits of a plan depend on besides its problem: ranks of a group must agree in it.

    Plans of the CPU and of the builtin linear algebra are the same bit for bit; cuSolverDx's may differ by device.

    Raises:
        ValueError, RuntimeError: as `linalg`, and for a device that cuSolverDx has no machine code for; it has no PTX.
    """
    if device.type != "cuda" or linalg() == "builtin":
        return "builtin"
    major, minor = torch.cuda.get_device_capability(device)
    machine_code = _C.cusolverdx_targets
    if not any(_runs_on(target, (major, minor)) for target in machine_code):
        raise RuntimeError(
            f"LPLB_LINALG is 'cusolverdx', which has machine code for {' '.join(machine_code)} in this build and none "
            f"for compute capability {major}.{minor}: build lplb with LPLB_CUDA_TARGETS=sm_{major}{minor}, or choose "
            "'builtin'"
        )
    return f"cusolverdx {major}.{minor}"
