"""Budgets of callers: threads, tasks and rows of a batch each get their own, and nobody else's."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import random
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from test_memory import small
from torch.testing import assert_close

from d2dmoe import UserError, dispatching, set_gate, use_gate
from d2dmoe.kernels import automatic
from d2dmoe.moe.layer import layers

BUDGETS = (0.25, 0.5, 0.75, 1, 0.375, 0.625, 0.875, 0.125)
FORMS = [set_gate, use_gate]


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def alone(model: torch.nn.Module, ids: torch.Tensor, active: float) -> torch.Tensor:
    model = copy.deepcopy(model)
    set_gate(model, active=active)
    return logits(model, ids)


@pytest.mark.filterwarnings("ignore:active=:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_overlapping_threads_get_their_own_budgets(form):
    model, ids = small(), torch.arange(5, 17)[None]
    set_gate(model, active=0.5)
    expected = {active: alone(model, ids, active) for active in (0.25, 0.5, 0.75)}
    inside, outside = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def work(active: float) -> list[torch.Tensor]:
        with form(model, active=active):
            inside.wait()
            found = [logits(model, ids) for _ in range(20)]
            outside.wait()
        return [*found, logits(model, ids)]

    with ThreadPoolExecutor(2) as pool:
        for active, found in zip((0.25, 0.75), pool.map(work, (0.25, 0.75)), strict=True):
            assert all(torch.equal(y, expected[active]) for y in found[:-1])
            assert torch.equal(found[-1], expected[0.5])
    assert torch.equal(logits(model, ids), expected[0.5])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_contexts_that_are_constructed_crosswise_leave_the_model_as_it_was(order):
    model = small()
    set_gate(model, active=0.5)
    before = [layer.gate_state for layer in layers(model)]
    first, second = set_gate(model, active=0.25), set_gate(model, active=0.75)
    pair = [first, second]
    for n in order:
        pair[n].__enter__()
    assert layers(model)[0].gate_state.tau == [0.75, 0.25][order[1]]
    for n in reversed(order):
        pair[n].__exit__(None, None, None)
    assert [layer.gate_state for layer in layers(model)] == before


def test_statements_and_blocks_nest():
    model = small()
    tau = lambda: layers(model)[0].gate_state.tau  # noqa: E731
    set_gate(model, active=0.5)
    with set_gate(model, active=0.25):
        assert tau() == 0.75
        set_gate(model, active=0.75)  # inside a block: for the rest of it
        assert tau() == 0.25
        with use_gate(model, active=1), set_gate(model, active=0.25):
            assert tau() == 0.75
        assert tau() == 0.25
        assert copy.deepcopy(model).transformer.h[0].mlp.gate_state.tau == 0.5
    assert tau() == 0.5
    for active in (0.25, 0.75, 0.25):
        set_gate(model, active=active)
    assert len(layers(model)[0].gate._pile) <= 2
    held = set_gate(model, active=0.5)
    set_gate(model, active=0.25)
    assert tau() == 0.75
    del held
    assert tau() == 0.75
    assert pickle.loads(pickle.dumps(layers(model)[0].gate)).own.tau == 0.75


def test_tasks_get_their_own_budgets():
    model, ids = small(), torch.arange(5, 17)[None]
    expected = {active: alone(model, ids, active) for active in (0.25, 0.75)}

    async def work(active: float) -> bool:
        with use_gate(model, active=active), dispatching("auto" if active < 0.5 else "sparse"):
            same = []
            for _ in range(5):
                await asyncio.sleep(0)
                same.append(torch.equal(logits(model, ids), expected[active]) and automatic() == (active < 0.5))
        return all(same)

    async def both() -> list[bool]:
        return await asyncio.gather(work(0.25), work(0.75))

    assert asyncio.run(both()) == [True, True]


ROWS = [0.25, 0.75, 1, 0.5]


def test_each_row_of_a_batch_by_its_own_budget():
    model, ids = small(), torch.randint(5, 60, (4, 9))
    with use_gate(model, active=ROWS):
        y = logits(model, ids)
    for row, active in enumerate(ROWS):
        assert_close(y[row], alone(model, ids[row : row + 1], active)[0], rtol=1e-4, atol=1e-4)
    with use_gate(model, budget=[2, 0, 0, 1]):
        y = logits(model, ids)
    assert_close(y[0], alone(model, ids[:1], 0.75)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_generation_of_rows_with_different_budgets_equals_the_rows_alone(options):
    model = small()
    ids = torch.randint(5, 60, (4, 6))
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad(), use_gate(model, active=ROWS):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **common)
    for row, active in enumerate(ROWS):
        with torch.no_grad(), use_gate(model, active=active):
            one = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 6, dtype=torch.long), **common)
        assert together[row].tolist() == one[0].tolist()


def test_wrong_rows_are_refused():
    model = small()
    with use_gate(model, active=[0.25, 0.5]), pytest.raises(UserError, match=r"2 budgets .* batch .* 3"):
        logits(model, torch.randint(5, 60, (3, 4)))
    with pytest.raises(UserError, match="one value for each row"), use_gate(model, active=[]):
        pass
    with pytest.raises(UserError, match="one of active"), use_gate(model):
        pass


@pytest.mark.filterwarnings("ignore:active=:UserWarning")
def test_eight_threads_eight_budgets_two_thousand_requests():
    model = small()
    generator = random.Random(0)
    prompts = [torch.randint(5, 60, (1, generator.choice((1, 3, 8, 17)))) for _ in range(12)]
    expected = {(n, active): alone(model, ids, active) for n, ids in enumerate(prompts) for active in BUDGETS}
    requests = [(generator.randrange(len(prompts)), generator.choice(BUDGETS)) for _ in range(2000)]
    held: list[tuple[int, int, int]] = []

    def serve(part: list[tuple[int, float]]) -> int:
        wrong = 0
        for n, active in part:
            with use_gate(model, active=active):
                wrong += not torch.allclose(logits(model, prompts[n]), expected[n, active], rtol=1e-4, atol=1e-4)
        return wrong

    process = psutil.Process()
    tracemalloc.start()
    for part in (requests[:400], requests[400:1200], requests[1200:]):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(serve, [part[i::8] for i in range(8)])) == 0
        gc.collect()
        entries = [entry for layer in layers(model) for entry in layer.prepared.entries.values()]
        folded = sum(entry.tensors["down_weight"].nbytes for entry in entries)
        held.append((folded, tracemalloc.get_traced_memory()[0], process.memory_info().rss))
    tracemalloc.stop()
    (first, _, _), (second, python, resident), (third, later, last) = held
    assert first == second == third
    assert last <= 1.02 * resident
    assert later <= python + 80 * 1024  # a hundred bytes for each of the last 800 requests would show
