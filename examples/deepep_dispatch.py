"""From the router's picks to experts and back, with lplb and DeepEP: `python examples/deepep_dispatch.py`.

Where deep_ep and at least two GPUs are there it uses them; elsewhere four processes over gloo with a stand-in of the
same interface. It prints the tokens per rank without and with balancing, and checks what comes back to every token.
"""

import importlib.util
import multiprocessing
import sys
import tempfile

import torch
import torch.distributed as dist

from lplb import Planner, topology

N_TOKENS, TOP_K, HIDDEN = 512, 4, 128  # per rank
OWN, COPIES = 8, 4  # experts per rank


def real_buffer(group):
    """A buffer for the ranks of one server; sizes as DeepEP's README has them."""
    from deep_ep import Buffer

    configs = Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())
    return Buffer(group, max(config.get_nvl_buffer_size_hint(HIDDEN * 2, group.size()) for config in configs))


def router(rank, n_logical, device):
    """Tokens, picks and weights; values are such that bfloat16 adds them without rounding."""
    random = torch.Generator().manual_seed(rank)
    popularity = torch.rand(n_logical, generator=torch.Generator().manual_seed(99)) ** 4 + 0.01
    picks = torch.multinomial(popularity.expand(N_TOKENS, -1), TOP_K, generator=random)
    x = torch.randint(-4, 5, (N_TOKENS, HIDDEN), generator=random).bfloat16()
    weights = torch.tensor([0.25, 0.5, 1.0])[torch.randint(3, (N_TOKENS, TOP_K), generator=random)]
    return x.to(device), picks.to(device), weights.to(device)


def factor(logical):
    """What an expert of this example does with a token: multiply it."""
    return 1.0 + logical % 3


def layer(planner, buffer, rank, x, indices, weights):
    """One MoE layer. This is the recipe; the rest of the file sets it up and checks it."""
    physical = planner.run(indices, None)  # int64 in, int64 out, contiguous: what DeepEP wants of topk_idx
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(physical, planner.n_routed_experts)
    received, experts, received_weights, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=physical,
        topk_weights=weights,
    )
    mine = planner.phy2log.view(planner.ep_size, -1)[rank]  # the logical experts whose weights this rank holds
    scale = torch.where(experts >= 0, factor(mine[experts.clamp(min=0)]) * received_weights, 0.0).sum(1, keepdim=True)
    combined, _, _ = buffer.combine((received * scale).bfloat16(), handle)
    return combined, sum(counts)


def serve(rank, size, store, real):
    """One rank."""
    device = torch.device("cuda", rank) if real else torch.device("cpu")
    if real:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if real else "gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if real:
        buffer = real_buffer(dist.group.WORLD)
    else:
        from deep_ep_stand_in import Buffer

        buffer = Buffer(dist.group.WORLD)

    n_logical = size * OWN
    planner = Planner(topology.ring(size), size * (OWN + COPIES), n_logical, ep_size=size, device=device)
    planner.init_from_deep_ep(buffer)  # from now on indices are this rank's, and counts travel over the buffer's group
    x, indices, weights = router(rank, n_logical, device)
    _, earlier_indices, _ = router(size + rank, n_logical, device)
    loads, history = (torch.bincount(i.flatten(), minlength=n_logical) for i in (indices, earlier_indices))
    dist.all_reduce(loads)
    dist.all_reduce(history)
    planner.update_redundancy_mapping(history)  # and now weights would be moved to where phy2log says

    combined, n_received = layer(planner, buffer, rank, x, indices, weights)

    expected = (x * (factor(indices) * weights).sum(1, keepdim=True)).bfloat16()
    report = torch.tensor([n_received, int(torch.equal(combined, expected))], device=device)
    reports = [torch.empty_like(report) for _ in range(size)]
    dist.all_gather(reports, report)
    received, right = torch.stack(reports).T.tolist()
    if rank == 0:
        print(f"{size} ranks, " + ("deep_ep.Buffer over NCCL" if real else "a stand-in for deep_ep.Buffer over gloo"))
        print(f"tokens per rank without: {loads.view(size, OWN).sum(1).tolist()}")
        print(f"tokens per rank with:    {received}")
        print(f"combined sums are right on {sum(right)} of {size} ranks", flush=True)
    dist.destroy_process_group()
    sys.exit(0 if all(right) else 1)


def main():
    """Start the ranks, and fail if one does."""
    real = importlib.util.find_spec("deep_ep") is not None and torch.cuda.device_count() >= 2
    size = max(n for n in (2, 4, 8) if n <= torch.cuda.device_count()) if real else 4
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torch.distributed", "lplb"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [processes.Process(target=serve, args=(rank, size, f"{folder}/store", real)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


if __name__ == "__main__":
    main()
