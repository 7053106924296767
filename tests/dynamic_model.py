"""A model that tests of `lplb.dynamic` run: layers of experts whose outputs are whole numbers, spread over ranks."""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lplb.dynamic import Dispatcher, LoadCollector
from lplb.placement import Placement

HIDDEN = 4
VECTOR = torch.arange(1.0, 1 + HIDDEN, dtype=torch.float64)  # what every token is


def weights_of(layer, expert):
    """Two tensors of whole numbers, of two dtypes, that no other expert has."""
    rng = np.random.default_rng([layer, expert])
    matrix = torch.from_numpy(rng.integers(-8, 9, (HIDDEN, HIDDEN)).astype(np.float64))
    return matrix, torch.tensor([1000 * layer + expert], dtype=torch.int32)


def spread(n_logical, n_ranks, spare=1):
    """Experts in order, and in spare slots the first ones of the next rank."""
    own = n_logical // n_ranks
    ranks = np.arange(n_logical).reshape(n_ranks, own)
    return Placement(np.hstack([ranks, np.roll(ranks, -1, axis=0)[:, :spare]]).ravel(), n_ranks, n_logical)


class Layer(nn.Module):
    """Experts that multiply by a matrix and add a number; tokens find them by the dispatcher's maps."""

    def __init__(self, layer, placement, rank, window=64):
        super().__init__()
        self.layer, self.n_logical = layer, placement.n_logical
        own = placement.phy2log.view(placement.n_ranks, -1)[rank].tolist()
        matrices, numbers = zip(*(weights_of(layer, expert) for expert in own), strict=True)
        self.dispatcher = Dispatcher(placement, [torch.stack(matrices), list(numbers)], rank)
        self.collector = LoadCollector(placement.n_logical, window=window)

    def begin(self, experts):
        """Begin a forward pass with the experts of this rank's tokens; return them and the ranks that they go to."""
        if self.dispatcher.check_consistency():
            self.dispatcher.update_module_weight_and_map()
        self.collector.collect(experts)
        return torch.stack([experts, self.dispatcher.device_indices_map[experts].long()])

    def compute(self, theirs, ranks):
        """What the live weights of this rank make of a rank's tokens that are sent here, and which those are."""
        rank = self.dispatcher.rank
        out = torch.zeros(len(theirs), 2, dtype=torch.float64)
        matrices, numbers = self.dispatcher.fields.fields
        for token in torch.nonzero(ranks == rank).flatten().tolist():
            slot = int(self.dispatcher.local_expert_indices_map[theirs[token]])
            assert slot >= 0, f"expert {int(theirs[token])} is not on rank {rank}, where it was sent"
            out[token, 0] = (matrices[slot] @ VECTOR).sum() + numbers[slot]
            out[token, 1] = 1.0
        return out


def expected(layer, experts):
    """The same from the weights themselves."""
    parts = {e: weights_of(layer, e) for e in set(experts.tolist())}
    values = {e: float((matrix @ VECTOR).sum() + number) for e, (matrix, number) in parts.items()}
    return torch.tensor([values[e] for e in experts.tolist()], dtype=torch.float64)


class Model(nn.Module):
    """Several such layers."""

    def __init__(self, n_layers, placement, rank, window=64):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(i, placement, rank, window) for i in range(n_layers))

    def forward(self, experts):
        """A forward pass of all layers, with one exchange for all of them.

        Args:
            experts: the expert of each token of this rank, ``[layers, tokens]``.

        Returns:
            For every layer and token what came back, and how many ranks took it.
        """
        sent = torch.stack([block.begin(row) for block, row in zip(self.blocks, experts, strict=True)])
        table = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(table, sent)
        out = torch.stack(
            [
                torch.stack([block.compute(*row) for block, row in zip(self.blocks, theirs, strict=True)])
                for theirs in table
            ]
        )
        dist.all_reduce(out)
        return out[dist.get_rank()].unbind(-1)

    def check_slots(self):
        """Every slot of this rank holds what the live placement says."""
        for block in self.blocks:
            d = block.dispatcher
            own = d.placement.phy2log.view(d.placement.n_ranks, -1)[d.rank].tolist()
            for slot, expert in enumerate(own):
                matrix, number = weights_of(block.layer, expert)
                assert torch.equal(d.fields.fields[0][slot], matrix)
                assert torch.equal(d.fields.fields[1][slot], number)


def random_placement(rng, like):
    """Any placement of the same sizes."""
    n, per = like.n_ranks, like.slots_per_rank
    while True:
        slots = np.concatenate([rng.choice(like.n_logical, per, replace=False) for _ in range(n)])
        if len(set(slots.tolist())) == like.n_logical:
            return Placement(slots, n, like.n_logical)


def nearby_placement(rng, like):
    """One where two ranks have exchanged an expert."""
    while True:
        slots = like.phy2log.clone()
        a, b = rng.choice(len(slots), 2, replace=False)
        slots[[a, b]] = slots[[b, a]]
        if a // like.slots_per_rank != b // like.slots_per_rank and all(
            len(set(own)) == len(own) for own in slots.view(like.n_ranks, -1).tolist()
        ):
            return Placement(slots, like.n_ranks, like.n_logical)


def until(condition, seconds=30.0, step=lambda: time.sleep(0.002)):
    """Call ``step`` until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true in {seconds} s"
        step()
