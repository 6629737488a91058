"""One thread, no network, and a tiny random model of each family that tests may read but not change."""

import os
import re

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry
import torch
from hypothesis import settings

import capcli
from capcli.exporting import checks
from capcli.measuring import latency
from capcli.runtime import choice

torch.set_num_threads(1)
settings.register_profile("cap", deadline=None, derandomize=True)
settings.load_profile("cap")

pytest_plugins = ["tiny", "forks"]  # fixtures of the end-to-end tests
WHOLE = "tiny"  # the fixture on which every test of a whole command rests
MINI = Path(capcli.__file__).parent / "builtin" / "mini"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that runs a whole command on the tiny model is slow; others say so themselves. rare.txt lists others."""
    lines = Path(__file__).with_name("rare.txt").read_text().splitlines()
    rare = [re.compile(line) for line in lines if line and not line.startswith("#")]
    for item in items:
        if any(one.match(item.nodeid) for one in rare):
            item.add_marker("rare")
        if WHOLE in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that an earlier run of the tests kept is found again; all processes of this one share compiled code."""
    os.environ["CAP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    top = tmp_path_factory.getbasetemp()
    kernels = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / "compiled"
    kernels.mkdir(mode=0o700, exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(kernels)


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> None:
    """Few rounds where a run in this process measures how long inputs of a fixed size take."""
    latency.FIXED_SECONDS = choice.SECONDS = 0.03
    checks.LATENCY_SECONDS = 0.1


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the built-in model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Makes `checkpoint(family, labels, seed)`: a folder with a tiny random model; the same call, the same folder."""
    from transformers import AutoModelForSequenceClassification

    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "bert", labels: tuple[str, ...] = ("negative", "positive"), seed: int = 0) -> Path:
        key = (family, labels, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
            rows = len(tokenizer) + family.startswith("qwen")  # whose tokenizer adds its <|endoftext|> when it is read
            config = registry.config_of(family, rows, num_labels=len(labels), **ids)
            config.id2label = dict(enumerate(labels))
            config.label2id = {name: i for i, name in enumerate(labels)}
            torch.manual_seed(seed)
            net = AutoModelForSequenceClassification.from_config(config)
            with torch.no_grad():
                for parameter in net.parameters():  # biases too, so that every tensor matters
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            net.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
