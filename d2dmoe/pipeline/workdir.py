"""The working folder with the results of the stages, resume, crash safety, and the final folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .. import hub
from ..config.record import D2DMoEConfig
from ..data.reading import sources_of
from ..errors import UserError
from ..files import identity, replacing, same_files, write_text
from ..measure.observe import release_memory
from ..moe.layer import layers
from ..moe.projection import projections
from ..report.machine import portable
from ..tensors import REFITS, write_checksums
from ..training import first_process, wait_for_everyone
from .origin import origin
from .plan import ConversionPlan

# Keys that may change between an interrupted run and the one that resumes it.
FREE_ON_RESUME = {"output_dir", "eval_tokens", "also_eval", "report_samples", "max_shard_size", "device"}
Card = Callable[[PreTrainedModel, dict[str, Any], dict[str, Any], dict[str, Any]], str]
INSIDE = ".d2dmoe.partial"
# In the working folder: its mark, the output folder before this one, and the mark that the new one is complete.
RECIPE, REPLACED, COMPLETE = "recipe.json", "replaced", "complete"
MOVED = "moved"  # and the mark that everything from before lies in REPLACED
RESULTS = "results.json"  # in the output folder


def fitted(
    work: Path | None, name: str, resume: bool, model: PreTrainedModel, stored: D2DMoEConfig, fit: Callable[[], None],
    *, everything: bool = False,
) -> None:  # fmt: skip
    """Run a stage that changes parameters and budgets, or load both from an earlier run."""
    record = work / f"{name}.json" if work is not None else None

    def compute() -> dict[str, torch.Tensor]:
        fit()
        if record is not None and first_process():
            write_text(record, json.dumps(stored.calibration()))
        return changed()

    def changed() -> dict[str, torch.Tensor]:
        known = {id(p) for x in layers(model) for p in (*x.stand_ins().values(), *x.router.parameters())}
        known |= {id(getattr(x, name)) for x in projections(model) for name in x.ADDED}
        return {k: value.data for k, value in model.named_parameters() if everything or id(value) in known}

    tensors = stage(work, name, resume, compute)
    if record is not None:
        stored.take_calibration(json.loads(record.read_text()))
    for layer in projections(model):
        layer.hold_refits(*(tensors.get(f"{layer.projection.name}.{name}") for name in REFITS))
    for key, value in changed().items():
        value.copy_(tensors[key])


def stage(
    work: Path | None, name: str, resume: bool, compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Compute tensors, or load them from an earlier run that finished this stage."""
    if work is None:
        return compute()
    file = work / f"{name}.safetensors"
    known = resume and file.exists()
    wait_for_everyone()  # every process looks before the first one writes
    if known:
        return load_file(file)
    tensors = {k: v.detach().cpu().contiguous() for k, v in compute().items()}
    release_memory()
    if first_process():
        with replacing(file) as scratch:
            save_file(tensors, scratch)
    wait_for_everyone()
    return load_file(file) if not first_process() else tensors


def named_folders(output_dir: str | None, model: str, ending: str) -> tuple[str, Path, Path]:
    """The output folder as it was named, its absolute path, and the working folder beside it.

    Without a name it is `checkpoints/<model>-<ending>`, of a path or hub id the last part.
    """
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    named = output_dir or f"checkpoints/{path.name}-{ending}"
    output = Path(os.path.abspath(named))
    return named, output, working_folder(output)


def working_folder(output: Path) -> Path:
    """Beside the output folder; in it where it is the root of a disk, which cannot be renamed or replaced."""
    return output / INSIDE if os.path.ismount(output) else output.with_name(output.name + ".partial")


def _contents(folder: Path, work: Path) -> list[Path]:
    """What lies in an output folder besides the working folder, and what every disk's root holds."""
    return [path for path in folder.iterdir() if path != work and path.name != "lost+found"]


