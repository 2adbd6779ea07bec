"""Export to OpenVINO: the same outputs as PyTorch at each budget, and refusals before any work."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import names
from conftest import randomise_routers
from torch.testing import assert_close
from transformers import AutoTokenizer
from zoo import tiny

from d2dmoe import UserError, set_expert_dtype, set_gate
from d2dmoe.config import Budget, ConvertConfig, D2DMoEConfig
from d2dmoe.config.projections import ProjectionState
from d2dmoe.convert import convert_model
from d2dmoe.data.batches import Batches
from d2dmoe.discovery import discover
from d2dmoe.kernels import native
from d2dmoe.moe.gating import stored_config
from d2dmoe.moe.layer import DynamicFFN, layers
from d2dmoe.moe.loader import attach
from d2dmoe.moe.projection import projections

openvino = pytest.importorskip("openvino")

from d2dmoe.openvino import compile_model, extension  # noqa: E402
from d2dmoe.openvino.cache import complete  # noqa: E402
from d2dmoe.openvino.graph import layer_inputs, make_node  # noqa: E402
from d2dmoe.openvino.projections import check_budgets, dense_maps, plain_projection  # noqa: E402
from d2dmoe.pipeline.openvino import compressed, example_inputs, export_openvino, traced  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a stored budget")
needs_native = pytest.mark.skipif(not native.LIVE, reason=native.LOADED[1])
# In `int8-dynamic` a sum in another order can round a hidden value to the next step.
CLOSE = {None: {"rtol": 1e-4, "atol": 1e-5}, "int8": {"rtol": 1e-4, "atol": 1e-5}}
CLOSE |= {"int8-dynamic": {"rtol": 1e-3, "atol": 1e-3}}
LLAMA = Path(__file__).parents[2] / "checkpoints/llama-tinystories-moe"
ACTIVES = (0.25, 0.6, 1.0)  # stored, between two stored ones, everything on


def converted(name: str, stand_in: str = "linear", gate: str = "topk", experts: int = 8) -> torch.nn.Module:
    """A tiny model with random routers and stand-ins for two budgets."""
    dense = tiny(name)
    blocks = discover(dense).blocks
    for block in blocks:
        block.experts = experts
    budgets = [Budget(active, [1 - active] * len(blocks)) for active in (0.25, 0.75)]
    record = D2DMoEConfig(blocks, gate, stand_in, 8, 4, router_width=8, budgets=budgets)
    attach(dense, record, [torch.arange(block.width) for block in blocks], budgets=2)
    randomise_routers(dense)
    for layer in layers(dense):
        for value in layer.stand_ins().values():
            torch.nn.init.normal_(value, std=0.3)
    return dense.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert`, a converted model, and `exported`, the same for OpenVINO."""
    root = tmp_path_factory.mktemp("openvino")
    converted("bert").save_pretrained(root / "bert")
    export_openvino(str(root / "bert"), str(root / "exported"), actives=ACTIVES)
    return root


@pytest.fixture
def python_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on a machine without a compiler."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("D2DMOE_CACHE", str(tmp_path / "cache"))
    extension.extension_library.cache_clear()
    yield
    extension.extension_library.cache_clear()


def layers_in(model: object) -> int:
    return sum(node.get_type_name() == "DynamicFFN" for node in model.get_ops())


