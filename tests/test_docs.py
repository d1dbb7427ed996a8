"""The examples in docstrings and in the README run and show what they say."""

import doctest
import importlib
import os
import re
from pathlib import Path

import pytest

import vidops
from vidops._registry import OPS

ROOT = Path(__file__).parents[1]
MODULES = [f"vidops.ops.{name}" for name in (*OPS, "hierarchical_cluster")]
MODULES += [f"vidops.ops.{name}" for name in ("first_frame_order", "nearest_fill", "token_merge")]
MODULES += ["vidops.bits", "vidops._registry", "vidops._report", "vidops.features"]
MODULES += ["vidops.nn.adaptive", "vidops.nn.slot_attention", "vidops.patching"]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="examples use default backends")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"vidops": vidops})
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", sorted(OPS))
def test_docstrings_name_the_backends_that_exist(name):
    text = getattr(vidops, name).__doc__
    (listed,) = re.findall(r"^ *Backends: ([a-z, ]+)", text, re.M)
    assert listed.strip().split(", ") == [b for b in vidops.BACKENDS if b in OPS[name].rows]


def test_readme_code():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
