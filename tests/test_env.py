"""`lplb env`: what it says here, and of builds and machines that are not here."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import lplb
from lplb import _C, Planner, cli, devices, topology


def told(capsys, *arguments):
    assert cli.main(["env", *arguments]) == 0
    return capsys.readouterr().out


def test_text_has_a_fact_per_line(capsys):
    lines = told(capsys).splitlines()
    names = [line.partition(": ")[0] for line in lines]
    assert all(names)
    assert lines[0] == f"lplb: {lplb.__version__}"
    assert f"torch: {torch.__version__}" in lines
    for name in ("python", "numpy", "CUDA of the build", "CUDA of torch", "CUDA of the driver", "MathDx", "DeepEP"):
        assert names.count(name) == 1
    cpu = next(line for line in lines if line.startswith("backends: backend CPU"))
    assert f"instruction set {_C.instruction_set}, threads {torch.get_num_threads()}" in cpu
    assert re.search(
        r"^workspace: backend CPU, example 64 ranks, 256 experts, 512 slots, bytes \d+$", "\n".join(lines), re.M
    )


def test_json_says_the_same(capsys):
    lines, facts = told(capsys).splitlines(), json.loads(told(capsys, "--json"))
    assert list(dict.fromkeys(line.partition(": ")[0] for line in lines)) == list(facts)
    assert facts["lplb"] == lplb.__version__
    assert facts["linear algebra"]["built"].split()[0] == "builtin"
    assert [f"missing: {entry}" for entry in facts["missing"]] == [x for x in lines if x.startswith("missing: ")]


def test_linear_algebra(capsys, monkeypatch):
    monkeypatch.delenv("LPLB_LINALG", raising=False)
    assert "linear algebra: in use builtin, LPLB_LINALG not set" in told(capsys)
    monkeypatch.setenv("LPLB_LINALG", "mkl")
    assert "in use none: LPLB_LINALG is 'mkl', allowed is 'builtin' or 'cusolverdx'" in told(capsys)


def test_nvshmem(capsys, monkeypatch):
    monkeypatch.setenv("NVSHMEM_DIR", "/opt/nvshmem")
    assert "NVSHMEM: NVSHMEM_DIR /opt/nvshmem, " in told(capsys)


# Builds and machines that are not here


@pytest.fixture
def build(monkeypatch):
    """Set what the build has: build(cuda_targets=..., linalgs=...)."""

    def change(**attributes):
        for name, value in attributes.items():
            monkeypatch.setattr(_C, name, value)

    return change


@pytest.fixture
def machine(monkeypatch):
    """Set what torch sees: CUDA version of torch, and a compute capability per device."""

    def change(version, *capabilities):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

        def number(device):
            index = torch.device(device).index if not isinstance(device, int) else device
            return index or 0

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[number(device)])
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(
                name="Some GPU",
                major=capabilities[number(device)][0],
                minor=capabilities[number(device)][1],
                multi_processor_count=100,
            ),
        )

    return change


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")


def refusal(device="cuda"):
    with pytest.raises(RuntimeError) as caught:
        Planner(topology.cube(), 80, 64, 8, device=device)
    return str(caught.value)


def test_refusals_name_what_is_missing_and_how_to_get_it(build, machine, capsys):
    build(cuda=False)
    machine("13.0", (9, 0))
    assert "this build of lplb has no CUDA backend" in refusal()
    assert "LPLB_CUDA=1" in refusal()
    assert "missing: this build of lplb has no CUDA backend" in told(capsys)
    build(cuda=True, cuda_targets=TARGETS)
    machine(None)
    assert f"this torch ({torch.__version__}) has no CUDA: install one that has" in refusal()
    machine("13.0")
    assert "torch finds no CUDA device: nvidia-smi" in refusal()
    machine("13.0", (9, 0))
    assert "device is 'cuda:1', and torch sees 1 CUDA devices" in refusal("cuda:1")
    machine("13.0", (7, 5))
    assert "device is 'cuda', and it has compute capability 7.5, allowed is 8.0 or newer" in refusal()
    machine("13.0", (11, 0))
    build(cuda_targets=("sm_80", "sm_90", "sm_120", "compute_120"))
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        assert (
            "it has compute capability 11.0, for which this build has no code, only sm_80 sm_90 sm_120 compute_120: "
            "build lplb with LPLB_CUDA_TARGETS=sm_110. Or keep the tensors on the CPU"
        ) in refusal(device)


@pytest.mark.parametrize(
    ("capability", "targets", "runs"),
    [
        ((8, 0), TARGETS, True),
        ((8, 9), TARGETS, True),
        ((7, 5), TARGETS, False),
        ((10, 3), TARGETS, True),
        ((11, 0), TARGETS, False),
        ((12, 1), TARGETS, True),
        ((13, 0), TARGETS, True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "sm_103f"), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("compute_90",), True),
        ((12, 0), ("compute_90a",), False),
        ((9, 0), (), False),
    ],
)
def test_capabilities_that_a_build_has_code_for(build, capability, targets, runs):
    build(cuda_targets=targets)
    assert (devices.no_code_for(capability) is None) == runs


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 166912), ((8, 6), 101376), ((8, 9), 101376), ((9, 0), 232448), ((10, 3), 232448), ((12, 0), 101376)],
)
def test_shared_memory_where_torch_does_not_tell(machine, capability, expected):
    machine("12.4", capability)
    assert devices.shared_bytes(torch.device("cuda", 0)) == expected


def test_shared_memory_where_torch_tells(monkeypatch):
    told_by_torch = SimpleNamespace(shared_memory_per_block_optin=12345)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told_by_torch)
    assert devices.shared_bytes(0) == 12345


def test_linear_algebra_of_a_planner(build, monkeypatch):
    build(linalgs=("builtin",))
    assert devices.linalg() == "builtin"
    monkeypatch.setenv("LPLB_LINALG", "cusolverdx")
    with pytest.raises(RuntimeError, match=r"'cusolverdx', and this build has builtin only: get MathDx \(pip install"):
        devices.linalg()
    build(linalgs=("builtin", "cusolverdx"))
    assert devices.linalg() == "cusolverdx"
    monkeypatch.setenv("LPLB_LINALG", "CUSOLVERDX")
    with pytest.raises(ValueError, match="LPLB_LINALG is 'CUSOLVERDX', allowed is 'builtin' or 'cusolverdx'"):
        devices.linalg()


def test_what_plans_depend_on(build, machine, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("LPLB_LINALG", raising=False)
    build(cuda_targets=TARGETS, linalgs=("builtin", "cusolverdx"), cusolverdx_targets=("sm_80", "sm_90"))
    machine("13.0", (9, 0))
    assert devices.arithmetic(cpu) == devices.arithmetic(gpu) == "builtin"
    monkeypatch.setenv("LPLB_LINALG", "cusolverdx")
    assert devices.arithmetic(cpu) == "builtin"
    assert devices.arithmetic(gpu) == "cusolverdx 9.0"
    for capability in ((12, 0), (13, 0)):  # with machine code, and with PTX, but not of cuSolverDx
        machine("13.0", capability)
        with pytest.raises(RuntimeError, match=r"machine code for sm_80 sm_90 .* none for compute capability 1"):
            devices.arithmetic(gpu)


def test_env_of_a_build_with_cuda(build, machine, monkeypatch, capsys):
    from pretend_cuda import CudaPlanner

    monkeypatch.setattr(_C, "CudaPlanner", CudaPlanner, raising=False)
    build(
        cuda=True, cuda_targets=TARGETS, cuda_version="13.0", linalgs=("builtin", "cusolverdx"), mathdx_version="26.01"
    )
    machine("13.0", (9, 0), (11, 0))
    out = told(capsys)
    assert "CUDA of the build: 13.0" in out
    assert "MathDx: 26.01" in out
    assert "backends: backend CUDA, targets sm_80 sm_90 sm_100 sm_120 compute_120" in out
    assert (
        "devices: device cuda:0, name Some GPU, compute capability 9.0, multiprocessors 100, "
        "shared memory per block 232448, code in this build yes"
    ) in out
    assert "missing: cuda:1: it has compute capability 11.0, for which this build has no code" in out
    assert "workspace: backend CUDA, example 64 ranks, 256 experts, 512 slots, tables 48, scratch bytes 80" in out
    assert "workspace: backend CUDA, kernel solve, blocks 1, threads 128, shared memory 1000" in out