# --- the same values -------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("expert_dtype", [None, "int8", "int8-dynamic"])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama"])
def test_outputs_are_those_of_pytorch_at_each_budget(name, expert_dtype, tmp_path):
    model = converted(name)
    model.save_pretrained(tmp_path / "model")
    row = export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=ACTIVES, expert_dtype=expert_dtype)
    assert row["actives"] == list(ACTIVES)
    assert row["layers"] == 2
    run = compile_model(tmp_path / "out", threads=1)
    assert run.operation == "c++"
    set_expert_dtype(model, expert_dtype)
    seen = []
    for batch, length in ((1, 1), (3, 13), (7, 30)):  # none of them was traced; more tokens than the library calls few
        ids = torch.randint(5, 90, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, length - length // 3 :] = 0
        for active in ACTIVES:
            with torch.no_grad(), set_gate(model, active=active):
                wanted = model(input_ids=ids, attention_mask=mask).logits
            found = run(active, input_ids=ids, attention_mask=mask)["logits"]
            kept = mask.bool() if wanted.ndim == 3 else slice(None)
            assert_close(torch.from_numpy(found)[kept], wanted[kept], **CLOSE[expert_dtype])
            seen.append(wanted)
    assert not torch.allclose(seen[-1], seen[-2], atol=1e-3)  # budgets matter here


@needs_native
@pytest.mark.parametrize(("name", "stand_in", "gate"), [
    ("bert", "zero", "max"), ("bert", "constants", "share"), ("gpt2", "refit", "topp"), ("albert", "linear", "topk"),
    ("phi3", "linear", "absolute"), ("opt", "mean", "topk"), ("vit", "linear", "topk"), ("t5-gated", "linear", "topk"),
])  # fmt: skip
def test_kinds_of_models_stand_ins_and_gates(name, stand_in, gate):
    """`traced` compares every budget itself, so what can go wrong is that it raises or misses a layer."""
    model = converted(name, stand_in, gate)
    expected = len(layers(model)) * (2 if name == "albert" else 1)
    result, error = traced(model, ACTIVES)
    assert layers_in(result) == expected
    assert error < 1e-5


def alone(layer: DynamicFFN, states: list, expert_dtype: str | None, d: int) -> object:
    """A compiled model of one layer."""
    from openvino import opset13 as ops

    x, budget = ops.parameter([-1, d], np.float32), ops.parameter([], np.int32)
    node = make_node(x.output(0), budget.output(0), *layer_inputs(layer, states, expert_dtype))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(openvino.Model([node.output(0)], [x, budget]), "CPU", options)


@needs_native
@pytest.mark.parametrize("bounds", [(0, 0, 0), (2, 3, 0), (0, 4, 2)])
@pytest.mark.parametrize("gate", ["max", "share", "topk", "topp", "absolute"])
def test_a_layer_selects_what_its_module_selects(gate, bounds):
    layer = layers(converted("gpt2"))[0]
    states = [replace(layer.gate_state, name=gate, tau=tau, stand_in=0, min_experts=bounds[0], max_experts=bounds[1],
                      shared=bounds[2]) for tau in (0.2, 0.5, 0.8, 0.0)]  # fmt: skip
    run = alone(layer, states, None, 32)
    x = torch.randn(70, 32)
    with torch.no_grad():
        for number, state in enumerate(states):
            layer.gate_state = state
            found = torch.from_numpy(run([x.numpy(), np.array(number, dtype=np.int32)])[0])
            assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
            assert_close(found, layer._readable(x, state), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("tokens", [1, 5, 64, 200])
def test_a_layer_in_parts(tokens, monkeypatch):
    """What several threads compute; more parts than this machine may have threads."""
    monkeypatch.setenv("D2DMOE_PARTS", "3")
    layer = layers(converted("llama"))[0]
    states = [replace(layer.gate_state, name="share", tau=0.4, stand_in=1)]
    x = torch.randn(tokens, 32)
    found = alone(layer, states, None, 32)([x.numpy(), np.array(0, dtype=np.int32)])[0]
    layer.gate_state = states[0]
    with torch.no_grad():
        assert_close(torch.from_numpy(found), layer(x), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("expert_dtype", [None, "int8-dynamic"])
def test_without_a_compiler_python_computes_the_same(expert_dtype, python_only, tmp_path):
    model = converted("gpt2")
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="no-such-compiler was not found"):
        export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=ACTIVES, expert_dtype=expert_dtype)
    run = compile_model(tmp_path / "out", threads=1)
    assert run.operation == "python"
    set_expert_dtype(model, expert_dtype)
    ids = torch.randint(5, 90, (2, 40))
    for active in ACTIVES:
        with torch.no_grad(), set_gate(model, active=active):
            wanted = model(input_ids=ids).logits
        assert_close(torch.from_numpy(run(active, input_ids=ids)["logits"]), wanted, **CLOSE[expert_dtype])


@needs_native
@pytest.mark.parametrize("language", ["c++", "python"])
def test_layers_of_an_earlier_version_are_refused(language, request):
    """Before routers were in int8 their scales were not there, and their weights would be read as something else."""
    from openvino import opset13 as ops

    if language == "python":
        request.getfixturevalue("python_only")
    layer = layers(converted("gpt2"))[0]
    tensors, attributes = layer_inputs(layer, [layer.gate_state], "int8-dynamic")
    attributes["tensors"] = attributes["tensors"].replace("router_scale", "base")
    x, budget = ops.parameter([-1, 32], np.float32), ops.parameter([], np.int32)
    warned = pytest.warns(UserWarning, match="layers go through Python") if language == "python" else nullcontext()
    with warned, pytest.raises((RuntimeError, ValueError), match=r"exported by an earlier d2dmoe.*export it again"):
        make_node(x.output(0), budget.output(0), tensors, attributes)


@needs_native
def test_either_operation_reads_what_the_other_wrote(folders, python_only):
    ids = torch.randint(5, 90, (2, 9))
    with pytest.warns(UserWarning, match="layers go through Python"):
        slow = compile_model(folders / "exported", threads=1)
    extension.extension_library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CXX")
        fast = compile_model(folders / "exported", threads=1)
    assert (slow.operation, fast.operation) == ("python", "c++")
    assert_close(slow(input_ids=ids), fast(input_ids=ids), rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("rest", ["int8", "int8-weights"])
def test_nncf_leaves_the_layers_alone(rest):
    pytest.importorskip("nncf")
    model = converted("bert")
    inputs = example_inputs(model)
    with torch.no_grad(), set_gate(model, active=0.25):
        wanted = model(**inputs).logits
    result, _ = traced(model, ACTIVES)
    feed = {k: v.numpy() for k, v in inputs.items()} | {"budget": np.array(0, dtype=np.int32)}
    small = compressed(result, rest, [feed])
    assert layers_in(small) == 2
    kinds = [node.get_type_name() for node in small.get_ops()]
    assert "FakeQuantize" in kinds or any(node.get_element_type() == openvino.Type.i8 for node in small.get_ops())
    found = openvino.Core().compile_model(small, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0]
    error = np.linalg.norm(found - wanted.numpy()) / wanted.norm()
    assert 1e-7 < error < 0.1


# --- projections around attention ------------------------------------------------------------------------------------


def texts(count: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 17, (count,), generator=generator).tolist()
    return Batches([{"input_ids": torch.randint(5, 90, (n,), generator=generator)} for n in lengths], 5)


def with_projections(name: str, attention: str, **keys: object) -> torch.nn.Module:
    model = tiny(name)
    quick = {"experts": 8, "router_width": 8, "router_tokens": 64, "router_batch": 16, "calibration_tokens": 400}
    convert_model(model, ConvertConfig(**quick, attention=attention, **keys), texts(40))
    return model


@needs_native
@pytest.mark.parametrize(("name", "attention", "head"), [
    ("gpt2", "low-rank", "none"), ("gpt2", "channels", "svd-softmax"), ("llama", "low-rank", "svd-softmax"),
    ("llama", "channels:q,o", "none"), ("bert", "low-rank:k", "none"), ("gpt2", "heads", "none"),
])  # fmt: skip
def test_projections_are_exported_at_one_budget(name, attention, head, tmp_path):
    model = with_projections(name, attention, active=[0.3, 0.6], head=head)
    used = {s.method for s in stored_config(model).projection_states(0)}
    assert attention.partition(":")[0] in used
    model.save_pretrained(tmp_path / "model")
    export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=[0.3])
    compiled, inputs = compile_model(tmp_path / "out"), {"input_ids": torch.randint(5, 90, (3, 11))}
    dense_maps(model)
    with torch.no_grad(), set_gate(model, active=0.3):
        wanted = next(iter(model(**inputs).values()))
    found = torch.from_numpy(next(iter(compiled(**inputs).values())))
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), set_gate(model, active=1):
        assert not torch.allclose(found, next(iter(model(**inputs).values())), atol=1e-4)


