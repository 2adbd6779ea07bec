"""The pipeline: stages in order, what each leaves behind, resume, and the final folder. Nothing numeric."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from . import hub
from .calibrate import calibrate, settle
from .config import Budget, ConvertConfig, D2DMoEConfig, UserError, ranks, shared_experts, targets
from .data import Batches, make_batches, read_documents
from .discovery import dummy_inputs
from .distill import heal
from .evaluate import evaluate
from .experts import Neurons, layers
from .gating import set_gate, stored_config
from .loader import attach, cast
from .observe import release_memory
from .plan import Plan, fit_to_data, make_plan
from .profiles import activation_profiles
from .progress import progress
from .report import machine, model_card, portable
from .router_fit import fit_routers
from .router_training import train_routers
from .split import split_neurons
from .training import has_state, pick_device

Say = Callable[[str], None]
LEAST_UNSEEN = 4096  # tokens to measure a loss on
# Keys that may change between an interrupted run and the one that resumes it.
FREE_ON_RESUME = {"output_dir", "eval_tokens", "max_shard_size", "device"}
VERIFY_TOLERANCE, MODEL_TOLERANCE = 1e-4, 1e-3  # of a block; of the whole model, where rounding adds up
RECIPE, REPLACED = "recipe.json", "replaced"  # in the working folder: its mark, and the output folder before this one


def convert(
    config: ConvertConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Convert a model by name and write the checkpoint folder.

    Args:
        config: What to convert and how.
        resume: Go on from what an interrupted run left beside the output folder.
        overwrite: Replace a non-empty output folder, once the new one is complete.
        say: Receives progress messages.
        command: What the user typed, for the record.

    Returns:
        The contents of `results.json`.

    Raises:
        UserError: For anything the user can mend, before any long work starts.
    """
    device = pick_device(config.device)
    named = config.output_dir or default_output(config.model)
    output = Path(os.path.abspath(named))
    work = output.with_name(output.name + ".partial")
    model_config = hub.read_config(config.model, config.revision)
    plan = make_plan(model_config, config)
    processor = hub.load_processor(config.model, model_config, config.revision)
    calibration, held_out = batches_for(config, model_config, plan, processor)
    asleep = fit_to_data(plan, calibration[0], config.data)
    hub.check_safetensors(config.model)
    prepare_folders(output, work, plan, keep=(config.model, config.data), resume=resume, overwrite=overwrite)
    recipe = {**asdict(config), "output_dir": named}
    started = time.time()
    with _folder_errors(output, work):
        files = {"model": hub.fingerprint(config.model, model_config), "data": _files(config.data)}
        _check_recipe(work, recipe, files, resume)
        model = hub.load_model(config.model, model_config, config.revision).to(device)
        if asleep:
            say(f"left dense, because they do not run on this data: {', '.join(block.name for block in asleep)}")
        say(f"{len(plan.blocks)} blocks of {plan.blocks[0].experts} experts in {plan.model_class.__name__}")
        if padded := plan.summary()["padded_neurons"]:
            say(f"padded with {padded} zero neurons in memory, because the experts do not divide the width")
        log = convert_model(
            model, config, calibration, blocks=plan.blocks, work=work, resume=resume, say=say,
            dense=lambda: hub.load_model(config.model, model_config, config.revision).to(device),
        )  # fmt: skip
        cast(model, _output_dtype(config, model_config))  # the figures are those of the checkpoint
        rows = []
        if held_out is not None:
            settings = [{"active": a} for a in sorted({*(b.active for b in stored_config(model).budgets), 1.0})]
            rows = evaluate(model, held_out, settings, tokenizer=processor)
        results = {
            "d2dmoe": _version(), "machine": machine(),
            "command": [portable(word) for word in command or ["d2dmoe", "convert", "--model", config.model]],
            "seed": config.seed, "plan": plan.summary(), "minutes": round((time.time() - started) / 60, 2),
            "calibration_tokens": calibration.first(config.calibration_tokens).tokens, "router_log": log, "rows": rows,
        }  # fmt: skip
        _write(output, work, model, processor, recipe, results, config)
    say(f"saved {named}")
    return results


