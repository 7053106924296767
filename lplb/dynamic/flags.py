"""What a scheduler plans for, and which problems are its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lplb.arguments import check_divides, whole_number
from lplb.dynamic import wire
from lplb.dynamic.planning import MODES, Problem

__all__ = ["Flags"]

_MOST_PROBLEM_FRAMES = 2**10  # 1 GiB


@dataclass(frozen=True)
class Flags:
    """What a scheduler plans for, by MindIE's names and with its defaults.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is not allowed.
    """

    world_size: int = 8
    """Ranks that share the experts."""
    expert_num: int = 32
    """Logical experts of a layer, a multiple of ``world_size``."""
    block_num: int = 30
    """MoE layers; layers without experts do not count."""
    max_move: int = 5
    """In mode EX: most experts that are written in a cycle, in all layers together."""
    redundant: int = 0
    """Spare slots on each rank."""
    mode: str = "A2A"
    """``"A2A"``, ``"AG"`` or ``"EX"``, as `lplb.dynamic.planning.Settings`."""

    def __post_init__(self) -> None:
        """Check the values."""
        whole_number("world_size", self.world_size, 1, wire.MOST_RANKS)
        whole_number("expert_num", self.expert_num, 1, wire.MOST_EXPERTS)
        whole_number("block_num", self.block_num, 1, wire.MOST_LAYERS)
        whole_number("max_move", self.max_move, 0, 2**31 - 1)
        check_divides("expert_num", self.expert_num, "world_size", self.world_size)
        most = self.expert_num - self.expert_num // self.world_size  # a rank has no expert twice
        whole_number("redundant", self.redundant, 0, most)
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, allowed are {', '.join(MODES)}")
        if self.most_frames > _MOST_PROBLEM_FRAMES:
            raise ValueError(
                f"block_num is {self.block_num}, which for {self.expert_num} experts takes messages of up to "
                f"{self.most_frames} MiB, allowed are {_MOST_PROBLEM_FRAMES}"
            )

    @property
    def most_frames(self) -> int:
        """Of a message with a problem."""
        slots = self.expert_num + self.world_size * self.redundant
        return wire.frames_of_problem(self.block_num, self.world_size, self.expert_num, slots)

    def check(self, problem: Problem) -> None:
        """Refuse a problem that this scheduler was not started for.

        Raises:
            ValueError: it differs; the message names the flag.
        """
        first = problem.placements[0]
        for flag, wanted, what, found in (
            ("world_size", self.world_size, "ranks", first.n_ranks),
            ("expert_num", self.expert_num, "experts in a layer", first.n_logical),
            ("block_num", self.block_num, "MoE layers", len(problem.placements)),
            ("redundant", self.redundant, "spare slots on a rank", _spare(problem)),
            ("mode", self.mode, "as mode", problem.settings.mode),
        ):
            if wanted != found:
                raise ValueError(f"the scheduler was started with --{flag} {wanted}, the model has {found} {what}")

    def limited(self, problem: Problem) -> Problem:
        """The problem with ``max_move`` as its limit, in mode EX."""
        settings = problem.settings
        if self.mode != "EX" or (settings.max_moves is not None and settings.max_moves <= self.max_move):
            return problem
        return replace(problem, settings=replace(settings, max_moves=self.max_move))


def _spare(problem: Problem) -> int | str:
    first = problem.placements[0]
    spare, rest = divmod(first.n_physical - first.n_logical, first.n_ranks)
    return spare if not rest else f"{first.n_physical - first.n_logical} / {first.n_ranks}"
