"""Inference engines: the router's ``topk_ids`` become physical in place.

For the place where vLLM calls ``eplb_map_to_physical_and_record`` (``vllm/model_executor/layers/fused_moe/router``)
and SGLang ``topk_ids_logical_to_physical`` (``python/sglang/srt/eplb/expert_location_dispatch.py``), and with what they
have there: ``topk_ids [tokens, top_k]``, -1 for no expert, padding at the end of a batch whose real length is a number
or, in a CUDA graph, a tensor. The planner's placement is the engine's: a row of the ``physical_to_logical_map`` that
both have makes a `Placement`, after `lplb.eplb.spread_copies` where an expert is twice on a rank.
"""

import torch
from torch import Tensor

from lplb.arguments import INDEX_DTYPES, seen
from lplb.planner import Planner

__all__ = ["map_topk_ids"]

_UINT32 = getattr(torch, "uint32", None)


def map_topk_ids(
    planner: Planner,
    topk_ids: Tensor,
    *,
    n_tokens: int | Tensor | None = None,
    is_padding: Tensor | None = None,
    load: Tensor | None = None,
    lag: int = 0,
) -> Tensor:
    """Overwrite logical expert ids with physical ones; collective under the planner's group.

    Every rank calls it for every layer and step; one without a batch calls it with no token, or `Planner.run_idle`.

    Args:
        planner: of the layer's experts and expert-parallel group.
        topk_ids: int32, int64 or uint32 ``[tokens, top_k]``, on the planner's device; overwritten. -1 stays.
        n_tokens: rows from here on are padding: an int, or one element on the device (vLLM's ``num_unpadded_tokens``,
            SGLang's ``num_token_non_padded``). Below 0 and ``None`` mean that there is none.
        is_padding: or which rows are, bool ``[tokens]``. Padding becomes -1 and counts nowhere: it skews no plan.
        load: tokens of every physical expert, integer ``[n_physical]``, raised by this call's (vLLM's
            ``expert_load_view``).
        lag: as for `Planner.run`.

    Returns:
        ``topk_ids``.

    Raises:
        TypeError, ValueError: an argument is not allowed, on any rank; ``topk_ids`` and ``load`` are then as before
            (on CUDA, where another rank's fault is known later, -1 everywhere, see `Planner`).
    """
    error = _refusal(planner, topk_ids, n_tokens, is_padding, load)
    if error is not None:
        planner.refuse(error, lag=lag)
    ids = topk_ids.view(torch.int32) if topk_ids.dtype == _UINT32 else topk_ids
    asked = ids
    if isinstance(n_tokens, Tensor) or (n_tokens is not None and n_tokens >= 0):
        row = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        real = (row < n_tokens) | (n_tokens < 0)  # in a CUDA graph, a batch without padding may follow
        asked = asked.masked_fill(~real, -1)
    if is_padding is not None:
        asked = asked.masked_fill(is_padding.unsqueeze(1), -1)
    ids.copy_(planner.run(asked, None, lag=lag))
    if load is not None:
        slot = ids.flatten().long()
        load.scatter_add_(0, slot.clamp_min(0), (slot >= 0).to(load.dtype))
    return topk_ids


def _refusal(
    planner: Planner, topk_ids: Tensor, n_tokens: int | Tensor | None, is_padding: Tensor | None, load: Tensor | None
) -> Exception | None:
    if not isinstance(topk_ids, Tensor) or topk_ids.dtype not in (*INDEX_DTYPES, _UINT32):
        return TypeError(f"topk_ids is {seen(topk_ids)}, allowed is an int32, int64 or uint32 tensor [tokens, top_k]")
    if topk_ids.dim() != 2:
        return ValueError(f"topk_ids has shape {list(topk_ids.shape)}, allowed is [tokens, top_k]")
    if isinstance(n_tokens, Tensor) and (n_tokens.numel() != 1 or n_tokens.dtype not in INDEX_DTYPES):
        return ValueError(f"n_tokens is {seen(n_tokens)}, allowed is one element of torch.int32 or torch.int64")
    if n_tokens is not None and not isinstance(n_tokens, Tensor) and not isinstance(n_tokens, int):
        return TypeError(f"n_tokens is {seen(n_tokens)}, allowed is an int, a tensor or None")
    if is_padding is not None:
        if not isinstance(is_padding, Tensor) or is_padding.dtype != torch.bool:
            return TypeError(f"is_padding is {seen(is_padding)}, allowed is a bool tensor or None")
        if is_padding.shape != topk_ids.shape[:1]:
            return ValueError(f"is_padding has shape {list(is_padding.shape)}, allowed is [tokens] = [{len(topk_ids)}]")
    if load is not None and (not isinstance(load, Tensor) or load.dtype not in INDEX_DTYPES):
        return TypeError(f"load is {seen(load)}, allowed is an int32 or int64 tensor, or None")
    if load is not None and load.shape != (planner.n_routed_experts,):
        return ValueError(f"load has shape {list(load.shape)}, allowed is [n_physical] = [{planner.n_routed_experts}]")
    return None
