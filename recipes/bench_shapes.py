"""Time whole models of known shapes with random weights, converted in memory, a fixed share of the experts on.

python recipes/bench_shapes.py --shapes gpt2,llama,minilm --active 0.25 --attention 0.5 --head 0.4 --threads 2
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from d2dmoe.config import D2DMoEConfig
from d2dmoe.config.budgets import Budget
from d2dmoe.config.options import ConvertConfig, HeadConfig
from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.config.sizes import choose_projections, head_projection
from d2dmoe.discovery import discover, find_projections
from d2dmoe.discovery.head import find_head
from d2dmoe.measure.bench import COLUMNS, bench_model
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach
from d2dmoe.moe.projection import projections as dynamic_projections
from d2dmoe.report import bench_table, envelope, write_json

SHAPES = {  # class, config, neurons per expert, (sequences, tokens of each) to measure
    "gpt2": (GPT2LMHeadModel, GPT2Config(), 32, [(1, 512)]),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
                    num_key_value_heads=4, vocab_size=8192, max_position_embeddings=2048),
        32, [(1, 512)],
    ),
    "minilm": (
        BertModel,
        BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
        32, [(32, 64), (1, 64)],
    ),
}  # fmt: skip


def low_rank(projection: Projection, share: float) -> ProjectionState:
    """Factors of which each section takes this share of its work."""
    ranks = tuple(int(share * projection.inputs * w / (projection.inputs + w)) for w in projection.sections)
    return ProjectionState("low-rank", ranks)


def narrow_heads(projection: Projection, share: float) -> ProjectionState:
    """Heads of which each keeps this share of its width."""
    widths = tuple(round(share * width) for width in projection.head_widths)
    return ProjectionState("heads", widths) if widths else low_rank(projection, share)


def head_record(model: torch.nn.Module, share: float, group: int) -> tuple[Projection, ProjectionState]:
    """The head with one token in a hundred exact and factors for the rest of this share."""
    head = head_projection(HeadConfig(head_active=share), *find_head(model), group)
    candidates = head.outputs // 100
    rank = head.affordable_rank(share, candidates)
    return head, ProjectionState("svd-softmax", (rank,), candidates=candidates)


def build(
    name: str, active: float, attention: float, head: float = 0.0, way: str = "low-rank"
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """`(converted, dense)` of the same random weights, routers random as well; one stored budget."""
    kind, config, size, _ = SHAPES[name]
    torch.manual_seed(0)
    dense = kind(config).eval()
    model = copy.deepcopy(dense)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = block.width // size
    projections = choose_projections(ConvertConfig(attention=way), find_projections(model).found) if attention else []
    states = [(low_rank if way == "low-rank" else narrow_heads)(projection, attention) for projection in projections]
    if head:
        found, state = head_record(model, head, 1 + max((p.group for p in projections), default=-1))
        projections, states = [*projections, found], [*states, state]
    record = D2DMoEConfig(blocks=blocks, router_width=128, projections=projections)
    budget = Budget(active, record.equal_thresholds(active))
    budget.projection_states = states
    record.budgets.replace([budget])
    attach(model, record, [torch.arange(b.width) for b in blocks])
    for layer in dynamic_projections(model):
        for name in layer.ADDED:
            getattr(layer, name).data.normal_()
    for seed, layer in enumerate(layers(model)):
        layer.router.reset(seed)
    return model, dense


def main() -> None:
    """Print a table and, with `--json`, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="gpt2,minilm", help=", ".join(SHAPES))
    parser.add_argument("--active", type=float, default=0.25)
    parser.add_argument("--attention", type=float, default=0.0, help="share of the projections' work; 0: dense")
    parser.add_argument("--way", choices=("low-rank", "heads"), default="low-rank", help="what runs of the projections")
    parser.add_argument("--head", type=float, default=0.0, help="share of the head's work, SVD-softmax; 0: dense")
    parser.add_argument("--length", type=int, help="tokens of a sequence, and before a decoded one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--columns", default="eager", help=", ".join(COLUMNS))
    parser.add_argument(
        "--expert-dtype", choices=("int8", "int8-dynamic"), help="a further column: experts in this dtype"
    )
    parser.add_argument(
        "--linear-dtype",
        choices=("int8", "int8-dynamic"),
        help="other linear maps, there and in a column of dense",
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.shapes.split(","):
        model, dense = build(name, arguments.active, arguments.attention, arguments.head, arguments.way)
        for batch, usual in SHAPES[name][3]:
            length = arguments.length or usual
            found = bench_model(
                model, dense, batches=[batch], length=length, settings=[{"active": arguments.active}],
                seconds=arguments.seconds, columns=tuple(arguments.columns.split(",")), clock=arguments.clock,
                expert_dtype=arguments.expert_dtype, linear_dtype=arguments.linear_dtype,
            )  # fmt: skip
            print(f"{name}, {batch} x {length}\n{bench_table(found)}\n", flush=True)
            rows += [{"shape": name, **row} for row in found]
    if arguments.json:
        write_json(arguments.json, envelope(["python", "recipes/bench_shapes.py"], 0, rows))


if __name__ == "__main__":
    main()
