"""The attributes of the operation `DynamicFFN`, the names that operation.cpp reads."""

NUMBERS = (
    "activation", "gate", "rounds", "few", "d", "size", "d_out", "experts", "router_width", "linear_rank",
    "min_experts", "max_experts", "shared",
)  # fmt: skip
LISTS = ("tensors", "offsets", "strides", "taus", "tops")  # texts with spaces
