"""Shared fixtures, and the one table of tolerances."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
# Tiny models: two threads only wait for each other. In the environment, so that processes which tests start compute
# with as many: on some processors the last bits of a product depend on it, and tests compare bits across processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["D2DMOE_CACHE"] = ""  # no decision of another run
os.environ["D2DMOE_DISPATCH"] = "sparse"  # on models so tiny skipping seldom pays, and it is what most tests are about

import pytest
import torch

from d2dmoe.moe.layer import DynamicFFN, layers

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("D2DMOE_DATA", ROOT.parent / "shared" / "data"))

# What agrees with what, and how closely. Loosening a row takes a reason in the same diff.
#   permutation, or all experts on = dense            fp64, default assert_close
#   operator against the fp64 reference                fp32, default assert_close; bf16 relative RMSE <= 5e-3
#   save and load                                      bit-equal
#   model quality                                      recorded figure +- stated noise, marked slow


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes about as long as a conversion of a tiny model: only the tests of the report draw."""
    if "report" not in request.path.parts:
        monkeypatch.setattr("d2dmoe.report.page.can_draw", lambda: False)


@pytest.fixture
def data_dir() -> Path:
    """The data folder, or a skip that says how to get it."""
    if not DATA.exists():
        pytest.skip(f"no data folder at {DATA}; set D2DMOE_DATA")
    return DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in processes of their own, so that results are bit-equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def d2dmoe(capsys: pytest.CaptureFixture[str]):
    """`d2dmoe …` in this process."""

    from cli_support import run_in_process

    def run(*argv: object, code: int = 0):
        result = run_in_process(capsys, *argv)
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        return result

    return run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense GPT-2 in `dense`, text in `text.txt` and a converted checkpoint in `first`."""
    from cli_support import GPT2, convert_argv, save_model, sentences

    from d2dmoe.cli import main

    home = tmp_path_factory.mktemp("home")
    save_model("GPT2LMHeadModel", home / "dense", **GPT2)
    (home / "dense" / "README.md").write_text("---\nlicense: mit\nbase_model: org/ancestor\n---\n# Dense\n")
    (home / "text.txt").write_text("\n".join(sentences(200)))
    assert main(convert_argv(home / "dense", home / "text.txt", home / "first")) == 0
    return home


def randomise_vectors(model: torch.nn.Module) -> None:
    """Biases are zero in a fresh model, and a conversion that loses one would pass unseen: make them count."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3


def randomise_routers(model: torch.nn.Module) -> None:
    """Routers with random weights, for tests that need some routing but no training."""
    for seed, layer in enumerate(layers(model)):
        layer.router.reset(seed)


__all__ = ["DATA", "ROOT", "DynamicFFN", "randomise_routers", "randomise_vectors"]
