"""One of several processes that run trainings one after another, as importing the libraries takes longer than those.

The argument is JSON: `jobs`, each `{"argv", "stop"}`, where `stop` names a training state after which it is
interrupted; and `sharded`, for FSDP. accelerate shards models on GPUs only, so these processes call theirs one; the
sharding itself, its collectives and its training states are the real ones, over gloo.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed import fsdp

SHARDED: list[torch.nn.Module] = []


def call_this_a_gpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")
    shard = fsdp.fully_shard

    def counted(module: torch.nn.Module, **options: object) -> torch.nn.Module:
        SHARDED.append(module)
        return shard(module, **options)

    fsdp.fully_shard = counted


def run(argv: list[str], stop: str | None) -> int:
    from d2dmoe.cli import main
    from d2dmoe.sparsify.states import Marks

    saved = Marks.on_save

    def on_save(self, args, state, control, **more):
        saved(self, args, state, control, **more)
        torch.distributed.barrier()
        if f"checkpoint-{state.global_step}" == stop:
            raise KeyboardInterrupt

    Marks.on_save = on_save
    try:
        return main(argv)
    finally:
        Marks.on_save = saved


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    if plan["sharded"]:
        call_this_a_gpu()
    for job in plan["jobs"]:
        SHARDED.clear()
        code = run(job["argv"], job["stop"])
        assert code == (130 if job["stop"] else 0), (code, job)
        assert not plan["sharded"] or len(SHARDED) > 2, SHARDED
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort a process that ends in order, and taking them down has hung
