"""An expert-parallel Mixture-of-Experts layer: how lplb is wired into a model, and what tests and benchmarks run.

One forward pass:

    router → top-k logical experts
           → physical slots                     by `Planner.run`; without a balancer they are the same
           → all-to-all of split sizes          in which the ranks agree that all is well
           → all-to-all of tokens, the experts of this rank's slots, all-to-all back
           → weighted sum, in the router's order

What a token gets does not depend on which copy of an expert serves it. So outputs and gradients are those of the layer
without a balancer, up to the order in which the gradient of a weight adds its tokens.

With transfers, slots come from a plan that lets weights travel too; `lplb.lending` has that part.
"""

import copy
import itertools
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lplb import exchange, ops
from lplb.arguments import seen, whole_number
from lplb.guests import GuestSlots, check_guests
from lplb.layer_settings import check_balancer, checked_dtype, first_placement
from lplb.lending import Lender, Lent, Loan
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.recompute import keep_routes, settled
from lplb.rows import all_to_all, grouped, has_grouped_matmul, inverse, one_by_one, permuted
from lplb.slots import SlotWeights, homes_kept, moves_to_homes
from lplb.transfers import TransferPlanner
from lplb.weights import Move, Moved

__all__ = ["ExpertParallelMoE", "GuestSlots", "Route", "keep_routes"]


class Route(NamedTuple):
    """Where the choices of a batch go: what `ExpertParallelMoE.route` gives to `ExpertParallelMoE.compute`.

    Choice ``token * top_k + j`` is the ``j``-th expert of a token. Rows are choices in the order of the slots that
    serve them, slots being counted over all ranks.
    """

    weight: Tensor
    """Share of every choice in its token's output, at least float32, ``[tokens, top_k]``; they add up to 1."""
    choice: Tensor
    """The choice in each row, int64 ``[tokens * top_k]``."""
    send: list[int]
    """Rows for each rank."""
    receive: list[int]
    """Rows from each rank."""
    received: Tensor
    """Rows from each rank for each slot of this rank, int64 ``[ranks, slots]`` on the CPU; guest slots are the last."""
    loan: Loan | None = None
    """Which experts are lent to which ranks; only with transfers."""


class ExpertParallelMoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over the ranks of a group, with or without balancing.

    A softmax router picks ``top_k`` of ``n_experts`` for every token and scales their shares to sum 1. An expert is a
    SwiGLU, ``(silu(x @ gate) * (x @ up)) @ down``. No token is dropped.

    Under a group the constructor, `forward`, `route`, `compute` and the backward pass are collective: every rank takes
    part, in the same order, with no token too, and an error on one rank is raised on all, but for what `compute` says
    of its own. When a rank dies, the collectives of the others raise what torch.distributed raises.

    The weights lie in the slots of the balancer's placement, or in one slot per expert in order. One slot of every
    expert is its home. There its weights are parameters, ``experts.gate_up.<expert>`` and ``experts.down.<expert>``, so
    the ranks' state dicts together are the model's, wherever experts live. The other slots hold copies: leaves with
    gradients of their own, but neither parameters nor buffers. After a backward pass an expert's gradient is the sum
    over its slots, and after a change of weights its copies are to be renewed: `lplb.weights.ReplicaSync` does both,
    given `expert_fields`. The router is the same on every rank; adding up its gradients is the business of data
    parallelism.

    With ``transfers`` every batch is planned from the counts of all ranks, and experts travel to other ranks for that
    batch where it takes them: see `lplb.lending`. What a token gets does not change. After a backward pass an expert's
    gradient at home has those of its guests added, in the order of ranks and in float32 at least. Forward and backward
    passes of all layers that share guest slots come in one order on all ranks. ``experts`` stays the module that it is,
    autocast is refused, and a gradient cannot be differentiated again: a double backward pass raises RuntimeError. On
    CUDA a fault of one rank's copies while weights or gradients travel is raised on that rank alone: an agreement would
    have the host wait for the device.

    Weights are drawn uniformly within 1 / sqrt(fan-in) from the device's default generator, for all experts in order on
    every rank: ranks that start from the same seed hold the parts of one model, the same for any number of ranks.

    `torch.compile` leaves no graph break with ``torch._dynamo.config.capture_scalar_outputs = True``; without it there
    are some where split sizes are read. So it is with torch 2.13; torch 2.4 runs the layer, and compiles parts of it.
    With transfers there is a break around the layer, which runs as it is.

    Args:
        hidden_size: features of a token.
        ffn_size: features within an expert.
        n_experts: logical experts.
        top_k: experts per token.
        group: the ranks, a torch.distributed process group; by default the balancer's. Without one, this process has
            all slots, and a balancer may plan for any number of ranks.
        balancer: a planner of the same ranks for ``n_experts``, or ``None``: then rank ``r`` has the ``r``-th part of
            the experts, in order.
        lag: 1 lets the balancer plan beside the experts, for the next batch: see `Planner.run`. What goes wrong in its
            exchange is then raised by the next `forward`. With transfers it is 0.
        device: where weights and tokens are; by default torch's default device.
        dtype: of weights and tokens, float16, bfloat16, float32 or float64; by default torch's default dtype.
        transfers: instead of a balancer, a planner of transfers without a group, for the same experts and ranks and
            with as many residents on every rank. No rank receives more rows than its ``max_tokens``, if that is not
            ``None``: a batch that needs more is refused on all ranks before anything travels. See `tokens_within`.
        guests: where experts stay that come for a batch, as many slots as the planner has; with transfers only, and
            shared by any number of layers, on all ranks by the same.

    Raises:
        TypeError, ValueError: an argument is not allowed, on any rank, or differs from rank to rank.
    """

    placement: Placement
    """Where the experts are whose weights are here. A new placement of the balancer is refused until they are moved."""
    home: Tensor
    """Physical slot of each expert's parameters, int64 ``[n_experts]`` on the CPU."""
    received: Tensor | None
    """Rows of the last batch from each rank for each slot of this rank, int64 ``[ranks, slots]`` on the CPU; ``None``
    before the first. Without a group there is one rank."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        n_experts: int,
        top_k: int,
        *,
        group: dist.ProcessGroup | None = None,
        balancer: Planner | None = None,
        lag: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transfers: TransferPlanner | None = None,
        guests: GuestSlots | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        planned = balancer.ep_group if isinstance(balancer, Planner) else None
        self._ranks = exchange.exchange_for(planned if group is None else group)

        def build() -> None:
            self.hidden_size = whole_number("hidden_size", hidden_size, 1)
            self.ffn_size = whole_number("ffn_size", ffn_size, 1)
            self.n_experts = whole_number("n_experts", n_experts, 1)
            self.top_k = whole_number("top_k", top_k, 1, self.n_experts)
            self.lag = whole_number("lag", lag, 0, 1)
            with torch.inference_mode(False):
                router = torch.empty(self.n_experts, self.hidden_size, device=device, dtype=checked_dtype(dtype))
            check_balancer(balancer, self._ranks, self.n_experts, router.device, transfers)
            if self.lag and transfers is not None:
                raise ValueError(f"lag is {self.lag}, allowed with transfers is 0")
            if transfers is not None or guests is not None:
                check_guests(transfers, guests, self.n_experts, self._ranks, (self.hidden_size, self.ffn_size), router)
            self.router = nn.Parameter(router)
            self.placement, self.home = first_placement(balancer, self.n_experts, self._ranks.size, transfers)
            self.experts = self._slots(self.placement, self.home)
            self.reset_parameters()

        settings = (
            f"hidden_size {hidden_size}, ffn_size {ffn_size}, n_experts {n_experts}, top_k {top_k}, lag {lag}, dtype "
            f"{dtype or torch.get_default_dtype()}, {'no balancer' if balancer is None else 'a balancer'}"
            f"{'' if transfers is None else ', transfers'}"
        )
        exchange.together(
            self._ranks, build, lambda _: exchange.fingerprint(settings, self.home.tolist()), settings=settings
        )
        self.balancer = balancer
        self.received = None
        self.transfers = transfers
        self._lender: Lender | None = None
        if transfers is not None and guests is not None:
            self._lender = Lender(transfers, guests, self.experts, self.home, self._ranks)
        self._handle = _handle_of(self)
        if self._lender is not None:
            _stay_uncompiled()

    # ---- weights

    @property
    def expert_fields(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights of this rank's slots in order: gate and up ``[hidden_size, 2 * ffn_size]``; down ``[ffn_size,
        hidden_size]``. Each is a row of one tensor."""
        return self.experts.leaves("gate_up"), self.experts.leaves("down")

    def reset_parameters(self) -> None:
        """Draw all weights anew, copies included; see the class."""
        router, hidden, ffn = self.router, self.hidden_size, self.ffn_size
        gate_up, down = router.new_empty(hidden, 2 * ffn), router.new_empty(ffn, hidden)
        nn.init.uniform_(router, -(hidden**-0.5), hidden**-0.5)
        for expert in range(self.n_experts):
            nn.init.uniform_(gate_up, -(hidden**-0.5), hidden**-0.5)
            nn.init.uniform_(down, -(ffn**-0.5), ffn**-0.5)
            self.experts.fill(expert, {"gate_up": gate_up, "down": down})

    def follow(self, balancer: Planner | None) -> Moved:
        """Take another balancer, or the same one after a re-mapping, and move the weights to its slots. Collective.

        The home of an expert stays on its rank if that still has the expert. Then its parameters stay the same objects,
        and an optimizer goes on with their state. Experts that find a home on another rank have new parameters there,
        without state: give an optimizer the parameters anew, and what it is to know of them. A `ReplicaSync` is of the
        old slots; make another, and let it renew the copies unless they were as their originals before.

        Args:
            balancer: as for the class.

        Returns:
            Rounds of transfers, and the bytes that this rank sent and received.

        Raises:
            TypeError, ValueError: the balancer is not allowed, on any rank, or another on another rank; or some
                experts require gradients and others do not: set that afterwards.
            RuntimeError: a rank is lost. In every case the layer is as before.
        """

        def check() -> tuple[Placement, Tensor, SlotWeights]:
            if self._lender is not None:
                raise ValueError("the layer has transfers, allowed is a layer without them: make another")
            check_balancer(balancer, self._ranks, self.n_experts, self.router.device)
            self.experts.check_trained_alike()
            placement, home = first_placement(balancer, self.n_experts, self._ranks.size)
            if placement.n_ranks == self.placement.n_ranks:
                home = homes_kept(self.home, self.placement, placement, home)
            return placement, home, self._slots(placement, home)

        placement, home, experts = exchange.together(
            self._ranks,
            check,
            lambda found: exchange.fingerprint(
                "follow", found[0].phy2log.tolist(), found[1].tolist(), self.experts.trained
            ),
            "another placement than rank 0 or other gradients, or called another method; allowed is the same for all",
        )
        if isinstance(self._ranks, exchange.Distributed):
            moves = moves_to_homes(self.placement, self.home, placement, home)
            moved = self.experts.move_into(experts, moves, self._ranks.group)
        else:  # one process has the slots of all ranks
            old = self.home.tolist()
            moves = [Move(expert, 0, old[expert], 0, slot) for slot, expert in enumerate(placement.phy2log.tolist())]
            moved = self.experts.move_into(experts, moves, None)
        self.experts, self.placement, self.home, self.balancer = experts, placement, home, balancer
        return moved

    def _slots(self, placement: Placement, home: Tensor) -> SlotWeights:
        """Room for the experts in this process's slots of a placement."""
        n_slots = placement.n_physical // self._ranks.size
        slots = range(self._ranks.rank * n_slots, (self._ranks.rank + 1) * n_slots)
        at_home = set(home.tolist())
        return SlotWeights(
            {"gate_up": (self.hidden_size, 2 * self.ffn_size), "down": (self.ffn_size, self.hidden_size)},
            [int(placement.phy2log[slot]) for slot in slots],
            [slot in at_home for slot in slots],
            device=self.router.device,
            dtype=self.router.dtype,
        )

    # ---- one batch

    def forward(self, x: Tensor) -> Tensor:
        """Return what the experts make of the tokens; collective under a group.

        Args:
            x: tokens of this rank, ``[..., hidden_size]``, of the layer's dtype and device; there may be none.

        Returns:
            A tensor like ``x``.

        Raises:
            TypeError, ValueError: ``x`` is not allowed, a router score is NaN, the balancer's placement is not the one
                that the weights are laid out for, or ranks differ in dtype or in whether ``x`` needs gradients; with
                transfers also: autocast is on, or ``experts`` replaced; on any rank. Nothing has changed then, but that
                the balancer may have planned.
        """
        if self._lender is not None and torch.compiler.is_compiling():
            return _uncompiled(self.forward, x)  # type: ignore[no-any-return]
        return self.compute(x, self.route(x))

    def route(self, x: Tensor) -> Route:
        """Choose the experts of every token and the slots that serve them; collective under a group.

        The first half of `forward`. Outside of a region that is computed twice it plans once:
        ``checkpoint(layer.compute, x, layer.route(x), use_reentrant=False)``. Inside of one, see `keep_routes`.

        Args, Raises: as `forward`.
        """
        if self._lender is not None and torch.compiler.is_compiling():
            return _uncompiled(self.route, x)  # type: ignore[no-any-return]
        error = self._refusal(x)
        tokens = self.router.new_empty(0, self.hidden_size) if error is not None else x.reshape(-1, self.hidden_size)
        scores = functional.linear(tokens, self.router)
        weight, expert = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).topk(self.top_k)
        settings = f"tokens of {self.router.dtype}{_gradients(x, self.experts)}"
        slot, traffic, loan = settled.again() or self._settle(expert, weight, settings, error, x)
        send, receive = traffic.sum(2).tolist()
        weight = weight / weight.sum(-1, keepdim=True)
        return Route(weight, slot.argsort(stable=True), send, receive, traffic[1], loan)

    def compute(self, x: Tensor, route: Route) -> Tensor:
        """Send every token where its route says, and return what comes back; collective under a group.

        Args:
            x: the tokens that `route` was given.
            route: what it returned.

        Returns:
            A tensor like ``x``.

        Raises:
            TypeError, ValueError: ``x`` is not allowed, has another number of tokens than the route, or the route is of
                another layer. With transfers also: experts require gradients and none did in `route`; or weights have
                changed since, and the plan counted on guests of an earlier batch. Raised before anything is sent, but
                on this rank alone: the others wait for it until the group's time-out.
        """
        if self._lender is not None and torch.compiler.is_compiling():
            return _uncompiled(self.compute, x, route)  # type: ignore[no-any-return]
        error = self._refusal(x) or self._misfit(x, route)
        if error is not None:
            if not torch.compiler.is_compiling():
                raise error
            return x + route.received.sum()  # traced, but not reached: `route` raises, so the graph must hold it
        lent = None if route.loan is None else self._lend(route.loan, x)
        row = inverse(route.choice)  # of each choice
        rows = permuted(x.reshape(-1, self.hidden_size), route.choice, row, self.top_k)
        rows, place, back = self._by_slot(all_to_all(rows, route.receive, route.send, self._ranks), route.received)
        rows = permuted(self._serve(rows, route.received.sum(0), lent), place, back)
        rows = all_to_all(rows, route.send, route.receive, self._ranks)
        rows = rows if lent is None else lent.ahead(rows)
        by_choice = permuted(rows, row, route.choice).view(-1, self.top_k, self.hidden_size)
        # Choice by choice, as the router has them: where they were served does not matter, and in float32 at least.
        out = torch.zeros((), dtype=route.weight.dtype, device=x.device)
        for part, weight in zip(by_choice.unbind(1), route.weight.unbind(1), strict=True):
            out = out + part * weight.unsqueeze(-1)
        return out.to(x.dtype).view_as(x)

    def _refusal(self, x: Tensor) -> Exception | None:
        """What is wrong before any work, to be raised on all ranks."""
        if not isinstance(x, Tensor):
            return TypeError(f"x is {seen(x)}, allowed is a torch.Tensor")
        if x.dtype != self.router.dtype:
            return TypeError(f"x has dtype {x.dtype}, allowed is the layer's, {self.router.dtype}")
        features = int(x.shape[-1]) if x.dim() else 0  # an int in compiled code too, for the message
        if features != self.hidden_size:
            return ValueError(f"x has {features} features in its last dimension, allowed is {self.hidden_size}")
        if x.device != self.router.device:
            return ValueError(f"x is on {str(x.device)!r}, allowed is the layer's device, {str(self.router.device)!r}")
        now = self.placement if self.balancer is None else self.balancer.placement
        if now is not self.placement and now != self.placement:
            return ValueError("the balancer has another placement than the weights of this layer")
        if self._lender is not None:
            if self.experts is not self._lender.experts:
                return ValueError("experts has been replaced, allowed with transfers are those that the layer made")
            if torch.is_autocast_enabled(self.router.device.type):
                return ValueError(
                    "autocast is on, allowed with transfers is off: give the layer the dtype to compute in"
                )
        return None

    def _misfit(self, x: Tensor, route: Route) -> Exception | None:
        """What keeps a route from being carried out for these tokens."""
        if torch.compiler.is_compiling():  # in one graph with `route`
            return None
        n, routed = x.numel() // self.hidden_size, len(route.weight)
        if n != routed:
            return ValueError(f"x has {n} tokens, allowed are as many as route was given, {routed}")
        if self._lender is not None:
            return self._lender.refusal(route.loan)
        if route.loan is not None:
            return ValueError("route is of a layer with transfers, allowed is what this layer's route returned")
        return None

    # ---- between ranks

    def _settle(
        self, expert: Tensor, weight: Tensor, settings: str, error: Exception | None, x: Tensor
    ) -> tuple[Tensor, Tensor, Loan | None]:
        """The slot for every choice, what `_agree` returns, and the loan; an error waits until then. Collective."""
        slot, loan, n_slots = expert, None, self.placement.n_physical
        if self._lender is not None:
            slot, loan, settings, error = self._lender.lend(expert, x, settings, error)
            n_slots = self._lender.n_slots
        elif self.balancer is not None:
            try:
                slot = self.balancer.run(expert, None, lag=self.lag)
            except (TypeError, ValueError) as problem:  # not that a rank is lost: then nothing can be agreed on
                slot, error = torch.full_like(expert, -1), error or problem
        slot = slot.flatten()
        # A slot of -1, which the balancer gives on CUDA for a batch that another rank refused, is counted apart.
        counts = slot.new_zeros(n_slots + 1).scatter_add_(0, slot + 1, torch.ones_like(slot))[1:]
        traffic = self._agree(counts.view(self._ranks.size, -1), weight, settings, error)
        settled.note(slot, traffic, loan)
        return slot, traffic, loan

    def _agree(self, counts: Tensor, weight: Tensor, settings: str, error: Exception | None) -> Tensor:
        """Exchange the rows that ranks have for each other's slots; raise an error of one rank on all. Collective.

        Args:
            counts: rows of this rank for every slot, int64 ``[ranks, slots]``.
            weight: router probabilities, refused if one is NaN.
            settings: in what ranks must not differ, in words.
            error: this rank's, if there is one already.

        Returns:
            Rows of this rank for every slot, and of every rank for this one's, int64 ``[2, ranks, slots]`` on the CPU.
        """
        if torch.compiler.is_compiling() or ops.is_traced(counts):
            kind, text = exchange.error_word(error), "" if error is None else str(error)
            traffic: Tensor = torch.ops.lplb.agree(counts, weight, settings, kind, text, self._handle)
            return traffic
        return self._agree_now(counts, weight, settings, error)

    @torch.no_grad()
    def _agree_now(self, counts: Tensor, weight: Tensor, settings: str, error: Exception | None) -> Tensor:
        ranks, n_slots = self._ranks, counts.shape[1]
        words = counts.new_tensor([exchange.error_word(error), exchange.LAYER, *_fingerprint(settings)])
        if error is None:
            words[0] = weight.isnan().any()  # the word of a ValueError is 1
        sent = torch.cat([counts, words.expand(ranks.size, -1)], 1)
        got = sent
        with exchange.turn(ranks):
            if isinstance(ranks, exchange.Distributed):
                got = torch.empty_like(sent)
                dist.all_to_all_single(got, sent, group=ranks.group)
            traffic = torch.stack([sent, got]).cpu()
            if error is None and traffic[0, 0, n_slots] != 0:
                token = int(weight.isnan().any(-1).nonzero()[0])
                error = ValueError(f"the router's shares of token {token} are nan, allowed are finite scores")
            exchange.raise_together(ranks, traffic[1, :, n_slots:].tolist(), error, settings=settings)
        traffic = traffic[:, :, :n_slots].contiguous()  # as the operator promises
        self.received = traffic[1]
        return traffic

    # ---- experts

    def _lend(self, loan: Loan, x: Tensor) -> Lent:
        """Let guests set out, for a batch whose tokens will."""
        assert self._lender is not None
        return self._lender.begin(loan, [*self.expert_fields[0], *self.expert_fields[1]], x.requires_grad)

    def _by_slot(self, rows: Tensor, received: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that lie rank by rank, and in each slot by slot, in the order of slots; and the way back."""
        n_ranks, n_slots = received.shape
        slot = torch.arange(n_slots, device=received.device).repeat(n_ranks)
        slot = slot.repeat_interleave(received.flatten(), output_size=len(rows))  # of every row
        row = slot.to(rows.device).argsort(stable=True)
        place = inverse(row)
        return permuted(rows, row, place), place, row

    def _serve(self, rows: Tensor, per_slot: Tensor, lent: Lent | None) -> Tensor:
        """What the experts of this rank's slots make of rows that lie slot by slot."""
        groups = has_grouped_matmul(rows, self.ffn_size)
        if lent is not None:
            return lent.serve(rows, per_slot.tolist(), groups)
        if groups:
            offsets = per_slot.cumsum(0).to(rows.device, torch.int32)
            served = grouped(rows, offsets, self.experts.stacked("gate_up"), self.experts.stacked("down"))
        else:
            served = one_by_one(rows, per_slot.tolist(), *self.expert_fields)
        return served.to(rows.dtype)

    def tokens_within(self, memory_bytes: int, *, layers: int = 1) -> int:
        """Return how many rows a rank may receive, for ``transfers.max_tokens``, so that memory suffices.

        What is counted, on a rank, at the peak of a backward pass: guest slots and the two experts on their way (with
        ``resend=False`` guests of every layer too); new gradients of one layer's own experts, and the sum of one
        expert's in float32 or wider; and for every row received, with ``s`` bytes per element,
        ``s * (hidden_size + 2 * ffn_size) + 16`` in every layer and ``s * (3 * hidden_size + 3 * ffn_size)`` in the
        layer that is differentiated. Not counted is what no plan changes: own weights, gradients that parameters have
        already, and the rows that this rank sends. On CUDA a grouped product has its result once more for a moment.

        Args:
            memory_bytes: for all this.
            layers: layers whose backward pass is still to come when the last of them has computed; layers under
                activation checkpointing count as one.

        Raises:
            TypeError, ValueError: an argument is not allowed, the layer has no transfers, or the memory does not
                suffice for one row; the message says what does.
        """
        if self._lender is None:
            raise ValueError(
                "the layer has no transfers, allowed is a layer with them: without, nothing bounds its rows"
            )
        memory_bytes = whole_number("memory_bytes", memory_bytes, 0)
        fixed, per_row = self._lender.bytes_for(whole_number("layers", layers, 1))
        if memory_bytes < fixed + per_row:
            raise ValueError(
                f"memory_bytes is {memory_bytes}, allowed is {fixed + per_row} or more: {fixed} for guests and "
                f"gradients of own experts, and {per_row} for every row"
            )
        return (memory_bytes - fixed) // per_row

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallelMoE":
        """A copy has weights of its own, and under a group the same ranks and the same balancer."""
        if isinstance(self._ranks, exchange.Distributed):
            memo |= {id(shared): shared for shared in (self._ranks, self.balancer)}
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        if self._lender is not None:
            memo |= {id(shared): shared for shared in (self._ranks, self.transfers, self._lender)}
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        if other._lender is not None:
            other._lender = other._lender.for_copy(other.experts)
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layer to compiled code."""
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        self._handle = _handle_of(self)
        if self._lender is not None:
            _stay_uncompiled()


def _gradients(x: object, experts: SlotWeights) -> str:
    """Whether tokens take part in the backward pass, which all ranks must."""
    wanted = torch.is_grad_enabled() and ((isinstance(x, Tensor) and x.requires_grad) or experts.trained)
    return " that need gradients" if wanted else " without gradients"


_fingerprint = lru_cache(exchange.fingerprint)


def _as_it_is(method: Callable[..., Any], *given: object) -> Any:
    """Weights that travel are beyond a compiler: a thread or a stream moves them."""
    return method(*given)


_uncompiled: Callable[..., Any] = _as_it_is


def _stay_uncompiled() -> None:
    """Have `_uncompiled` break the graph. Not on import: it takes as long as torch itself."""
    global _uncompiled
    if _uncompiled is _as_it_is:
        _uncompiled = torch.compiler.disable(_as_it_is)  # type: ignore[no-untyped-call, unused-ignore]


# ---- the exchange of split sizes as an operator, for torch.compile; a graph holds the layer's number, not the layer

_layers: "weakref.WeakValueDictionary[int, ExpertParallelMoE]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _handle_of(layer: ExpertParallelMoE) -> int:
    handle = next(_numbers)
    _layers[handle] = layer
    return handle


@torch.library.custom_op("lplb::agree", mutates_args=())
def _agree(counts: Tensor, weight: Tensor, settings: str, kind: int, text: str, layer: int) -> Tensor:
    error = exchange.KINDS[kind - 1](text) if kind else None
    return _layers[layer]._agree_now(counts, weight, settings, error)


@_agree.register_fake
def _agree_fake(counts: Tensor, weight: Tensor, settings: str, kind: int, text: str, layer: int) -> Tensor:
    return counts.new_empty(2, *counts.shape, device="cpu")
