"""Work shared out over heads, and over the ways around one attention."""

from __future__ import annotations

import pytest
import torch
from zoo import tiny

from d2dmoe.config import ConvertConfig, D2DMoEConfig
from d2dmoe.config.sizes import choose_projections
from d2dmoe.discovery import discover, find_projections
from d2dmoe.measure.flops import projection_flops
from d2dmoe.moe.loader import attach
from d2dmoe.moe.projection import projections
from d2dmoe.stages.budgets.heads import Attention, Heads, mixtures_of
from d2dmoe.stages.budgets.projections import LEVELS, Group

COSTS = {"low-rank": 1.0, "channels": 2.0, "channels+": 3.0, "heads": 0.1}


def parts(name: str, cheap: dict[str, float] = COSTS) -> tuple[torch.nn.Module, list, list]:
    """A tiny model, its receivers with costs that fall with their share, and the mixtures."""
    model = tiny(name)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    found = choose_projections(ConvertConfig(attention="auto"), find_projections(model).found)
    attach(model, D2DMoEConfig(blocks, router_width=8, projections=found), [torch.arange(b.width) for b in blocks])
    layers = projections(model)
    falling = lambda n: torch.arange(n, 0, -1).double() ** 2  # noqa: E731
    spectra = [[falling(w) for w in x.projection.sections] for x in layers]
    scores = {x.projection.group: torch.linspace(1, 0, 100) for x in layers}
    heads = {}
    for x in layers:
        p = x.projection
        for role, count in zip(p.role, p.heads, strict=False):
            if role in "kv" and count:
                pair = "qk" if role == "k" else "vo"
                heads[f"{p.attention}.{pair}"] = torch.stack(
                    [falling(p.head_widths[0]) * (n + 1) for n in range(count)]
                )
    receivers, mixtures = mixtures_of(layers, scores, spectra, heads)
    for part in receivers:
        part.costs = {kind: [cheap[kind] * part.macs * (1 - level) for level in LEVELS] for kind in part.kinds}
    return model, receivers, mixtures


def test_columns_go_where_they_save_most():
    spectra = torch.tensor([[9.0, 1.0, 0.5, 0.1], [8.0, 7.0, 6.0, 0.2]])
    heads = Heads([], [], [], spectra)
    assert heads.widths(0.5) == [1, 3]
    assert heads.widths(0) == [0, 0]
    assert heads.widths(1) == [4, 4]
    assert heads.left_out(0.5) == pytest.approx(1.0 + 0.5 + 0.1 + 0.2)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "phi3"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_a_mixture_takes_its_share_and_both_sides_agree(name, share):
    model, _, mixtures = parts(name)
    layers = projections(model)
    for members, each in mixtures:
        settings = Attention(members, [layers[n] for n in members], each).settings(share)
        assert set(settings) == set(members)
        spent = sum(projection_flops(layers[n], state=state) for n, state in settings.items())
        full = sum(2 * layers[n].projection.macs * layers[n].projection.calls for n in members)
        methods = {state.method for state in settings.values()}
        if methods <= {"heads", "dense", "low-rank"}:
            assert share - 0.2 < spent / full < share + 0.03
        widths: dict[tuple[int, str], set] = {}
        for n, state in settings.items():
            p = layers[n].projection
            kept = iter(state.ranks if state.method == "heads" else p.head_widths)
            for role, count in zip(p.role, p.heads, strict=False):
                own = [next(kept) for _ in range(count)]
                if count:
                    widths.setdefault((p.attention, "qk" if role in "qk" else "vo"), set()).add(
                        tuple(dict.fromkeys(own))
                    )
        assert all(len({tuple(sorted(set(w))) for w in own}) == 1 for own in widths.values())


def test_the_cheapest_mixture_is_taken():
    for cheapest in ("heads", "low-rank"):
        model, _, mixtures = parts("bert", {**COSTS, cheapest: 1e-6})
        layers = projections(model)
        members, each = mixtures[0]
        attention = Attention(members, [layers[n] for n in members], each)
        assert {s.method for s in attention.settings(0.5).values()} - {"dense"} == {cheapest}
        assert attention.curve() == sorted(attention.curve(), reverse=True)
        assert all(s.method == "dense" for s in attention.settings(1.0).values())


def test_what_a_mixture_is_made_of():
    _, receivers, mixtures = parts("bert")
    layers = len(mixtures)
    assert [len(each) for _, each in mixtures] == [4] * layers
    kinds = [[(type(x).__name__, len(x.members)) for x in mixture] for mixture in mixtures[0][1]]
    assert kinds == [
        [("Group", 3), ("Group", 1)],
        [("Heads", 2), ("Group", 1), ("Group", 1)],
        [("Heads", 2), ("Group", 2)],
        [("Heads", 2), ("Heads", 2)],
    ]
    assert len(receivers) == layers * 6  # each is measured once
    assert sum(isinstance(x, Group) for x in receivers) == layers * 4


def test_fused_projections_count_once():
    _, receivers, _ = parts("gpt2")
    pairs = [x for x in receivers if isinstance(x, Heads)]
    d = 32
    assert {x.macs for x in pairs} == {2 * d * d}
