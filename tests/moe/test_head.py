"""The head by SVD-softmax: its formula, what is exact, and what is stored."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import randomise_vectors
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification
from zoo import tiny

from d2dmoe import ConvertConfig, UserError
from d2dmoe.attention.head import fit_head
from d2dmoe.config import D2DMoEConfig
from d2dmoe.config.budgets import Budget
from d2dmoe.config.options import HeadConfig
from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.config.sizes import head_projection
from d2dmoe.convert import convert_model
from d2dmoe.data import Batches
from d2dmoe.discovery import discover
from d2dmoe.discovery.head import find_head
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.flops import dense_cost
from d2dmoe.measure.observe import model_inputs
from d2dmoe.moe.gating import set_gate
from d2dmoe.moe.head import FEW, DynamicHead
from d2dmoe.moe.loader import attach
from d2dmoe.moe.memory import merge
from d2dmoe.moe.projected import make_projection
from d2dmoe.moe.projection import head_of

QUICK = ConvertConfig(
    experts=8, router_width=8, router_tokens=64, router_batch=16, calibration_tokens=400, active=[0.5],
    head="svd-softmax", head_active=0.5,
)  # fmt: skip
INPUTS, OUTPUTS, RANK, CANDIDATES = 12, 70, 5, 9
STATE = ProjectionState("svd-softmax", (RANK,), candidates=CANDIDATES)


def batches(rows: int = 60, length: int = 12) -> Batches:
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(4)).tolist()
    return Batches([{"input_ids": row} for row in ids], 8)


def random_head(dtype: torch.dtype = torch.float32, bias: bool = True) -> DynamicHead:
    torch.manual_seed(1)
    dense = nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype)
    head = make_projection(dense, Projection("head", "head", 0, INPUTS, OUTPUTS, [OUTPUTS], rank=7), 0)
    for name in head.ADDED:
        getattr(head, name).data.normal_()
    head.gate_state = STATE
    return head.requires_grad_(False)


def definition(head: DynamicHead, x: torch.Tensor) -> torch.Tensor:
    """The formula of the module's docstring, in double precision, one row at a time."""
    weight, bias = head.weight.double(), 0 if head.bias is None else head.bias.double()
    basis, back = head.low_rank_in[:, :RANK].double(), head.low_rank_out[:RANK].double()
    mean, rows = head.output_mean.double(), []
    for row in x.double().reshape(-1, INPUTS):
        rough = weight @ basis @ back @ (row - mean) + weight @ mean + bias
        exact = weight @ row + bias
        best = rough.topk(CANDIDATES).indices
        rough[best] = exact[best]
        rows.append(rough)
    return torch.stack(rows).reshape(*x.shape[:-1], OUTPUTS)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 200])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_formula(rows, bias, dtype):
    head, x = random_head(dtype, bias), torch.randn(rows, INPUTS, dtype=dtype)
    assert_close(head(x).double(), definition(head, x), rtol=1e-5, atol=1e-5)


