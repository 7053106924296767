"""MindIE-SD's dynamic expert load balancing by its names, on lplb's.

For models that are wired for ``mindiesd.eplb`` (https://gitcode.com/Ascend/MindIE-SD, docs/en/features/DyEPLB.md, and
``mindiesd/eplb``): the names of its imports, arguments and attributes stay, and what is behind them is `lplb.dynamic`,
for any torch device. Neither MindIE-SD nor torch_npu is imported.

    from lplb.compat.mindie.collector import ExpertLoadCollector
    from lplb.compat.mindie.dispatcher import DynamicDispatcher
    from lplb.compat.mindie.task_manager import construct_expert_info_transfer_pool

Its scheduler process is ``python -m lplb.eplb_scheduler``, with its flags. What is different:

- ``check_consistency`` compares an integer, where MindIE-SD has an all-reduce and waits for it: the ranks have agreed
  on the step ahead.
- The first ``check_consistency`` of a dispatcher sets ``update_flag`` too: with the update that follows the module
  takes the dispatcher's weights for its own. They keep their addresses from then on; later updates write them in place.
- ``get_expert_trans_tensor()`` is the permutation of the live placement, all changes together: multiply scores by it in
  every pass, not only in those that update.
- Spare slots are there from the beginning: ``redundant`` of them on every rank, as for the scheduler, hold copies.
- There is no default key, see `lplb.compat.mindie.task_manager`.
"""

from lplb.compat.mindie.collector import ExpertLoadCollector
from lplb.compat.mindie.dispatcher import DynamicDispatcher
from lplb.compat.mindie.task_manager import construct_expert_info_transfer_pool

__all__ = ["DynamicDispatcher", "ExpertLoadCollector", "construct_expert_info_transfer_pool"]