def prepare_folders(
    output: Path,
    work: Path,
    plan: ConversionPlan,
    *,
    keep: tuple[str, ...] = (),
    resume: bool = False,
    overwrite: bool = False,
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
        if output.is_dir() and _contents(output, work) and not (overwrite or (resume and interrupted)):
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
        if (work / REPLACED).exists() and not output.exists() and not resume:
            os.replace(work / REPLACED, output)  # the process died between the two renames of `publish`
        if interrupted and not resume:
            if (work / COMPLETE).exists() and work.parent == output:
                publish(work / "checkpoint", output, work)  # some of what was there may lie in the working folder
            else:
                _remove(work)
        work.mkdir(parents=True, exist_ok=True)
        probe = work / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _cannot_write(output, error) from None


def _is_ours(work: Path) -> bool:
    """Whether a conversion made this folder: it holds a recipe, or only the traces of a process that died before."""
    inside = {path.name for path in work.iterdir()}
    return RECIPE in inside or COMPLETE in inside or inside <= {".probe", f"{RECIPE}.tmp", MOVED}


def _cannot_write(output: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"--output-dir {output}: cannot be written ({reason}); name a folder that can be")


@contextmanager
def folder_errors(output: Path, work: Path, useful: Callable[[Path], bool] | None = None) -> Iterator[None]:
    """Report disk errors as sentences, and remove a working folder that holds nothing to resume.

    Args:
        output: Where the checkpoint will be.
        work: The working folder.
        useful: Whether the folder holds something to resume; by default, whether it holds tensors.

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


def finish_publishing(output: Path, work: Path) -> dict[str, Any] | None:
    """Complete a run that was interrupted when nothing but renames and deletions was left; returns its results."""
    if not (work / COMPLETE).exists():
        return None
    publish(work / "checkpoint", output, work)
    return json.loads((output / RESULTS).read_text())


def check_recipe(work: Path, recipe: dict[str, Any], files: dict[str, Any], resume: bool) -> None:
    """Check that a resumed run is the same conversion; the error names the first key that differs."""
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
            if not same_files(before["files"].get(kind), found):
                raise UserError(f"{stop}: the files of --{kind} {recipe[kind]} changed meanwhile; {again}")
    write_text(file, json.dumps(wanted))


def local_files(path: str) -> dict[str, Any]:
    """The identity of local files, or of those in folders, that `--data` names; of none for anything else."""
    roots = map(Path, sources_of(path))
    files = [p for root in roots for p in ([root] if root.is_file() else sorted(root.rglob("*"))) if p.is_file()]
    return identity({str(p.resolve()): p for p in files})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def write_checkpoint(
    output: Path, work: Path, model: PreTrainedModel, processor: Any, recipe: dict, results: dict, card: Card,
    further: dict[str, Path], report: Callable[[Path], None] = lambda _: None,
) -> str:  # fmt: skip
    """Write everything under a temporary name, open it again, then rename it to the output folder.

    Args:
        output: Where the checkpoint will be.
        work: The working folder, which is deleted.
        model: With its weights.
        processor: Its tokenizer or image processor, if any.
        recipe: What was asked for, with `max_shard_size`.
        results: The contents of `results.json`.
        card: Makes the README from the model, the recipe, the results and what the card of the source states.
        further: Files to carry over, by their path in the folder; those that were written here are left out.
        report: Writes the report into the folder. Checksums leave its files out: they may be made anew.

    Returns:
        What has been saved, as a sentence that names the files that were carried over.

    Raises:
        UserError: If the folder that was written does not hold the model's tensors.
    """
    scratch, named = work / "checkpoint", recipe["output_dir"]
    stated = origin(str(recipe["model"]), recipe.get("revision"))
    recipe = {key: portable(value) for key, value in recipe.items()}
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, max_shard_size=recipe["max_shard_size"])
    if processor is not None:
        processor.save_pretrained(scratch)
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (scratch / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    (scratch / "README.md").write_text(card(model, recipe, results, stated))
    _check_written(scratch, model, fully=not recipe.get("low_memory"))
    write_checksums(scratch)
    carried = [name for name in further if not (scratch / name).exists()]
    for name in carried:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(further[name], scratch / name)
    report(scratch)
    publish(scratch, output, work)
    return f"saved {named}" + f", with {', '.join(carried)} unchanged" * bool(carried)


def _check_written(folder: Path, model: PreTrainedModel, *, fully: bool) -> None:
    """Open the weights that were just written, and `fully`, where memory allows, compare them with the model's.

    `save_pretrained` may have written something else, an adapter alone for instance.
    """
    kind, size = type(model), sum(p.nbytes for p in model.parameters())
    if not fully or psutil.virtual_memory().available < 1.5 * size:
        hub.check_safetensors(str(folder))
        return
    again, info = kind.from_pretrained(folder, dtype=model.dtype, output_loading_info=True, use_safetensors=True)
    written = dict(again.named_parameters())

    def same(name: str, value: torch.Tensor) -> bool:
        other = written.get(name)
        return other is not None and other.dtype == value.dtype and torch.equal(other, value.detach().cpu())

    wrong = [*sorted(info["missing_keys"]), *(n for n, value in model.named_parameters() if not same(n, value))]
    if wrong:
        raise UserError(f"{kind.__name__}.save_pretrained did not write {wrong[0]} as it is; this model is not saved")


def publish(scratch: Path, output: Path, work: Path) -> None:
    """Put a complete folder in the place of the output folder, and delete the working folder.

    What is replaced waits in the working folder, which alone is deleted, until everything new is in its place. Killed
    at any moment and called again, it goes on: `COMPLETE` says that the new folder needs nothing more.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(work / COMPLETE, "")
    replaced = work / REPLACED
    if work.parent == output:
        replaced.mkdir(exist_ok=True)
        if not (work / MOVED).exists():
            for path in _contents(output, work):
                os.replace(path, replaced / path.name)
            write_text(work / MOVED, "")
        for path in scratch.iterdir() if scratch.exists() else ():
            os.replace(path, output / path.name)
    elif scratch.exists():
        if output.exists():
            os.replace(output, replaced)
        try:
            os.replace(scratch, output)
        except OSError:
            (work / COMPLETE).unlink()
            if replaced.exists():
                os.replace(replaced, output)
            raise
    _remove(work)


def _remove(work: Path) -> None:
    """Delete a working folder; its marks go last, so that it is known for one if that is interrupted."""
    for path in work.iterdir():
        if path.name not in (RECIPE, COMPLETE, MOVED):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for name in (RECIPE, COMPLETE, MOVED):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
