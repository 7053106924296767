"""How few transfers exact balance can need, where every expert lives on one rank: a bound that is proven, in NumPy."""

import numpy as np


def blocks(n_logical, n_ranks):
    """Rank of each expert: in order, sizes differing by one at most, larger ones first."""
    return np.repeat(np.arange(n_ranks), [len(part) for part in np.array_split(np.arange(n_logical), n_ranks)])


def least_transfers(counts, n_ranks, cap=None, home=None):
    """No plan whose busiest rank has `cap` tokens has fewer transfers.

    A transfer brings one expert from its home to one rank, which can then serve at most min(its tokens, cap) of it.

    - Sending: what a rank has above the cap leaves it, in such portions. An expert can leave in several, together no
      more than its tokens. Every transfer leaves one rank, so the ranks' needs add up.
    - Receiving: if all other ranks are at the cap, a rank has at least total - (n_ranks - 1) * cap. What it lacks comes
      in portions of experts from elsewhere, each once. Every transfer comes to one rank, so these add up as well.

    `counts` are [sources, experts] or [experts]; `cap` is the mean, rounded up, by default; `home` blocks in order.
    """
    tokens = np.asarray(counts, dtype=np.int64).reshape(-1, np.shape(counts)[-1]).sum(0)
    total = int(tokens.sum())
    cap = max(1, -(-total // n_ranks)) if cap is None else cap
    home = blocks(len(tokens), n_ranks) if home is None else np.asarray(home)
    sends = receives = 0
    for rank in range(n_ranks):
        own, others = tokens[home == rank], tokens[home != rank]
        excess = int(own.sum()) - cap
        whole, rest = np.divmod(own, cap)
        sends += fewest([cap] * int(whole.sum()) + rest.tolist(), excess)
        lacking = total - (n_ranks - 1) * cap - int(own.sum())
        receives += fewest(np.minimum(others, cap).tolist(), lacking)
    return max(sends, receives)


def fewest(portions, amount):
    """How many of the portions, largest first, make up an amount."""
    taken = 0
    while amount > 0:
        portion = max(portions)
        portions.remove(portion)
        amount -= portion
        taken += 1
    return taken