def convert_model(
    model: PreTrainedModel,
    config: ConvertConfig,
    batches: Batches,
    *,
    blocks: list | None = None,
    work: Path | None = None,
    resume: bool = False,
    say: Say = lambda _: None,
    dense: Callable[[], PreTrainedModel] | None = None,
) -> list[dict[str, float]]:
    """Convert a loaded model in place: split, verify, train routers, calibrate.

    Args:
        model: Dense model in fp32 (fits are made from what it computes); it may be cast afterwards. Everything
            runs where its weights are.
        config: Method and sizes; data and output keys are not used.
        batches: Calibration batches.
        blocks: From a plan; discovered on the model itself when `None`.
        work: Folder for what stages leave behind; `None` keeps nothing.
        resume: Use what is there.
        say: Receives progress messages.
        dense: Gives the dense model again, for `speedup` targets; by default a copy is kept for them.

    Returns:
        The router training log.

    Raises:
        UserError: If the model is in half precision, has no block to convert, or cannot be reproduced as experts.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}, and routers and stand-ins are fitted in "
            f"float32; load it with dtype=torch.float32 (cast it after the conversion)"
        )
    model.eval()
    if blocks is None:
        from .config import choose_experts
        from .discovery import discover

        blocks = discover(model).blocks
        if not blocks:
            raise UserError("no feed-forward block found in this model")
        for block in blocks:
            block.experts = choose_experts(block, config.experts, config.expert_size)
    stored = D2DMoEConfig(
        blocks=blocks, gate=config.gate, stand_in=config.stand_in, router_width=config.router_width,
        router_target=config.router_target,
        min_experts=config.min_experts, max_experts=config.max_experts,
        shared_experts=shared_experts(config, blocks), **ranks(config, blocks),
    )  # fmt: skip
    release_memory()
    orders = _stage(work, "split", resume, lambda: _split(model, config, blocks, batches, say))
    twin = copy.deepcopy(model) if config.speedup and dense is None else None
    reference, output = _block_outputs(model, blocks), _outputs(model)
    attach(model, stored, [orders[block.name] for block in blocks], budgets=len(targets(config)))
    _zero_constants(model)
    _let_go_of_files(model)
    _verify(model, reference, output)
    log = _routers(model, config, batches, work, resume)
    say("routers done; calibrating")
    _fitted(
        work,
        "stand-ins",
        resume,
        model,
        stored,
        lambda: _calibrate(model, config, stored, batches, dense or (lambda: twin)),
    )
    if config.heal and stored.budgets:
        say(f"healing: {config.heal} steps of distillation from the dense model")
        _fitted(
            work, "healed", resume, model, stored, lambda: _heal(model, config, stored, batches, work, resume),
            everything=config.heal_parameters == "all",
        )  # fmt: skip
    set_gate(model, active=stored.default_active)
    return log


def _split(
    model: PreTrainedModel, config: ConvertConfig, blocks: list, batches: Batches, say: Say
) -> dict[str, torch.Tensor]:
    orders, profiles, shared = {}, None, shared_experts(config, blocks)
    if config.split.startswith("coactivation") or shared:
        tokens = batches.first(config.calibration_tokens)
        profiles = activation_profiles(model, blocks, tokens, signed=config.split.endswith("signed"), seed=config.seed)
    for number, block in enumerate(progress(blocks, desc="split")):
        started = time.time()
        rows = profiles[block.name].rows if profiles else Neurons(model, block).rows()
        always = profiles[block.name].largest(shared * block.size) if profiles and shared else None
        orders[block.name] = split_neurons(
            config.split, rows, block.experts, config.seed * 1000 + number, shared=always
        )
        say(f"split {block.name}: {block.experts} experts in {time.time() - started:.2f} s")
    return orders


def _routers(
    model: PreTrainedModel, config: ConvertConfig, batches: Batches, work: Path | None, resume: bool
) -> list[dict[str, float]]:
    """Fit and train the routers, or take them from an earlier run; returns the training log."""
    log: list[dict[str, float]] = []
    state_dir = work / "router-state" if work is not None else None

    def train() -> dict[str, torch.Tensor]:
        if config.router_fit != "trained" and not (resume and has_state(state_dir)):
            fit_routers(model, batches.first(config.calibration_tokens), config)
        if config.router_fit != "closed-form":
            log.extend(train_routers(model, batches, config, state_dir=state_dir, resume=resume))
        if work is not None:
            _write_text(work / "router-log.json", json.dumps(log))
        return {f"{i}.{k}": v for i, layer in enumerate(layers(model)) for k, v in layer.router.state_dict().items()}

    routers = _stage(work, "routers", resume, train)
    for i, layer in enumerate(layers(model)):
        layer.router.load_state_dict({k: routers[f"{i}.{k}"] for k in ("hidden", "score")})
    return log or (json.loads((work / "router-log.json").read_text()) if work is not None else [])


@torch.no_grad()
def _block_outputs(model: PreTrainedModel, blocks: list) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every block in one small forward pass of the dense model."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for block in blocks:
        up, down = model.get_submodule(block.up), model.get_submodule(block.down)
        handles.append(
            up.register_forward_hook(lambda m, a, o, n=block.name: inputs.__setitem__(n, a[0].detach().clone()))
        )
        handles.append(
            down.register_forward_hook(
                lambda m, a, o, n=block.name: seen.__setitem__(n, (inputs[n], o.detach().clone()))
            )
        )
    try:
        model(**dummy_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model makes of one small input, every floating-point tensor of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**dummy_inputs(model))
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def _relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm().clamp_min(1e-12))


@torch.no_grad()
def _verify(
    model: PreTrainedModel, reference: dict[str, tuple[torch.Tensor, torch.Tensor]], output: dict[str, torch.Tensor]
) -> None:
    """Compare every block, executed again with all experts on, and the model as a whole with the dense ones.

    Raises:
        UserError: Naming the block or output and its relative error.
    """
    for layer in layers(model):
        x, dense = reference[layer.block.name]
        error = _relative_error(layer(x), dense)
        if not error <= VERIFY_TOLERANCE:
            raise UserError(
                f"{layer.block.name}: as experts it differs from the dense block by {error:.2g} relative "
                f"(allowed {VERIFY_TOLERANCE:g}), so this model is not converted"
            )
    for name, value in _outputs(model).items():
        error = _relative_error(value, output[name])
        if not error <= MODEL_TOLERANCE:
            raise UserError(
                f"with all experts on, the model's {name} differ from the dense ones by {error:.2g} relative "
                f"(allowed {MODEL_TOLERANCE:g}), so this model is not converted"
            )


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what still lies in the mapped weight files: the dense blocks in them are no longer needed in memory."""
    packed = {id(p) for layer in layers(model) for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.clone()


def _zero_constants(model: PreTrainedModel) -> None:
    for layer in layers(model):
        for value in layer.stand_ins().values():
            value.data.zero_()


def _calibrate(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches,
    dense: Callable[[], PreTrainedModel] | None,
) -> None:  # fmt: skip
    fitting, unseen = batches.first(config.calibration_tokens), batches.after(config.calibration_tokens)
    if config.max_loss and unseen.tokens < LEAST_UNSEEN:  # too little text for both: a fifth is kept from the fits
        fitting = batches.first(batches.tokens * 4 // 5)
        unseen = batches.after(batches.tokens * 4 // 5)
    calibrate(
        model, fitting, stored, targets(config),
        thresholds=config.thresholds, allocation=config.allocation, unseen=unseen, dense=dense,
    )  # fmt: skip


def _heal(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches,
    work: Path | None, resume: bool,
) -> None:  # fmt: skip
    state_dir = work / "heal-state" if work is not None else None
    heal(model, batches, config, stored, state_dir=state_dir, resume=resume)
    settle(model, batches.first(config.calibration_tokens), stored)


def _fitted(
    work: Path | None, name: str, resume: bool, model: PreTrainedModel, stored: D2DMoEConfig, fit: Callable[[], None],
    *, everything: bool = False,
) -> None:  # fmt: skip
    """Run a stage that changes fitted parameters (or all) and the budgets, or take both from an earlier run."""
    record = work / f"{name}.json" if work is not None else None

    def compute() -> dict[str, torch.Tensor]:
        fit()
        if record is not None:
            kept = {k: v for k, v in stored.to_dict().items() if k in ("budgets", "curve", "default_active")}
            _write_text(record, json.dumps(kept))
        return {key: parameters[key].data for key in changed}

    parameters = dict(model.named_parameters())
    fitted = {id(p) for x in layers(model) for p in (*x.stand_ins().values(), *x.router.parameters())}
    changed = [key for key, value in parameters.items() if everything or id(value) in fitted]
    tensors = _stage(work, name, resume, compute)
    if record is not None:
        kept = json.loads(record.read_text())
        stored.budgets = [Budget(**b) for b in kept["budgets"]]
        stored.curve, stored.default_active = kept["curve"], kept["default_active"]
    for key in changed:
        parameters[key].data.copy_(tensors[key])


def _stage(
    work: Path | None, name: str, resume: bool, compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Compute tensors, or take them from an earlier run that got past this stage."""
    if work is None:
        return compute()
    file = work / f"{name}.safetensors"
    if resume and file.exists():
        return load_file(file)
    tensors = {k: v.detach().cpu().contiguous() for k, v in compute().items()}
    release_memory()
    scratch = file.with_suffix(".tmp")
    save_file(tensors, scratch)
    os.replace(scratch, file)
    return tensors


def default_output(model: str) -> str:
    """`checkpoints/<model>-d2dmoe`, the last part of a path or id."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return f"checkpoints/{path.name}-d2dmoe"


def batches_for(config: ConvertConfig, model_config: Any, plan: Plan, processor: Any) -> tuple[Batches, Batches | None]:
    """Calibration batches, shuffled, and held-out batches (`None` when `eval_tokens` is 0)."""
    data = hub.fit_length(config, model_config)
    causal = hub.is_causal(plan.model_class)
    label2id = model_config.label2id if hub.is_classifier(plan.model_class, model_config) else None

    def make(part: str) -> Batches:
        documents = read_documents(config.data, part, config.text_column, config.label_column)
        return make_batches(documents, processor, data, packed=causal, label2id=label2id)

    calibration = make("calibration").shuffled(config.seed)
    if not config.eval_tokens:
        return calibration, None
    try:
        return calibration, make("held_out").first(config.eval_tokens)
    except UserError as error:
        raise UserError(f"{error} (this is the part held out for the figures; --eval-tokens 0 skips them)") from None


def prepare_folders(
    output: Path, work: Path, plan: Plan, *, keep: tuple[str, ...] = (), resume: bool = False, overwrite: bool = False
) -> None:
    """Check the output folder and make the working folder.

    Args:
        output: Where the checkpoint will be, absolute.
        work: Where stages leave what an interrupted run can go on from.
        plan: Says how much room is needed.
        keep: Paths (or ids) that must not lie in the output folder, because it is replaced as a whole.
        resume: The working folder of an interrupted run is welcome.
        overwrite: So is a non-empty output folder.

    Raises:
        UserError: If the output is not empty, cannot be written, or the disk has too little room.
    """
    for path in [Path.cwd(), *(Path(k).resolve() for k in keep if Path(k).exists())]:
        if path.is_relative_to(output.resolve()):
            raise UserError(f"--output-dir {output}: {path} lies in it and would be replaced; name another folder")
    try:
        interrupted = work.is_dir()
        if interrupted and not _is_ours(work):
            raise UserError(f"{work} was not made by d2dmoe; move it away or name another --output-dir")
        if output.exists() and not output.is_dir():
            raise UserError(f"--output-dir {output}: is a file; name another folder")
        if output.is_dir() and any(output.iterdir()) and not (overwrite or (resume and interrupted)):
            raise UserError(f"--output-dir {output} is not empty; use --overwrite to replace it, or another folder")
        if interrupted and not (resume or overwrite):
            raise UserError(
                f"{work} holds an interrupted conversion; use --resume to go on or --overwrite to start again"
            )
        free = shutil.disk_usage(next(p for p in work.parents if p.is_dir())).free
        if free < 1.2 * plan.disk_bytes:
            raise UserError(
                f"--output-dir {output}: the disk has {free / 1e9:.2f} GB free, and the checkpoint needs about "
                f"{plan.disk_bytes / 1e9:.2f} GB; free some room or name a folder on another disk"
            )
        if (work / REPLACED).exists() and not output.exists():
            os.replace(work / REPLACED, output)  # the process died between the two renames of `_write`
        if interrupted and not resume:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        probe = work / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_write(output, error) from None


def _is_ours(work: Path) -> bool:
    """Whether a conversion made this folder: it holds a recipe, or is what a process leaves that died before that."""
    inside = {path.name for path in work.iterdir()}
    return RECIPE in inside or inside <= {".probe", f"{RECIPE}.tmp"}


def _cannot_write(output: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"--output-dir {output}: cannot be written ({reason}); name a folder that can be")


@contextmanager
def _folder_errors(output: Path, work: Path, useful: Callable[[Path], bool] | None = None) -> Iterator[None]:
    """Trouble with the disk in the user's words; a working folder that nothing could go on from does not stay.

    Args:
        output: Where the checkpoint will be.
        work: The working folder.
        useful: Whether something could go on from that folder; by default, whether tensors lie in it.

    Raises:
        UserError: If the disk is full or cannot be written.
    """
    try:
        yield
    except BaseException as error:
        if _disk_full(error):
            shutil.rmtree(work / "checkpoint", ignore_errors=True)
            raise UserError(
                f"--output-dir {output}: the disk is full; free some room and use --resume to go on"
            ) from None
        if isinstance(error, OSError) and str(output) in str(error.filename):
            raise _cannot_write(output, error) from None
        raise
    finally:
        if work.is_dir() and not (useful(work) if useful else any(work.rglob("*.safetensors"))):
            shutil.rmtree(work, ignore_errors=True)


def _check_recipe(work: Path, recipe: dict[str, Any], files: dict[str, Any], resume: bool) -> None:
    """A resumed run must be the same conversion; the first key that differs is named."""
    file = work / RECIPE
    wanted = json.loads(json.dumps({"recipe": recipe, "files": files}, default=list))
    if resume and file.exists():
        before = json.loads(file.read_text())
        stop, again = f"cannot resume {work}", "use the same, or --overwrite to start again"
        for key in sorted({*before["recipe"], *recipe} - FREE_ON_RESUME):
            then, now = before["recipe"].get(key), wanted["recipe"].get(key)
            if then != now:
                raise UserError(f"{stop}: {key} changed ({_short(then)} then, {_short(now)} now); {again}")
        for kind, found in wanted["files"].items():
            if found != before["files"].get(kind):
                raise UserError(f"{stop}: the files of --{kind} {recipe[kind]} changed meanwhile; {again}")
    _write_text(file, json.dumps(wanted))


def _files(path: str) -> list[Any]:
    """Names, sizes and times of a local file or folder; empty for anything else."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _write_text(file: Path, text: str) -> None:
    scratch = file.with_suffix(file.suffix + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, file)


def _output_dtype(config: ConvertConfig, model_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(model_config, "dtype", None) or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored).removeprefix("torch."))


def _version() -> str:
    from . import __version__

    return __version__


def _write(
    output: Path, work: Path, model: PreTrainedModel, processor: Any, recipe: dict, results: dict, config: ConvertConfig
) -> None:
    """Write everything under a temporary name, then rename it to the output folder."""
    scratch, recipe = work / "checkpoint", {key: portable(value) for key, value in recipe.items()}
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, max_shard_size=config.max_shard_size)
    if processor is not None:
        processor.save_pretrained(scratch)
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (scratch / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (scratch / "README.md").write_text(model_card(model, recipe, results))
    publish(scratch, output, work)


def publish(scratch: Path, output: Path, work: Path) -> None:
    """Rename a complete folder to the output folder, and delete the working folder.

    A folder that is replaced waits in the working folder, which alone is deleted, until the new one is in its place.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    replaced = work / REPLACED
    if output.exists():
        os.replace(output, replaced)
    try:
        os.replace(scratch, output)
    except OSError:
        if replaced.exists():
            os.replace(replaced, output)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
