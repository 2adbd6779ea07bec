"""Trainings that are killed and go on: to the same weights, bit by bit, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_support import names, run_killed, weights

from sparsify.support import sparsify_argv

pytestmark = pytest.mark.usefixtures("one_thread")

# What is trained, and how. In the last, samples differ in length and the training is in its second epoch at step 8.
RUNS = {
    "full": ("gpt2", "text.txt", "--lr-scheduler-type", "constant"),  # a thirteenth step would show
    "lora": ("gpt2", "text.txt", "--lora-rank", 2, "--learning-rate", 0.03),
    "distilled": ("classifier", "rows.jsonl", "--distillation", 0.5, "--activation", "relu"),
    "masked": ("masked", "rows.jsonl", "--learning-rate", 0.003, "--alpha-schedule", "sine"),
}
# What has just been written when the kill comes. A state of which `optimizer.pt` is the newest file is half written.
MOMENTS = {
    "full": (".partial/before.json", "checkpoint-4/complete", "checkpoint-8/optimizer.pt", "checkpoint-12/complete"),
    "lora": ("checkpoint-8/optimizer.pt",),
    "distilled": ("checkpoint-8/complete",),
    "masked": ("checkpoint-8/complete",),
}
KILLS = [(run, moment) for run, moments in MOMENTS.items() for moment in moments]


def argv(home: Path, run: str, output: Path, *more: object) -> list[str]:
    model, data, *flags = RUNS[run]
    return sparsify_argv(home / model, home / data, output, *flags, *more)


def log(folder: Path) -> list[dict]:
    """Rows of the log, without times."""
    return json.loads((folder / "results.json").read_text())["log"]


def states(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("training/checkpoint-*")}


def place(run: str, moment: str) -> Path:
    return Path(f"{run}-{moment.strip('.').replace('/', '-')}")


@pytest.fixture(scope="module")
def killed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kill a folder, in which the training of `out` was killed."""
    root, jobs = tmp_path_factory.mktemp("killed"), {}
    for run, moment in KILLS:
        (root / place(run, moment)).mkdir(parents=True)
        ending = moment if moment.startswith(".partial") else f".partial/training/{moment}"
        jobs[f"{place(run, moment)}/out{ending}"] = argv(home, run, root / place(run, moment) / "out")
    for name, flags in (("replaced", ["--overwrite"]), ("published", [])):
        (root / name / "out").mkdir(parents=True)
        (root / name / "out" / "notes.txt").touch()
        jobs[f"{name}/out.partial/replaced" if name == "replaced" else f"{name}/new"] = argv(
            home, "full", root / name / ("out" if name == "replaced" else "new"), *flags
        )
    run_killed(jobs, home)
    return root


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, in a new place: a test process that steals tests may come back to this module."""
    from d2dmoe.cli import main

    root = tmp_path_factory.mktemp("whole")
    for run in RUNS:
        assert main(argv(home, run, root / run)) == 0
        assert not (root / f"{run}.partial").exists()
    return {run: root / run for run in RUNS}


def test_the_runs_train(home: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path) -> None:
    for run, folder in whole.items():
        assert weights(folder) != weights(home / RUNS[run][0])
    d2dmoe(*argv(home, "lora", tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(whole["lora"])
    d2dmoe(*argv(home, "lora", tmp_path / "other", "--seed", 1))
    assert weights(tmp_path / "other") != weights(whole["lora"])


@pytest.mark.parametrize(("run", "moment"), KILLS)
def test_a_killed_training_is_resumed(
    run: str, moment: str, home: Path, killed: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path
) -> None:
    shutil.copytree(killed / place(run, moment), tmp_path, dirs_exist_ok=True)
    assert names(tmp_path) == {"out.partial"}
    refused = d2dmoe(*argv(home, run, tmp_path / "out"), code=1)
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert names(tmp_path) == {"out.partial"}

    done = d2dmoe(*argv(home, run, tmp_path / "out", "--resume"))
    assert names(tmp_path) == {"out"}
    assert weights(tmp_path / "out") == weights(whole[run])
    assert names(tmp_path / "out") == names(whole[run])
    ours, theirs = (json.loads((f / "results.json").read_text())["rows"] for f in (tmp_path / "out", whole[run]))
    assert ours == theirs
    assert done.out.count("\n") == 4


@pytest.mark.parametrize("moment", ["replaced", "published"])
def test_killed_while_the_folder_gets_its_name(
    moment: str, home: Path, killed: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path
) -> None:
    shutil.copytree(killed / moment, tmp_path, dirs_exist_ok=True)
    name = "out" if moment == "replaced" else "new"
    assert f"{name}.partial" in names(tmp_path)
    d2dmoe(*argv(home, "full", tmp_path / name, "--resume"))
    assert names(tmp_path) == {"out", name}
    assert weights(tmp_path / name) == weights(whole["full"])
    assert (tmp_path / "out" / "notes.txt").exists() == (moment == "published")


def damage(state: Path, how: str) -> None:
    if how == "no mark":
        (state / "complete").unlink()
    elif how == "file gone":
        (state / "optimizer.pt").unlink()
    else:
        (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:-9])


@pytest.mark.parametrize("how", ["no mark", "file gone", "cut short"])
def test_a_damaged_state_is_not_resumed_from(
    how: str, home: Path, killed: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path
) -> None:
    """Also where the damaged one is marked: a process may die while it deletes an old one."""
    shutil.copytree(killed / place("full", "checkpoint-12/complete"), tmp_path, dirs_exist_ok=True)
    training = tmp_path / "out.partial" / "training"
    assert states(tmp_path / "out.partial") == {"checkpoint-8", "checkpoint-12"}
    damage(training / "checkpoint-12", how)
    d2dmoe(*argv(home, "full", tmp_path / "out", "--resume"))
    assert weights(tmp_path / "out") == weights(whole["full"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alpha", 0.5], "alpha changed (0.001 then, 0.5 now)"),
        (["--regulariser", "l1"], "regulariser changed (hoyer then, l1 now)"),
        (["--activation", "relu"], "activation changed (keep then, relu now)"),
        (["--lora-rank", 2], "lora_rank changed (0 then, 2 now)"),
        (["--seed", 3], "seed changed (0 then, 3 now)"),
        (["--learning-rate", "1e-3"], "learning_rate changed (None then, 0.001 now)"),
        (["--max-steps", 20], "max_steps changed (12 then, 20 now)"),
        (["--bf16"], "bf16 changed (None then, True now)"),
    ],
)
def test_a_changed_recipe_is_not_resumed(
    flags: list, named: str, home: Path, killed: Path, d2dmoe, tmp_path: Path
) -> None:
    shutil.copytree(killed / place("full", "checkpoint-4/complete"), tmp_path, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    result = d2dmoe(*argv(home, "full", tmp_path / "out", "--resume", *flags), code=1)
    assert named in result.err
    assert "--overwrite" in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_changed_data_are_not_resumed(home: Path, killed: Path, d2dmoe, tmp_path: Path) -> None:
    shutil.copytree(killed / place("full", "checkpoint-4/complete"), tmp_path, dirs_exist_ok=True)
    argument = argv(home, "full", tmp_path / "out", "--resume")
    other = shutil.copy(home / "text.txt", tmp_path / "text.txt")
    argument[argument.index("--data") + 1] = str(other)
    assert "data changed (" in d2dmoe(*argument, code=1).err


def test_the_recipe_of_a_result_resumes_it(
    home: Path, killed: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path
) -> None:
    """A number in the file is the number of the flag."""
    shutil.copytree(killed / place("full", "checkpoint-4/complete"), tmp_path, dirs_exist_ok=True)
    paths = ("--model", home / "gpt2", "--data", home / "text.txt", "--output-dir", tmp_path / "out")
    d2dmoe("sparsify", "--recipe", whole["full"] / "recipe.yaml", *paths, "--resume")
    assert weights(tmp_path / "out") == weights(whole["full"])


def test_other_figures_may_be_wanted_of_a_resumed_run(home: Path, killed: Path, d2dmoe, tmp_path: Path) -> None:
    """Before and after are measured on the same tokens all the same."""
    shutil.copytree(killed / place("full", "checkpoint-4/complete"), tmp_path, dirs_exist_ok=True)
    d2dmoe(*argv(home, "full", tmp_path / "out", "--resume", "--eval-tokens", 200))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [224, 224]


def test_overwrite(home: Path, killed: Path, whole: dict[str, Path], d2dmoe, tmp_path: Path) -> None:
    shutil.copytree(killed / place("full", "checkpoint-8/optimizer.pt"), tmp_path, dirs_exist_ok=True)
    d2dmoe(*argv(home, "full", tmp_path / "out", "--overwrite"))  # what an interrupted run left
    assert weights(tmp_path / "out") == weights(whole["full"])
    assert "is not empty" in d2dmoe(*argv(home, "full", tmp_path / "out"), code=1).err
    d2dmoe(*argv(home, "full", tmp_path / "out", "--overwrite", "--seed", 1))
    assert weights(tmp_path / "out") != weights(whole["full"])
    assert names(tmp_path) == {"out"}


def test_the_log_of_an_uninterrupted_run(whole: dict[str, Path]) -> None:
    (row,) = log(whole["full"])
    assert row["step"] == 10
    assert {"loss", "task_loss", "sparsity_loss", "alpha", "nonzero", "near_zero"} <= set(row)
