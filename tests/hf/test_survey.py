"""The survey on one family of each kind, and docs/models.md, which it made, against the installed transformers."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import transformers

import prefix_attn as pa
from prefix_attn.bank.unsupported import NO_PLACE
from tests.hf.overrides import OVERRIDES
from tests.hf.shrink import CAUSAL, IMAGE_TEXT, tiny_random_model
from tests.hf.survey import compare, examine, random_bank
from tests.hf.survey_page import Result

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
    "roformer": "slow",  # one rotary table for all rows
    "doge": "slow",  # masks made of the values of all keys
    "inkling_text": "slow",  # a bias that depends on the query
    "mpt": "slow",  # ALiBi, and no cache unless asked for
    "moshi": "refused",  # cache and mask disagree
    "deepseek_v32": "refused",  # an indexer chooses the keys
    "cpmant": "refused",  # a prompt of its own
}

#: The same of models of images and text, given text.
WITH_IMAGES = {
    "llava": "exact",
    "mllama": "exact",  # layers that attend to images, left out without any
    "paligemma": "refused",  # its text looks both ways
    "exaone4_5": "exact",  # positions are slots, padding included
    "qwen2_vl": "exact",  # positions along three axes
    "qwen2_5_omni_thinker": "exact",  # behind a cache it knows no positions unless they are given
    "evolla": "exact",  # an encoder of proteins that counts tokens
    "inkling2": "slow",
    "blip-2": "refused",  # no pass without an image
    "udop": "refused",  # encoder-decoder
}


@pytest.mark.parametrize(("model_type", "images"), [*((t, False) for t in FAMILIES), *((t, True) for t in WITH_IMAGES)])
def test_one_family_of_each_kind(model_type: str, images: bool) -> None:
    if model_type not in (IMAGE_TEXT if images else CAUSAL):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    result = examine(model_type, images)
    assert result.status == (WITH_IMAGES if images else FAMILIES)[model_type], result.reason
    assert "Error" not in result.reason
    if result.status == "slow":
        assert result.why_slow
    if result.status != "refused":
        assert {"forward", "greedy", "beams"} <= result.errors.keys() | result.absent.keys()


@pytest.mark.parametrize(("model_type", "part"), [("blip-2", "language_model"), ("kosmos-2", "text_model")])
def test_the_part_that_reads_text_of_a_model_that_needs_an_image(model_type: str, part: str) -> None:
    model = tiny_random_model(model_type, IMAGE_TEXT[model_type])
    with pytest.raises(pa.UnsupportedModel, match=f"model.{part}"):
        pa.PrefixBank.for_model(model)
    reference, model = copy.deepcopy(getattr(model, part)), getattr(model, part)
    reference.set_attn_implementation("eager")
    bank = random_bank(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pa.SlowModel)
        pa.patch(model, bank)
    compare(model, reference, bank, Result(model_type))


def test_positions_that_cannot_be_given_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "trocr", {"use_learned_position_embeddings": False})
    result = examine("trocr")
    assert result.status == "refused"
    assert "counts positions by itself" in result.reason


def test_the_page_has_a_row_for_every_type() -> None:
    text = PAGE.read_text()
    version = re.search(r"transformers (\d+\.\d+)", text)
    assert version is not None
    if not transformers.__version__.startswith(version[1] + "."):
        pytest.skip(f"docs/models.md was made with transformers {version[1]}, this is {transformers.__version__}")
    causal, images = text.split("## Vision-language models")
    for part, types in ((causal, CAUSAL), (images, IMAGE_TEXT)):
        rows = re.findall(r"^\| ([\w.-]+) \|", part, re.MULTILINE)
        assert sorted(set(rows) - {"type"}) == list(types)
    assert "failed" not in text.replace("0 failed", "")
    reasons = text.replace("cannot be built here: ModuleNotFoundError", "")
    assert not re.search(r"^\| .*Error: ", reasons, re.MULTILINE)
    assert all(reason in text for reason in NO_PLACE.values())