@needs_native
@pytest.mark.parametrize("ranks", [(0, 3, 2), (4, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("method", ["low-rank", "channels"])
def test_sections_without_rank(method, ranks):
    """As the layer computes them, also in OpenVINO, whose products have no empty factors."""
    layer = projections(with_projections("gpt2", "low-rank", active=[0.4]))[0]
    layer.gate_state = ProjectionState(method, ranks, threshold=0.5 * (method == "channels"))
    with torch.no_grad():
        x = torch.randn(2, 5, layer.projection.inputs)
        graph = openvino.convert_model(plain_projection(layer), example_input=x)
        found = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
        assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_heads_of_less_width(name):
    for layer in projections(with_projections(name, "auto", active=[0.4])):
        kept = layer.projection.head_widths
        if not layer.projection.head_rank:
            continue
        for share in (0, layer.projection.head_rank):
            layer.gate_state = ProjectionState("heads", tuple(min(share, w) for w in kept))
            with torch.no_grad():
                x = torch.randn(2, 5, layer.projection.inputs)
                graph = openvino.convert_model(plain_projection(layer), example_input=x)
                found = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
                assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-5)


@needs_native
def test_a_decoder_with_projections_generates(tmp_path):
    model = with_projections("gpt2", "low-rank", active=[0.4])
    model.save_pretrained(tmp_path / "model")
    export_openvino(str(tmp_path / "model"), str(tmp_path / "out"))
    ids = torch.randint(5, 90, (1, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with set_gate(model, active=0.4):
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    found = compile_model(tmp_path / "out").generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert found.tolist() == wanted.tolist()


@needs_native
def test_budgets_at_which_projections_differ_are_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    model = with_projections("gpt2", "low-rank", active=[0.3, 0.6])
    assert stored_config(model).budgets[0].projection_states != stored_config(model).budgets[1].projection_states
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("d2dmoe.hub.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"budgets 0.3 and 0.6.*--active 0.3"):
        export_openvino(str(tmp_path / "model"), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"budgets 0.6 and 1"):
        export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=[0.6, 1.0])


@needs_native
def test_projections_can_be_exported_dense_at_several_budgets(tmp_path):
    model = with_projections("gpt2", "low-rank", active=[0.3, 0.6], head="svd-softmax")
    model.save_pretrained(tmp_path / "model")
    export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), dense_projections=True)
    compiled, inputs = compile_model(tmp_path / "out"), {"input_ids": torch.randint(5, 90, (3, 11))}
    dense = copy.deepcopy(model)
    dense_maps(dense, projections_too=True)
    assert not projections(dense)
    for active in (0.3, 0.6):
        with torch.no_grad(), set_gate(dense, active=active), set_gate(model, active=active):
            wanted, converted_too = dense(**inputs).logits, model(**inputs).logits
        found = torch.from_numpy(compiled(active=active, **inputs)["logits"])
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, converted_too, atol=1e-4)


@needs_native
def test_projections_that_are_alike_at_all_budgets_leave_these_open(tmp_path):
    alike = {"active": [0.3, 0.6], "attention_active": 0.5}
    model = with_projections("bert", "low-rank", **alike, compensate=False)
    model.save_pretrained(tmp_path / "model")
    export_openvino(str(tmp_path / "model"), str(tmp_path / "out"))
    compiled, inputs = compile_model(tmp_path / "out"), {"input_ids": torch.randint(5, 90, (3, 11))}
    for active in (0.3, 0.6):
        with torch.no_grad(), set_gate(model, active=active):
            wanted = next(iter(model(**inputs).values()))
        found = torch.from_numpy(next(iter(compiled(active=active, **inputs).values())))
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    record = stored_config(model)
    for budget in record.budgets:
        budget.projection_states = [ProjectionState("low-rank", (1,))] * len(record.projections)
    check_budgets(record, alike["active"])
    for projection in record.projections:
        projection.refits = 2 * (projection.role == "o")  # every budget has its own then
    with pytest.raises(UserError, match="does not do the same at the budgets"):
        check_budgets(record, alike["active"])


# --- other programs --------------------------------------------------------------------------------------------------


@needs_native
def test_a_folder_of_one_budget_has_the_inputs_that_others_know(tmp_path):
    converted("llama").save_pretrained(tmp_path / "model")
    export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=[0.25])
    run = compile_model(tmp_path / "out")
    assert run.actives == (0.25,)
    assert {port.any_name for port in run.compiled.inputs} == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "beam_idx",
    }
    with pytest.raises(UserError, match=r"holds 0\.25"):
        run(input_ids=np.ones((1, 3), dtype=np.int64), active=0.5)


