"""Run one of the recipes: dense base, sparsify, convert with attention and by the paper's rule, evaluate, time, report.

    python recipes/run.py bert_emotion --quick
    python recipes/run.py gpt2_wikitext2 --base openai-community/gpt2 --data my_text.txt
    python recipes/run.py vit_cifar10 --paper --dry-run
    python recipes/run.py --table

A recipe is `recipes/NAME/recipe.yaml`: options of the public command line, and what `--quick` and `--paper` change in
them. Every step is a command that is printed before it runs. What a step has finished is not made again, and what was
interrupted goes on, when the same command is given once more. `--paper` has the authors' settings for their models and
data, which take a GPU and the hub; with `--dry-run` it says what they would take.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from d2dmoe import hub
from d2dmoe.config import UserError
from d2dmoe.files import write_text
from d2dmoe.report import machine, parts_table, portable, table

HERE = Path(__file__).resolve().parent
FORMS = ("full", "quick", "paper")
SECTIONS = ("sparsify", "convert", "ours", "theirs", "eval", "bench")
INT8 = {"expert_dtype": "int8-dynamic", "linear_dtype": "int8-dynamic"}  # evaluated and timed beside the model's dtype
BEGIN, END = "<!-- outcomes -->", "<!-- end of outcomes -->"  # in recipes/README.md
PYTHON, D2DMOE = [sys.executable], [sys.executable, "-m", "d2dmoe"]


@dataclass
class Step:
    """A command and the file or folder that is there once it has finished."""

    name: str
    command: list[str]
    product: Path
    resumable: bool = False

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return shlex.join(words).replace("python -m d2dmoe", "d2dmoe", 1)

    @property
    def recorded(self) -> str:
        """The command without the paths of this machine."""
        return Step(self.name, [w if w == sys.executable else portable(w) for w in self.command], self.product).shown


@dataclass
class Recipe:
    """A recipe in one of its forms, with paths filled in."""

    name: str
    form: str
    content: dict[str, Any]
    base: str
    folder: Path
    seed: int = 0
    data: str = ""
    eval_data: str = ""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        """All commands, in their order."""
        out, sections = self.folder, self.sections
        test = {"data": self.eval_data, **sections["eval"]}
        made = {**sections["convert"], "data": self.data, "seed": self.seed}
        dense = self.base or str(out / "base")
        found = []
        if not self.base:
            script = [os.path.relpath(HERE / self.content["base"][0]), *map(str, self.content["base"][1:])]
            found.append(Step("base", [*PYTHON, *script, "--output-dir", dense], out / "base" / "model.safetensors"))
        found.append(self._evaluation("base", dense, test))
        if sections["sparsify"]:
            keys = {"model": dense, "data": self.data, "output-dir": out / "sparse", "seed": self.seed}
            words = [*D2DMOE, "sparsify", *flags({**keys, **sections["sparsify"]})]
            found.append(Step("sparsify", words, out / "sparse" / "results.json", resumable=True))
            dense = str(out / "sparse")
        for name, own in (("ours", sections["ours"]), ("theirs", sections["theirs"])):
            keys = {"model": dense, "output-dir": out / name, **made, **own}
            words = [*D2DMOE, "convert", *flags(keys)]
            found.append(Step(f"convert-{name}", words, out / name / "results.json", resumable=True))
            found.append(self._evaluation(name, str(out / name), test))
        found.append(self._evaluation("int8", str(out / "ours"), {**test, **INT8}))
        times = {"model": out / "ours", "json": out / "bench.json", "data": self.eval_data, "profile": True, **INT8}
        times |= sections["bench"]
        found.append(Step("bench", [*D2DMOE, "bench", *flags(times)], out / "bench.json"))
        page = out / "report.html"
        words = [*D2DMOE, "report", str(out / "ours"), str(out / "theirs"), "--output", str(page)]
        found.append(Step("report", words, page))
        return found

    def _evaluation(self, name: str, model: str, test: dict[str, Any]) -> Step:
        file = self.folder / f"eval-{name}.json"
        return Step(f"eval-{name}", [*D2DMOE, "eval", *flags({"model": model, "json": file, **test})], file)


def flags(keys: dict[str, Any]) -> list[str]:
    """Options of a verb as words of a command line."""
    words = []
    for key, value in keys.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", ",".join(map(str, value))]
        else:
            words += [f"--{name}", str(value)]
    return words


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(path.parent.name for path in HERE.glob("*/recipe.yaml"))


def open_recipe(
    name: str, form: str = "full", *, base: str = "", data: str = "", eval_data: str = "", folder: str = "",
    seed: int = 0,
) -> Recipe:  # fmt: skip
    """A recipe with the settings of one of its forms.

    Raises:
        UserError: If there is no such recipe.
    """
    if name not in names():
        raise UserError(f"{name}: no such recipe; there are {', '.join(names())}")
    content = yaml.safe_load((HERE / name / "recipe.yaml").read_text())
    own = content.get(form) or {}
    sections = {key: {**(content.get(key) or {}), **(own.get(key) or {})} for key in SECTIONS}
    content = {**content, **{key: value for key, value in own.items() if key not in SECTIONS}}
    if "sparsify" in own and own["sparsify"] is None:
        sections["sparsify"] = {}
    place = os.environ.get("D2DMOE_DATA", "../shared/data")
    if data and not eval_data:
        sections["eval"]["part"] = "held_out"
    train, test = (str(content["data"][part]).format(data=place) for part in ("train", "test"))
    out = Path(folder or f"runs/{name}" + ("" if form == "full" else f"-{form}") + (f"-{seed}" if seed else ""))
    start = base or (content.get("model") or "")
    return Recipe(name, form, content, start, out, seed, data or train, eval_data or data or test, sections)


def run(recipe: Recipe) -> dict[str, Any]:
    """Run what is not there yet; the outcome.

    Raises:
        UserError: If a step fails, or the folder holds the products of other commands.
    """
    recipe.folder.mkdir(parents=True, exist_ok=True)
    record = recipe.folder / "steps.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for step in recipe.steps:
        before = done.get(step.name)
        if step.product.exists() and before and before["command"] != step.recorded:
            raise UserError(
                f"{recipe.folder}: holds what `{before['command']}` has made; give another --output-dir, or delete it"
            )
        if step.product.exists() and before:
            continue
        print(f"\n$ {step.shown}", flush=True)
        done[step.name] = execute(step)
        write_text(record, json.dumps(done, indent=1) + "\n")
    return outcome(recipe, done)


def execute(step: Step) -> dict[str, Any]:
    """Run a step's command; its minutes and peak memory in MB.

    Raises:
        UserError: If it fails.
    """
    partial = step.product.parent.with_name(step.product.parent.name + ".partial")
    words = [*step.command, "--resume"] if step.resumable and partial.exists() else step.command
    started = time.time()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"step {step.name} ended with code {process.returncode}; give the command again to go on")
    minutes = (time.time() - started) / 60
    return {"command": step.recorded, "minutes": round(minutes, 2), "peak_mb": round(usage.ru_maxrss / 1024)}


def outcome(recipe: Recipe, done: dict[str, Any]) -> dict[str, Any]:
    """What a run has found, from the files of its steps."""

    def rows(file: str) -> list[dict[str, Any]]:
        return json.loads((recipe.folder / file).read_text())["rows"]

    base, ours, theirs, int8 = (rows(f"eval-{name}.json") for name in ("base", "ours", "theirs", "int8"))
    keys = ("active_fraction", "flops_fraction_model", "flops_fraction_attention")
    points = []
    for found in ours:
        if found["active_fraction"] == 1:
            continue
        asked = found.get("active", found["active_fraction"])
        other, rounded = (
            next((r for r in table if abs(r.get("active", r["active_fraction"]) - asked) < 1e-6), None)
            for table in (theirs, int8)
        )
        times = [
            {"phase": r["phase"], "batch": r["batch"], "tokens": r["tokens"], "speedup": round(r["speedup"], 3),
             "int8": round(r["all int8-dynamic_speedup"], 3), "dense_int8": round(r["dense int8-dynamic_speedup"], 3),
             "parts": {c: {p: round(ms, 3) for p, ms in parts.items()} for c, parts in r["parts"].items()}}
            for r in rows("bench.json")
            if abs(r.get("active", -1) - asked) < 1e-6
        ]  # fmt: skip
        point = {"active": asked, "ours": found["metric"]["value"], "times": times}
        point |= {"int8": rounded["metric"]["value"]} if rounded else {}
        point |= {f"ours_{key}": round(found[key], 4) for key in keys if key in found}
        if other:
            point |= {"theirs": other["metric"]["value"]}
            point |= {f"theirs_{key}": round(other[key], 4) for key in keys if key in other}
        points.append(point)
    return {
        "date": datetime.date.today().isoformat(), "machine": machine(), "seed": recipe.seed,
        "metric": ours[0]["metric"]["name"], "base": base[-1]["metric"]["value"],
        "dense": ours[0]["dense"]["value"], "points": points,
        "minutes": round(sum(s["minutes"] for s in done.values()), 1),
        "peak_mb": max(s["peak_mb"] for s in done.values()), "steps": done,
    }  # fmt: skip


def outcome_table(entry: dict[str, Any]) -> str:
    """One run: a line for each budget."""
    body = []
    for point in entry["points"]:
        line = [f"{point['active']:g}", f"{point['ours_active_fraction']:.3f}"]
        line += [f"{point['ours_flops_fraction_model']:.3f}", f"{point['ours']:.4f}"]
        line += [f"{point[key]:.{digits}f}" if key in point else ""
                 for key, digits in (("theirs_flops_fraction_model", 3), ("theirs", 4))]  # fmt: skip
        times = [f"{t['phase']} {t['batch']}: {t['speedup']:.2f}×" for t in point["times"]]
        int8 = [
            f"{t['phase']} {t['batch']}: {t['int8']:.2f}× ({t['dense_int8']:.2f}×)"
            for t in point["times"]
            if "int8" in t
        ]
        body.append([*line, ", ".join(times), f"{point['int8']:.4f}" if "int8" in point else "", ", ".join(int8)])
    metric = entry["metric"]
    theirs = ["model FLOPs (paper's rule)", f"{metric} (paper's rule)"]
    ours = ["budget", "active", "model FLOPs", metric]
    head = [*ours, *theirs, "speed-up", f"{metric} in int8", "speed-up in int8 (dense in int8)"]
    text = f"base {entry['base']:.4f}, converted with everything on {entry['dense']:.4f}\n\n" + table(head, body)
    return text + (profile_table(entry) if any("parts" in t for p in entry["points"] for t in p["times"]) else "")


def profile_table(entry: dict[str, Any]) -> str:
    """Where the time goes at the smallest budget that keeps 99 % of the base, or at the largest there is."""
    base, lower = entry["base"], entry["metric"] in ("perplexity", "masked_lm")
    keeping = [p for p in entry["points"] if (base / p["ours"] if lower else p["ours"] / base) >= 0.99]
    point = min(keeping, key=lambda p: p["active"]) if keeping else max(entry["points"], key=lambda p: p["active"])
    keeps = "the smallest that keeps 99 %" if keeping else "the largest, and none keeps 99 %"
    rows = [{**times, "active_fraction": point["ours_active_fraction"]} for times in point["times"]]
    return f"\n\nWhere the milliseconds go at a budget of {point['active']:g}, {keeps}:\n\n{parts_table(rows)}"


def recorded_table() -> str:
    """All recorded outcomes, as `recipes/README.md` shows them."""
    parts = []
    for name in names():
        file = HERE / name / "outcome.json"
        content = yaml.safe_load((HERE / name / "recipe.yaml").read_text())
        for form, entry in (json.loads(file.read_text()) if file.exists() else {}).items():
            flag = "" if form == "full" else f" --{form}"
            where = f"{entry['machine']['processor']}, {entry['machine']['threads']} threads"
            parts.append(
                f"### {name}{flag}\n\n{content['about']}\n\n`python recipes/run.py {name}{flag}`, {entry['date']}, "
                f"seed {entry['seed']}, {where}: {entry['minutes']:.0f} minutes, peak "
                f"{entry['peak_mb'] / 1024:.1f} GB; {outcome_table(entry)}\n\nThe authors: {content['authors']}"
            )
    return "\n\n".join(parts)


def record(name: str, form: str, found: dict[str, Any]) -> None:
    """Keep an outcome beside its recipe, and show it in `recipes/README.md`."""
    file, readme = HERE / name / "outcome.json", HERE / "README.md"
    known = json.loads(file.read_text()) if file.exists() else {}
    write_text(file, json.dumps({**known, form: found}, indent=1) + "\n")
    head, _, rest = readme.read_text().partition(BEGIN)
    write_text(readme, f"{head}{BEGIN}\n\n{recorded_table()}\n\n{END}{rest.partition(END)[2]}")


def plan(recipe: Recipe, tflops: float) -> str:
    """What `--dry-run` prints: the commands, and for the training steps memory and hours."""
    lines = [f"$ {step.shown}" for step in recipe.steps]
    try:
        found = estimates(recipe, tflops)
    except UserError as error:
        found = {"memory and hours": f"unknown ({error})"}
    lines += ["", *(f"{key}: {value}" for key, value in found.items())]
    return "\n".join(lines)


def estimates(recipe: Recipe, tflops: float) -> dict[str, str]:
    """Parameters, memory and hours, from the config alone. Empty where the base is not made yet."""
    from d2dmoe.discovery.skeleton import skeleton

    if not recipe.base and not (recipe.folder / "base" / "config.json").exists():
        return {"hours and memory": "known when the base is there; give --base"}
    config = hub.read_config(recipe.base or str(recipe.folder / "base"))
    model = skeleton(hub.model_class(config), config)
    count = sum(p.numel() for p in model.parameters())
    keys = recipe.sections["sparsify"]
    found = {"parameters": f"{count / 1e6:.0f} million"}
    tokens = recipe.content.get("tokens") or {}
    if keys:
        per_step = keys.get("batch_size", 16) * keys.get("gradient_accumulation_steps", 1) * tokens.get("per_item", 1)
        steps = keys.get("max_steps", -1)
        seen = per_step * steps if steps > 0 else tokens["epoch"] * keys["num_train_epochs"]
        found["sparsify"] = (
            f"{seen / 1e6:.0f} million tokens, {6 * count * seen / tflops / 3.6e15:.1f} hours at {tflops:g} TFLOP/s; "
            f"{16 * count / 1e9:.1f} GB for weights, gradients and AdamW in fp32, activations besides"
        )
    routers = recipe.sections["convert"].get("router_tokens", 200_000)
    found["routers"] = f"{routers / 1e6:.1f} million tokens, {2 * count * routers / tflops / 3.6e15:.2f} hours"
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=", ".join(names()))
    form = parser.add_mutually_exclusive_group()
    for key, text in (("quick", "minutes on two cores"), ("paper", "the authors' settings, models and data")):
        form.add_argument(f"--{key}", dest="form", action="store_const", const=key, default="full", help=text)
    parser.add_argument("--base", default="", help="dense model: hub id or folder (default: made by the recipe)")
    parser.add_argument("--data", default="", help="data to train and calibrate on")
    parser.add_argument("--eval-data", default="", help="data to evaluate on (default: a held-out part of --data)")
    parser.add_argument("--output-dir", default="", help="default: runs/NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and what they would take")
    parser.add_argument("--tflops", type=float, default=100.0, help="for --dry-run: what the machine sustains")
    parser.add_argument("--record", action="store_true", help="keep the outcome beside the recipe, and in README.md")
    parser.add_argument("--table", action="store_true", help="print all recorded outcomes and stop")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(recorded_table())
        return 0
    if not arguments.name:
        parser.error(f"give a recipe: {', '.join(names())}")
    try:
        recipe = open_recipe(
            arguments.name, arguments.form, base=arguments.base, data=arguments.data, eval_data=arguments.eval_data,
            folder=arguments.output_dir, seed=arguments.seed,
        )  # fmt: skip
        if arguments.dry_run:
            print(plan(recipe, arguments.tflops))
            return 0
        found = run(recipe)
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    print("\n" + outcome_table(found))
    if arguments.record:
        record(recipe.name, recipe.form, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