def test_with_gradients_it_is_the_same():
    head, x = random_head(), torch.randn(2, 3, INPUTS, requires_grad=True)
    frozen = head(x.detach())
    head.weight.requires_grad_(True)
    y = head(x)
    assert_close(y, frozen, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert head.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_it_follows_the_weights():
    head, x = random_head(), torch.randn(1, INPUTS)
    head(x)
    with torch.no_grad():
        head.weight.mul_(2)
    assert_close(head(x).double(), definition(head, x), rtol=1e-5, atol=1e-5)


def test_each_row_by_its_own_gate():
    head, x = random_head(), torch.randn(2, INPUTS)
    both = head.by_rows(x, (STATE, ProjectionState()))
    assert_close(both[0], head(x[:1])[0])
    assert_close(both[1], nn.functional.linear(x[1], head.weight, head.bias))


@pytest.mark.parametrize("name", ["gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_convert_save_and_open(name, tmp_path):
    model, data = tiny(name), batches()
    randomise_vectors(model)
    inputs = model_inputs(model, data[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(**inputs).logits
    convert_model(model, QUICK, data)
    (row,) = evaluate(model, data, [{"active": 0.5}])
    cost = dense_cost(model, inputs)
    with set_gate(model, active=0.5):
        state, shape = head_of(model).gate_state, head_of(model).projection
        assert cost.saved_by_head(model) > 0
    assert state.candidates > 0
    assert "flops_fraction_attention" not in row
    assert state.ranks[0] * (shape.inputs + shape.outputs) + state.candidates * shape.inputs <= 0.5 * shape.macs
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    head = f"{find_head(tiny(name))[0]}.weight"
    assert head not in stored or torch.equal(stored[head], before[head])
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        for active in (0.5, 1):
            set_gate(model, active=active)
            set_gate(again, active=active)
            assert torch.equal(model(**inputs).logits, again(**inputs).logits)
        assert_close(again(**inputs).logits, dense, rtol=1e-4, atol=1e-5)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (
        model.config.tie_word_embeddings
    )


def test_text_is_the_same_with_and_without_a_cache():
    model = tiny("llama")
    convert_model(model, replace(QUICK, attention="auto"), batches())
    set_gate(model, active=0.5)
    prompt = torch.tensor([[7, 8, 9, 10]])
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, **given, use_cache=True)
    assert torch.equal(cached, model.generate(prompt, **given, use_cache=False))
    merge(model)
    assert torch.equal(cached, model.generate(prompt, **given))


def test_the_fit_loses_less_than_singular_vectors():
    """Of the weights alone, as the method was published."""
    model = tiny("llama")
    head = head_projection(HeadConfig(head_active=0.5), *find_head(model), 0)
    attach(model, D2DMoEConfig(router_width=1, projections=[head]), [])
    data = batches()
    state, layer = fit_head(model, data, 0.5), head_of(model)
    inputs = model_inputs(model, data[0])

    def loss() -> float:
        logs = []
        for setting in (ProjectionState(), replace(state, candidates=0)):
            layer.gate_state = setting
            logs.append(model(**inputs).logits.log_softmax(-1))
        return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())

    with torch.no_grad():
        fitted = loss()
        directions = torch.linalg.svd(layer.weight, full_matrices=False).Vh[: layer.projection.rank]
        layer.low_rank_in.copy_(directions.T)
        layer.low_rank_out.copy_(directions)
        assert fitted < 0.8 * loss()


def test_the_record():
    head = Projection("lm_head", "head", 0, INPUTS, OUTPUTS, [OUTPUTS], rank=7)
    blocks = discover(tiny("gpt2")).blocks
    for block in blocks:
        block.experts = 8
    budget = Budget(0.5, [0.5] * len(blocks))
    budget.forget_fits()
    budget.projection_states = [STATE]
    values = D2DMoEConfig(blocks=blocks, router_width=1, projections=[head], budgets=[budget]).to_dict()
    assert values["version"] == 3
    again = D2DMoEConfig.from_dict(values)
    assert again.to_dict() == values
    assert again.budgets[0].projection_states == [STATE]
    values["budgets"][0]["candidates"][-1] = OUTPUTS + 1
    with pytest.raises(UserError, match=r"budgets\[0\].candidates"):
        D2DMoEConfig.from_dict(values)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="does not choose from a vocabulary"):
        convert_model(tiny("bert"), QUICK, batches())


def test_the_share_is_checked():
    from d2dmoe.config import resolve

    with pytest.raises(UserError, match="--head-active 1"):
        resolve(ConvertConfig, {"head": "svd-softmax", "head_active": 1.0})


@pytest.mark.parametrize(("name", "tokens"), [("gpt2", 110), ("gpt2", 80), ("llama", 110)])
def test_a_vocabulary_of_another_size(name, tokens, tmp_path):
    """Tied, the head stays; else transformers makes a new one, which runs dense."""
    model = tiny(name)
    convert_model(model, QUICK, batches())
    model.resize_token_embeddings(tokens)
    model.save_pretrained(tmp_path)
    replaced = head_of(model) is None
    with pytest.warns(UserWarning, match="runs dense") if replaced else nullcontext():
        again = type(model).from_pretrained(tmp_path)
    assert (head_of(again) is None) == replaced
    ids = torch.arange(12)[None]
    for active in (0.5, 1):
        for each in (model, again):
            set_gate(each, active=active)
        assert_close(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    type(model).from_pretrained(tmp_path / "again")


def test_another_kind_of_head_has_no_converted_one(tmp_path):
    model = tiny("llama")
    convert_model(model, QUICK, batches())
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert head_of(other) is None
    assert_close(other.model(torch.arange(12)[None])[0], model.model(torch.arange(12)[None])[0])
    other.save_pretrained(tmp_path / "again")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
