"""Has libmathdx write cuSolverDx's (and cuBLASDx's) device functions as LTO-IR, for mathdx.cmake.

    mathdx_lto.py LIBMATHDX NVRTC_FOLDER CUDA version
    mathdx_lto.py LIBMATHDX NVRTC_FOLDER CUDA functions RANKS THREADS SM FUNCTION=FILE...
    mathdx_lto.py LIBMATHDX NVRTC_FOLDER CUDA library FILE

float64, real, column-major, lower triangle, in shared memory, by one block; FUNCTION is one of
    potrf     void lplb_potrf_<n>(double* a, int* info)
    potrs1    void lplb_potrs1_<n>(double* a, double* b)       one right-hand side
    potrs2    void lplb_potrs2_<n>(double* a, double* b)       two, n apart
    gemm      void lplb_gemm_<n>(double* alpha, double* a, double* b, double* beta, double* c)
                                                               c = alpha·a·bᵀ + beta·c, a and b n × 32
"""

import ctypes
import re
import sys
from pathlib import Path

GEMM_DEPTH = 32  # experts in a tile of h_e

Int = ctypes.c_longlong


class Libmathdx:
    """libmathdx.so, its calls checked, the numbers of its enumerations read from its headers."""

    def __init__(self, library: Path, nvrtc: Path, cuda: str) -> None:
        """Load it, with the NVRTC of that CUDA release in that folder."""
        # libmathdx opens NVRTC by its bare name, and NVRTC its builtins: both are found when they are already there.
        for name in (f"libnvrtc-builtins.so.{cuda}", f"libnvrtc.so.{cuda.split('.')[0]}"):
            ctypes.CDLL(str(nvrtc / name), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self._library.commondxStatusToStr.restype = ctypes.c_char_p
        headers = (library.parent.parent / "include").glob("lib*dx.h")
        words = " ".join(header.read_text() for header in headers)
        self._numbers = {name: int(value) for name, value in re.findall(r"\b([A-Z][A-Z0-9_]+)\s*=\s*(\d+)", words)}

    def number(self, name: str | int) -> int:
        """The value of an enumerator; integers stand for themselves."""
        return name if isinstance(name, int) else self._numbers[name]

    def call(self, function: str, *arguments: object) -> None:
        """Call and raise what went wrong."""
        status = getattr(self._library, function)(*arguments)
        if status:
            reason = self._library.commondxStatusToStr(status).decode()
            raise SystemExit(f"libmathdx: {function} fails with {status} ({reason}); LIBMATHDX_LOG_LEVEL=5 tells more")

    def triple(self, function: str) -> list[int]:
        """The three numbers of a version."""
        numbers = [ctypes.c_int() for _ in range(3)]
        self.call(function, *map(ctypes.byref, numbers))
        return [number.value for number in numbers]


class Descriptor:
    """One device function of cuSolverDx ("cusolverdx") or cuBLASDx ("cublasdx")."""

    def __init__(self, mathdx: Libmathdx, family: str, symbol: str, operators: dict[str, list[str | int]]) -> None:
        """Describe the function by its operators, named as in the headers."""
        self._mathdx, self._family = mathdx, family
        self.handle = Int()
        mathdx.call(f"{family}CreateDescriptor", ctypes.byref(self.handle))
        option = mathdx.number("COMMONDX_OPTION_SYMBOL_NAME")
        mathdx.call(f"{family}SetOptionStr", self.handle, option, symbol.encode())
        for name, values in operators.items():
            operator = mathdx.number(f"{family.upper()}_OPERATOR_{name}")
            numbers = (Int * len(values))(*map(mathdx.number, values))
            if len(values) == 1:
                mathdx.call(f"{family}SetOperatorInt64", self.handle, operator, numbers[0])
            else:
                mathdx.call(f"{family}SetOperatorInt64s", self.handle, operator, ctypes.c_size_t(len(values)), numbers)

    def trait(self, name: str) -> int:
        """What libmathdx says about it."""
        trait, value = self._mathdx.number(f"{self._family.upper()}_TRAIT_{name}"), Int()
        self._mathdx.call(f"{self._family}GetTraitInt64", self.handle, trait, ctypes.byref(value))
        return value.value

    def lto(self, sm: int) -> bytes:
        """Its LTO-IR for a device of compute capability sm / 10."""
        mathdx, code, count = self._mathdx, Int(), ctypes.c_size_t()
        mathdx.call("commondxCreateCode", ctypes.byref(code))
        mathdx.call("commondxSetCodeOptionInt64", code, mathdx.number("COMMONDX_OPTION_TARGET_SM"), Int(10 * sm))
        mathdx.call(f"{self._family}FinalizeCode", code, self.handle)
        mathdx.call("commondxGetCodeNumLTOIRs", code, ctypes.byref(count))
        if count.value != 1:
            raise SystemExit(f"libmathdx: {count.value} pieces of LTO-IR, 1 expected")
        size = (ctypes.c_size_t * 1)()
        mathdx.call("commondxGetCodeLTOIRSizes", code, count, size)
        lto = ctypes.create_string_buffer(size[0])
        mathdx.call("commondxGetCodeLTOIRs", code, count, (ctypes.c_void_p * 1)(ctypes.addressof(lto)))
        return lto.raw


def solver(mathdx: Libmathdx, function: str, n: int, threads: int, sm: int) -> Descriptor:
    """Cholesky factor (potrf) or solve with so many right-hand sides (potrs1, potrs2)."""
    columns = int(function.removeprefix("potrs")) if function != "potrf" else 0
    return Descriptor(
        mathdx,
        "cusolverdx",
        f"lplb_{function}_{n}",
        {
            "SIZE": [n, n, columns] if columns else [n, n],
            "TYPE": ["CUSOLVERDX_TYPE_REAL"],
            "PRECISION": ["COMMONDX_PRECISION_F64"],
            "SM": [10 * sm],
            "EXECUTION": ["COMMONDX_EXECUTION_BLOCK"],
            "BLOCK_DIM": [threads, 1, 1],
            "API": ["CUSOLVERDX_API_SMEM"],
            "FUNCTION": ["CUSOLVERDX_FUNCTION_POTRS" if columns else "CUSOLVERDX_FUNCTION_POTRF"],
            "ARRANGEMENT": ["CUSOLVERDX_ARRANGEMENT_COL_MAJOR"] * (2 if columns else 1),
            "FILL_MODE": ["CUSOLVERDX_FILL_MODE_LOWER"],
        },
    )


def product(mathdx: Libmathdx, n: int, threads: int, sm: int) -> Descriptor:
    """The product a·bᵀ, with a and b of n rows and GEMM_DEPTH columns."""
    return Descriptor(
        mathdx,
        "cublasdx",
        f"lplb_gemm_{n}",
        {
            "FUNCTION": ["CUBLASDX_FUNCTION_MM"],
            "SIZE": [n, n, GEMM_DEPTH],
            "TYPE": ["CUBLASDX_TYPE_REAL"],
            "PRECISION": ["COMMONDX_PRECISION_F64"] * 3,
            "SM": [10 * sm],
            "EXECUTION": ["COMMONDX_EXECUTION_BLOCK"],
            "BLOCK_DIM": [threads, 1, 1],
            "API": ["CUBLASDX_API_SMEM"],
            # The transpose of b, column-major, is GEMM_DEPTH × n, row-major.
            "ARRANGEMENT": [f"CUBLASDX_ARRANGEMENT_{order}_MAJOR" for order in ("COL", "ROW", "COL")],
        },
    )


def write_library(mathdx: Libmathdx, file: Path) -> None:
    """Write what the functions' LTO-IR calls, the same for every function and device."""
    for function in ("potrf", "potrs1", "potrs2"):
        largest = solver(mathdx, function, 128, 128, 80)  # asking compiles: once for each function is enough
        workspace = largest.trait("WORKSPACE_SIZE")
        if workspace:
            raise SystemExit(f"libmathdx: {function} of 128 wants {workspace} bytes of workspace; 0 are given")
    size = ctypes.c_size_t()
    mathdx.call("cusolverdxGetUniversalFATBINSize", largest.handle, ctypes.byref(size))
    fatbin = ctypes.create_string_buffer(size.value)
    mathdx.call("cusolverdxGetUniversalFATBIN", largest.handle, size, fatbin)
    file.write_bytes(fatbin.raw)


def main(arguments: list[str]) -> None:
    """See the head of this file."""
    library, nvrtc, cuda, what, *rest = arguments
    mathdx = Libmathdx(Path(library), Path(nvrtc), cuda)
    if what == "version":
        year, month, patch = mathdx.triple("mathdxGetPackageVersion")
        solver_version = ".".join(map(str, mathdx.triple("cusolverdxGetVersion")))
        print(f"{year}.{month:02}.{patch} (cuSolverDx {solver_version})")
    elif what == "functions":
        n, threads, sm = map(int, rest[:3])
        for function, file in (pair.split("=", 1) for pair in rest[3:]):
            make = product(mathdx, n, threads, sm) if function == "gemm" else solver(mathdx, function, n, threads, sm)
            Path(file).write_bytes(make.lto(sm))
    elif what == "library":
        write_library(mathdx, Path(rest[0]))
    else:
        raise SystemExit(f"{what!r} is none of version, functions, library")


if __name__ == "__main__":
    main(sys.argv[1:])
