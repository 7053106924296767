"""Load histories and placements in the files people have: SGLang's, vLLM's, NumPy's, CSV and JSON.

What a file is, its content says, not its name. Nothing in it is run; what is wrong with it is a ``ValueError`` that
names file and key, byte or line.
"""

from lplb.formats.loads import read_loads, with_equal_loads, write_loads
from lplb.formats.placements import Slots, read_placements, read_slots, write_placements

__all__ = [
    "Slots",
    "read_loads",
    "read_placements",
    "read_slots",
    "with_equal_loads",
    "write_loads",
    "write_placements",
]