@needs_native
@pytest.mark.parametrize("attention", ["SDPA", "PA"])
def test_openvino_genai_generates_the_same_text(attention, tmp_path):
    genai, tokenizers = pytest.importorskip("openvino_genai"), pytest.importorskip("openvino_tokenizers")
    export_openvino(str(LLAMA), str(tmp_path / "out"), actives=[0.25])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pair = tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), pair, strict=True):
        openvino.save_model(part, tmp_path / "out" / f"openvino_{name}.xml")
    options = {"ATTENTION_BACKEND": attention, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    library = [str(extension.extension_library())]
    pipe = genai.LLMPipeline(str(tmp_path / "out"), "CPU", extensions=library, **options)
    text, limits = "Once upon a time", {"max_new_tokens": 24, "do_sample": False}
    found = str(pipe.generate(text, apply_chat_template=False, **limits))
    tokens = compile_model(tmp_path / "out").generate(**tokenizer([text], return_tensors="pt"), **limits)
    assert len(found) > 40
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text + found


# --- generation ------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "phi3"])
def test_generated_tokens_are_those_of_pytorch(name, tmp_path):
    """Alone, padded on the left, by beams and sampled, at each budget, one after the other on one state."""
    model = converted(name)
    model.save_pretrained(tmp_path / "model")
    row = export_openvino(str(tmp_path / "model"), str(tmp_path / "out"), actives=ACTIVES)
    assert row["cached"]
    run = compile_model(tmp_path / "out", threads=1)
    seen = set()
    for batch, length, options in ((1, 9, {}), (3, 5, {}), (2, 1, {"use_cache": False}), (2, 6, {"num_beams": 3}),
                                   (2, 4, {"do_sample": True, "num_return_sequences": 2})):  # fmt: skip
        ids = torch.randint(5, 90, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **options}
        for active in ACTIVES:
            torch.manual_seed(1)
            with set_gate(model, active=active):
                wanted = model.generate(**given)
            torch.manual_seed(1)
            assert run.generate(**given, active=active).tolist() == wanted.tolist()
            seen.add((batch, length, tuple(wanted.flatten().tolist())))
    assert len(seen) > 5  # budgets matter here
    assert run.active == ACTIVES[0]


@needs_native
def test_calls_forget_what_was_generated(tmp_path):
    model = converted("gpt2")
    model.save_pretrained(tmp_path / "model")
    for name, cache in (("with", True), ("without", False)):
        export_openvino(str(tmp_path / "model"), str(tmp_path / name), actives=ACTIVES, cache=cache)
    cached, plain = (compile_model(tmp_path / name, threads=1) for name in ("with", "without"))
    assert not hasattr(plain, "generate")
    ids = torch.arange(10, 22).reshape(2, 6)
    wanted = plain(0.25, input_ids=ids)["logits"]
    for _ in range(2):
        assert_close(cached(0.25, input_ids=ids)["logits"], wanted, rtol=1e-4, atol=1e-5)
        first = cached.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False)
        assert torch.equal(cached.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False), first)
    with pytest.raises(UserError, match=r"active=0\.4"):
        cached.generate(ids, max_new_tokens=4, active=0.4)


