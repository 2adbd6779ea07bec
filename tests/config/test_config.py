"""What is chosen for a model: experts per block, length of sequences."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest
from transformers import GPT2Config

from d2dmoe.cli import add_fields
from d2dmoe.config import Block, ConvertConfig, UserError, can_split, choose_experts, options, resolve, targets
from d2dmoe.hub import fit_length


def block(width: int) -> Block:
    return Block(name="mlp", kind="ffn", activation="relu", d_model=8, width=width, up="up", gate=None, down="down")


@pytest.mark.parametrize(("limit", "length"), [(64, 64), (512, 256), (-1, 256)])
def test_sequences_are_no_longer_than_the_model_takes(limit, length):
    config = ConvertConfig(max_length=256)
    model_config = GPT2Config(n_positions=limit)
    fitted = fit_length(config, model_config)
    assert (type(fitted), fitted.max_length) == (ConvertConfig, length)
    assert config.max_length == 256


# width -> experts by default: of about 32 neurons, dividing the width unless that makes them tiny
BY_DEFAULT = {3072: 96, 11008: 344, 64: 16, 172: 43, 12: 12, 11003: 344, 2 * 5501: 344}


@pytest.mark.parametrize("width", BY_DEFAULT)
def test_default(width):
    experts = choose_experts(block(width), 0, 0)
    assert experts == BY_DEFAULT[width]
    assert can_split(width, experts)


@pytest.mark.parametrize("width", [1, 7, 12, 64, 97])
def test_every_number_that_fits_leaves_no_expert_empty(width):
    for experts in range(1, 2 * width):
        size = -(-width // experts)
        last = width - size * (experts - 1)
        assert can_split(width, experts) == (1 <= last <= size)


def test_a_size_that_fits():
    assert choose_experts(block(64), 0, 11) == 6
    assert choose_experts(block(64), 0, 16) == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"speedup": "1"}, "--speedup 1: .* above 1"),
        ({"speedup": "1.5,0.5"}, "--speedup 0.5"),
        ({"flops": "1.2"}, "--flops 1.2"),
        ({"max_loss": "0"}, "--max-loss 0"),
    ],
)
def test_goals_out_of_range(values, said):
    with pytest.raises(UserError, match=said):
        resolve(ConvertConfig, values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"head_active": 0.3}, "--head-active 0.3 changes nothing without --head svd-softmax"),
        ({"attention_active": 0.5}, "--attention-active 0.5 changes nothing without --attention"),
        ({"attention_layers": "0"}, "--attention-layers 0 changes nothing without --attention"),
        ({"heal_parameters": "all"}, "--heal-parameters all changes nothing without --heal"),
        ({"heal": 9, "stand_in": "zero"}, "--stand-in zero has nothing to train"),
        ({"heal": 9, "stand_in": "zero", "attention": "mlp:q"}, "--stand-in zero has nothing to train"),
        (
            {"router_fit": "closed-form", "router_learning_rate": 0.1},
            "--router-learning-rate 0.1 changes nothing with --router-fit closed-form",
        ),
        ({"shared_experts": 4}, "--shared-experts 4 belongs to --split shared_experts, and --split is coactivation"),
        ({"attention": "auto", "attention_experts": 4}, "--attention-experts 4 belongs to --attention mlp"),
    ],
)
def test_what_changes_nothing_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        resolve(ConvertConfig, values)


@pytest.mark.parametrize("added", [{"attention": "low-rank"}, {"head": "svd-softmax"}, {"heal_parameters": "all"}])
def test_healing_without_stand_ins_trains_what_else_there_is(added):
    resolve(ConvertConfig, {"heal": 9, "stand_in": "zero", **added})


def test_every_kind_of_goal_becomes_a_target():
    config = resolve(ConvertConfig, {"active": "0.5,1", "flops": "0.8", "max_loss": "2%", "speedup": "2,1.5"})
    assert list(map(str, targets(config))) == ["active=0.5", "flops=0.8", "max-loss=0.02", "speedup=1.5", "speedup=2"]


def test_every_key_belongs_to_the_options_of_one_stage():
    """Names stay flat: one keyword each, and a stage that takes its part takes the whole configuration as well."""
    stages = [
        options.DataConfig, options.SourceConfig, options.SparsifyFirstConfig, options.SplitConfig,
        options.GateConfig, options.RouterConfig, options.StandInConfig, options.AttentionConfig, options.HeadConfig,
        options.BudgetConfig, options.HealConfig,
    ]  # fmt: skip
    shared = {f.name for f in fields(options.CalibrationConfig)}
    own = [{f.name for f in fields(stage)} - shared for stage in stages]
    assert sum(map(len, own)) + len(shared) == len(fields(ConvertConfig))
    assert set().union(shared, *own) == {f.name for f in fields(ConvertConfig)}
    config = ConvertConfig(experts=8, active=[0.5], heal=3, router_tokens=7, seed=2)
    assert (config.experts, config.active, config.heal, config.router_tokens, config.seed) == (8, [0.5], 3, 7, 2)
    assert all(isinstance(config, stage) for stage in stages)
    for stage in stages:
        for name, value in vars(stage()).items():
            assert getattr(ConvertConfig(), name) == value


def test_help_has_a_group_for_every_stage():
    parser = argparse.ArgumentParser()
    add_fields(parser, ConvertConfig)
    groups = {g.title: [a.dest for a in g._group_actions] for g in parser._action_groups}
    assert groups["How neurons become experts"] == ["experts", "expert_size", "split", "shared_experts"]
    assert groups["Distillation after calibration"] == [
        f"heal{end}" for end in ("", "_parameters", "_tokens", "_learning_rate")
    ]
    assert parser.parse_args(["--active", "25%,0.5", "--experts", "4"]).active == [0.25, 0.5]
