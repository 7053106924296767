import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

# What a document's examples take as given.
GIVEN = {
    "placement.md": """
import numpy as np
import torch
rng = np.random.default_rng(0)
ep_group, n_layers, n_logical = None, 2, 256
history = rng.poisson(100 * rng.lognormal(0, 0.8, n_logical), (16, n_logical))
batches = rng.poisson(100, (8, n_layers, n_logical))
recorded = {"logical_count": torch.from_numpy(batches), "rank": 0}
torch.save(recorded, "expert_distribution_recorder_1.pt")
""",
    "simulate.md": "",
    "dynamic.md": """
import torch
from torch import nn
from lplb import Placement
torch.manual_seed(0)
ep_group, rank, n_ranks, n_experts = None, 0, 1, 8
all_up, all_down = torch.randn(n_experts, 4, 6), torch.randn(n_experts, 6, 4)
layers = [(Placement(range(n_experts), n_ranks), all_up.clone(), all_down.clone()) for _ in range(2)]
x, experts = torch.randn(5, 4), torch.randint(n_experts, (5, 2))
def dispatch_and_combine(x, slots, up, down):
    return torch.einsum("tw,tkwh,tkhv->tv", x, up[slots], down[slots])
""",
    "transfers.md": """
import torch
ep_group, n_ranks, n_experts = None, 1, 8
""",
}


def test_the_example_prints_what_the_readme_says() -> None:
    example = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", README.read_text(), re.DOTALL)
    assert example, "the README's first Python block must be followed by a text block with what it prints"
    code, printed = example.groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == printed


@pytest.mark.parametrize("document", GIVEN)
def test_the_examples_of_a_document_run_one_after_the_other(document: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)
    assert blocks
    code = "\n".join([GIVEN[document], *blocks])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_block_of_figures_is_filled() -> None:
    text = README.read_text()
    blocks = re.findall(r"<!-- figures: .*?-->\n(.*?)<!-- end of figures", text, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        assert block.count("\n| ") >= 5
    assert not re.search(r"@[A-Z]\d", text)
