"""The survey on one family of each kind, and docs/models.md, which it made, against the installed transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.hf.shrink import MODEL_TYPES
from tests.hf.survey import examine

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

#: What is special about a family, and what must become of it.
FAMILIES = {
    "jamba": "exact",  # attention in some layers, state spaces in the others
    "deepseek_v3": "exact",  # the cache holds latents
    "gemma3n_text": "exact",  # layers that read the keys of others
    "diffllama": "exact",  # two attention calls a layer
    "mimo_v2_flash": "exact",  # keys and values of different head dims
    "nemotron": "exact",  # keywords do not reach the layers
    "roberta": "exact",  # positions counted from the tokens
    "mbart": "exact",  # positions looked up in a table
    "gpt_neo": "slow",  # no attention interface
    "inkling_text": "slow",  # a bias that depends on the query
    "mpt": "slow",  # ALiBi, and no cache unless asked for
    "moshi": "refused",  # cache and mask disagree
    "deepseek_v32": "refused",  # an indexer chooses the keys
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_family_of_each_kind(model_type: str) -> None:
    result = examine(model_type)
    assert result.status == FAMILIES[model_type], result.reason
    if result.status != "refused":
        assert {"forward", "greedy", "beams"} <= result.errors.keys() | result.absent.keys()


def test_the_page_has_a_row_for_every_type() -> None:
    text = PAGE.read_text()
    version = re.search(r"transformers (\d+\.\d+)", text)
    assert version is not None
    if not transformers.__version__.startswith(version[1] + "."):
        pytest.skip(f"docs/models.md was made with transformers {version[1]}, this is {transformers.__version__}")
    rows = re.findall(r"^\| ([\w-]+) \|", text, re.MULTILINE)
    assert sorted(set(rows) - {"type"}) == list(MODEL_TYPES)
    assert "failed" not in text.replace("0 failed", "")