@needs_native
def test_models_without_such_a_cache(tmp_path):
    """Encoders, and decoders that remember a window only."""
    converted("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"--cache: a Bert.* is no decoder of text alone; leave it out"):
        export_openvino(str(tmp_path / "bert"), str(tmp_path / "out"), cache=True)
    model = converted("mistral")
    model.config.sliding_window = 4
    model.save_pretrained(tmp_path / "window")
    row = export_openvino(str(tmp_path / "window"), str(tmp_path / "out"))
    assert not row["cached"]
    with pytest.raises(UserError, match="is not keys and values of all tokens"):
        export_openvino(str(tmp_path / "window"), str(tmp_path / "other"), cache=True)
    assert names(tmp_path) == {"bert", "window", "out"}


@needs_native
@pytest.mark.parametrize("rest", ["int8", "int8-weights"])
def test_nncf_leaves_the_state_alone(rest, tmp_path):
    pytest.importorskip("nncf")
    model = converted("llama")
    result, _ = traced(model, ACTIVES, cached=True)
    given = [{"input_ids": np.arange(5 + n, 13 + n)[None], "attention_mask": np.ones((1, 8), dtype=np.int64)}
             for n in range(4)]  # fmt: skip
    budget = {"budget": np.array(0, dtype=np.int32)}
    ports = [port.any_name for port in result.inputs]
    whole = openvino.Core().compile_model(result, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    small = compressed(result, rest, [complete({**feed, **budget}, ports) for feed in given])
    assert layers_in(small) == 2
    request = openvino.Core().compile_model(small, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    assert request.query_state()
    feed = complete({**given[0], **budget}, ports)
    wanted, found = whole.infer(feed)[0], request.infer(feed)[0]
    assert 1e-7 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.3


# --- a folder --------------------------------------------------------------------------------------------------------


@needs_native
def test_the_command_writes_a_folder(home, d2dmoe, tmp_path):
    result = d2dmoe("export", "--openvino", home / "first", tmp_path / "out", "--active", "0.5,1", "--json",
                    tmp_path / "row.json")  # fmt: skip
    assert "layers at budgets 0.5, 1" in result.out
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json"} <= names(tmp_path / "out")
    assert names(tmp_path) == {"out", "row.json"}
    assert not [name for name in names(tmp_path / "out") if name.endswith((".safetensors", ".partial"))]
    run = compile_model(tmp_path / "out", active=0.5)
    assert run.actives == (0.5, 1.0)
    ids = np.arange(6)[None]
    assert np.abs(run(input_ids=ids)["logits"] - run(1, input_ids=ids)["logits"]).max() > 0
    assert np.array_equal(run(input_ids=ids)["logits"], run(0.5, input_ids=ids)["logits"])


@needs_native
def test_the_rest_in_int8_is_measured_on_data(home, d2dmoe, tmp_path):
    pytest.importorskip("nncf")
    words = ("--rest", "int8", "--data", home / "text.txt", "--max-length", "16", "--batches", "3")
    result = d2dmoe("export", "--openvino", home / "first", tmp_path / "out", "--expert-dtype", "int8", *words)
    assert len(result.out.strip().splitlines()) == 1
    d2dmoe("export", "--openvino", home / "first", tmp_path / "whole", "--expert-dtype", "int8")
    whole, small = compile_model(tmp_path / "whole"), compile_model(tmp_path / "out")
    ids = np.arange(20, 32)[None]
    for active in whole.actives:
        wanted, found = whole(active, input_ids=ids)["logits"], small(active, input_ids=ids)["logits"]
        assert 1e-6 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.3


@needs_native
def test_wrong_calls_of_an_exported_model(folders):
    run = compile_model(folders / "exported", threads=1)
    assert run.active == 0.25
    ids = np.arange(6)[None]
    with pytest.raises(UserError, match=r"active=0\.4: this export holds 0\.25, 0\.6, 1"):
        run(0.4, input_ids=ids)
    with pytest.raises(UserError, match="this model takes attention_mask, input_ids, token_type_ids"):
        run(input_ids=ids, pixels=ids)
    with pytest.raises(UserError, match=r"active=0\.4"):
        compile_model(folders / "exported", active=0.4)
    with pytest.raises(UserError, match="threads=0"):
        compile_model(folders / "exported", threads=0)
    with pytest.raises(UserError, match=r"has no openvino_model\.xml"):
        compile_model(folders / "bert")
    for wrong in (3, -1):
        feed = {**dict.fromkeys(run.names, ids), "budget": np.array(wrong, dtype=np.int32)}
        assert np.isnan(run.compiled(feed)[0]).all()  # with one thread OpenVINO does not pass the error on
        with suppress(RuntimeError):  # with several it may
            assert np.isnan(compile_model(folders / "exported", threads=2).compiled(feed)[0]).all()
    assert np.isfinite(run(input_ids=ids)["logits"]).all()


@needs_native
def test_a_damaged_folder(folders, tmp_path):
    shutil.copytree(folders / "exported", tmp_path / "cut")
    text = (tmp_path / "cut" / "openvino_model.xml").read_text()
    (tmp_path / "cut" / "openvino_model.xml").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is no model that d2dmoe has exported, or it is damaged"):
        compile_model(tmp_path / "cut")
    shutil.copytree(folders / "exported", tmp_path / "foreign")
    (tmp_path / "foreign" / "openvino_model.xml").write_text(
        text.replace("<d2dmoe>", "<a>").replace("</d2dmoe>", "</a>")
    )
    with pytest.raises(UserError, match="is no model that d2dmoe has exported"):
        compile_model(tmp_path / "foreign")


# --- refusals of the command -----------------------------------------------------------------------------------------


def test_without_the_native_library(home, d2dmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIVE", False)
    monkeypatch.setattr(native, "LOADED", (None, "not built"))
    result = d2dmoe("export", "--openvino", home / "first", tmp_path / "out", code=1)
    assert "the native library computes the experts in OpenVINO, and it is not built" in result.err


@needs_native
@pytest.mark.parametrize(("words", "message"), [
    (("--openvino", "nowhere", "out"), "no such folder"),
    (("--openvino", "{home}/dense", "out"), "is no converted checkpoint"),
    (("--openvino", "{home}/first", "{home}"), "not an empty folder"),
    (("--openvino", "{home}/first", "out", "--active", "1.5"), "1.5"),
    (("--openvino", "{home}/first", "out", "--batches", "0"), "--batches 0: must be 1 or more"),
    (("--openvino", "{home}/first", "out", "--rest", "int8", "--data", "nowhere.txt"), "nowhere.txt"),
    (("--dense", "{home}/first", "out", "--active", "0.5"), "--active belongs to --openvino"),
    (("--dense", "{home}/first", "out", "--data", "a.txt"), "--data belongs to --openvino"),
    (("--dense", "{home}/first", "out", "--no-cache"), "--cache belongs to --openvino"),
])  # fmt: skip
def test_refusals(words, message, home, d2dmoe, tmp_path, monkeypatch):
    if "--rest" in words:
        pytest.importorskip("nncf")
    monkeypatch.chdir(tmp_path)
    result = d2dmoe("export", *(word.format(home=home) for word in words), code=1)
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@needs_native
def test_kinds_that_the_library_does_not_have(tmp_path):
    model = converted("bert")
    layers(model)[1].activation = None
    with pytest.raises(UserError, match="does not have its activation, gelu"):
        traced(model, ACTIVES)


@needs_native
def test_models_that_openvino_does_not_have():
    with pytest.raises(UserError, match=r"^OpenVINO cannot take over a Qwen2MoeForCausalLM: .*No conversion rule"):
        traced(converted("qwen2_moe"), ACTIVES)


@needs_native
def test_what_differs_from_pytorch_is_not_written(folders, tmp_path, monkeypatch):
    real = layer_inputs

    def wrong(*arguments):
        tensors, attributes = real(*arguments)
        tensors[: len(tensors) // 2].view(np.float32)[:] *= -1
        return tensors, attributes

    monkeypatch.setattr("d2dmoe.openvino.graph.layer_inputs", wrong)
    with pytest.raises(UserError, match=r"in OpenVINO the model differs by .* so it is not exported"):
        export_openvino(str(folders / "bert"), str(tmp_path / "out"), actives=ACTIVES)
    assert not list(tmp_path.iterdir())
