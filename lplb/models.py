"""Shapes of public Mixture-of-Experts models: what a layer's cost and the advice for a deployment depend on."""

from dataclasses import dataclass, fields

__all__ = ["MODELS", "ModelShape", "model_by_name"]

_PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class ModelShape:
    """The routed experts of a model. Shared experts, router and attention are not in it: balance does not touch them.

    Raises:
        TypeError: a number is not one.
        ValueError: a number is not positive, a group does not divide, or the precision has another name.
    """

    name: str
    """What reports call it."""
    n_logical: int
    """Routed experts per layer."""
    top_k: int
    """Experts of a token."""
    hidden: int
    """Width of a token's hidden state."""
    intermediate: int
    """Width inside an expert, which has three matrices (gate, up, down) of ``hidden * intermediate`` weights."""
    moe_layers: int
    """Layers that have experts."""
    weight_bytes: float
    """Bytes per weight of an expert."""
    precision: str
    """What an expert computes in, ``"bf16"`` or ``"fp8"``."""
    dispatch_bytes: float
    """Bytes per element of a hidden state on its way to an expert."""
    combine_bytes: float = 2.0
    """Bytes per element on its way back."""
    n_group: int = 1
    """Groups of consecutive experts that node-limited routing knows."""
    topk_group: int = 1
    """Groups that a token's experts come from."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is str:
                continue
            allowed = (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(
                    f"{field.name} is {value!r}, allowed is {'an int' if field.type is int else 'a number'}"
                )
            if not 0 < value < float("inf"):  # false for NaN as well
                raise ValueError(f"{field.name} is {value}, allowed is above 0")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, allowed are {', '.join(map(repr, _PRECISIONS))}")
        if self.top_k > self.n_logical:
            raise ValueError(f"top_k is {self.top_k}, allowed is at most n_logical = {self.n_logical}")
        if self.n_logical % self.n_group:
            raise ValueError(f"n_group is {self.n_group}, allowed is a divisor of n_logical = {self.n_logical}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, allowed is at most n_group = {self.n_group}")

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights in one layer."""
        return 3 * self.hidden * self.intermediate * self.weight_bytes

    @property
    def flops_per_token(self) -> float:
        """Operations of one token in one expert: a multiplication and an addition per weight."""
        return 6.0 * self.hidden * self.intermediate

    @property
    def slot_bytes(self) -> float:
        """Bytes of one slot in all layers: what a redundant slot per rank costs each rank."""
        return self.expert_bytes * self.moe_layers


_FP8_HIDDEN = 1 + 4 / 128  # DeepEP dispatches FP8 with a float32 scale per 128 elements

# config.json of each repository on huggingface.co:
#   deepseek-ai/DeepSeek-V3: n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size,
#     num_hidden_layers 61 of which first_k_dense_replace 3 are dense; fp8 e4m3 (scales per 128 × 128 weights, 0.02 %,
#     left out); n_group, topk_group.
#   Qwen/Qwen3-235B-A22B: num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size, num_hidden_layers,
#     decoder_sparse_step 1 and no mlp_only_layers, so that every layer has experts; bfloat16.
#   openai/gpt-oss-120b: num_local_experts, experts_per_token, hidden_size, intermediate_size, num_hidden_layers; mxfp4:
#     4 bits and a scale of 8 bits per 32 weights. Activations are bf16 (github.com/openai/gpt-oss); what computes in
#     lower precision on newer GPUs is not modelled.
#   moonshotai/Kimi-K2-Instruct: as DeepSeek-V3, first_k_dense_replace 1, n_group 1.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("deepseek-v3", 256, 8, 7168, 2048, 58, 1.0, "fp8", _FP8_HIDDEN, n_group=8, topk_group=4),
        ModelShape("qwen3-235b-a22b", 128, 8, 4096, 1536, 94, 2.0, "bf16", 2.0),
        ModelShape("gpt-oss-120b", 128, 4, 2880, 2880, 36, 17 / 32, "bf16", 2.0),
        ModelShape("kimi-k2", 384, 8, 7168, 2048, 60, 1.0, "fp8", _FP8_HIDDEN),
    )
}
"""The presets by name."""


def model_by_name(name: str) -> ModelShape:
    """Return a preset.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}, allowed are {', '.join(map(repr, MODELS))}")
    return MODELS[name]
