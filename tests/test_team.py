"""The block-parallel code under host threads: same bits as one thread, no data race (tests/team_test.cpp)."""

import re
from pathlib import Path

import native
import pytest


@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["plain", "thread sanitizer"])
def test_any_team_gives_the_bits_of_one_thread(sanitizer: str, tmp_path: Path) -> None:
    before = native.sanitized_command(sanitizer, tmp_path)
    build = tmp_path / "build"
    native.build(build, "team_test", sanitizer, "-DLPLB_EXTENSION=OFF", "-DLPLB_TEAM_TEST=ON")
    done = native.run([*before, build / "team_test"], timeout=300)
    assert "WARNING: ThreadSanitizer" not in done.stdout, done.stdout[:10000]
    assert done.returncode == 0, done.stdout[-2000:]
    counts = re.search(r"(\d+) passed, 0 failed", done.stdout)
    assert counts is not None, done.stdout[-2000:]
    assert int(counts[1]) > 0
