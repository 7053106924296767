"""The block-parallel code under host threads: same bits as one thread, no data race.

team_test is the core, stage_test the three stages as the CUDA backend's blocks run them, against the CPU backend, and
transfer_test the same for plans with transfers.
"""

import re
from pathlib import Path

import native
import pytest

# of the cases; ThreadSanitizer is slow, and a race shows in any case
SCALE = {
    ("team_test", ""): "0.3",
    ("team_test", "thread"): "0.05",
    ("stage_test", ""): "0.5",
    ("stage_test", "thread"): "0.1",
    ("transfer_test", ""): "0.3",
    ("transfer_test", "thread"): "0.05",
}


@pytest.mark.parametrize("program", ["team_test", "stage_test", "transfer_test"])
@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["plain", "thread sanitizer"])
def test_any_team_gives_the_bits_of_one_thread(program: str, sanitizer: str, tmp_path: Path) -> None:
    before = native.sanitized_command(sanitizer, tmp_path)
    build = tmp_path / "build"
    native.build(build, program, sanitizer, "-DLPLB_EXTENSION=OFF", "-DLPLB_TEAM_TEST=ON")
    done = native.run([*before, build / program, SCALE[program, sanitizer]], timeout=600)
    assert "WARNING: ThreadSanitizer" not in done.stdout, done.stdout[:10000]
    assert done.returncode == 0, done.stdout[-2000:]
    counts = re.search(r"(\d+) passed, 0 failed", done.stdout)
    assert counts is not None, done.stdout[-2000:]
    assert int(counts[1]) > 0
