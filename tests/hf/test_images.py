"""Models of images and text with both: exact where an image leaves the mask causal, refused where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import prefix_attn as pa
from prefix_attn.hf.decoder import decoder_of
from prefix_attn.hf.verify import replicated
from tests.hf.overrides import OVERRIDES
from tests.hf.shrink import CAUSAL, IMAGE_TEXT, tiny_random_model
from tests.hf.survey import random_bank

IMAGE = 97  # the token that stands for a part of an image
QWEN = {"image_token_id": IMAGE, "video_token_id": 96, "vision_start_token_id": 95, "vision_end_token_id": 94}
SMALL = {"image_size": 28, "patch_size": 14}  # four patches

#: Model type -> config arguments.
TINY: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": SMALL, "image_token_index": IMAGE},
    "qwen2_vl": QWEN | {"vision_config": {"hidden_size": 32}},
    "qwen3_vl": QWEN | {"vision_config": {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}},
    "gemma3": {"vision_config": SMALL, "image_token_index": IMAGE, "mm_tokens_per_image": 4},
    "mllama": {"image_token_index": IMAGE, "vision_config": SMALL | {
        "intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "num_global_layers": 1}},
}  # fmt: skip


@pytest.fixture
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of a type, small enough for an image of four tokens."""
    family = request.param
    monkeypatch.setitem(OVERRIDES, family, TINY[family])
    return tiny_random_model(family, IMAGE_TEXT.get(family) or CAUSAL[family])


def inputs_with_an_image(model: Any) -> dict[str, Tensor]:
    """One row: two tokens, an image, six tokens."""
    rng = torch.Generator().manual_seed(0)
    family = model.config.model_type
    image = [IMAGE] * (1 if family == "mllama" else 4)
    tokens = torch.tensor([[5, 95, *image, *range(7, 13)]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family.startswith("qwen"):
        patch = model.config.vision_config
        width = patch.in_channels * patch.temporal_patch_size * patch.patch_size**2
        return inputs | {
            "pixel_values": torch.randn(16, width, generator=rng), "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }  # fmt: skip
    if family == "mllama":
        return inputs | {
            "pixel_values": torch.randn(1, 1, 4, 3, 28, 28, generator=rng),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
            "cross_attention_mask": torch.ones(1, tokens.shape[1], 1, 4, dtype=torch.long),
        }
    if family == "gemma3":
        inputs["token_type_ids"] = (tokens == IMAGE).int()
    return inputs | {"pixel_values": torch.randn(1, 3, 28, 28, generator=rng)}


def by_replica(reference: Any, bank: pa.PrefixBank, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the eager formula with the prefix in its cache, at the positions the body gives its decoder, moved."""
    seen: list[Tensor | None] = []
    handle = decoder_of(reference).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    reference(**inputs)
    handle.remove()
    m, mask = bank.prefix_len(task), inputs["attention_mask"]
    positions = {} if seen[0] is None else {"position_ids": seen[0] + m}
    mask = torch.cat([mask.new_ones(1, m), mask], dim=1)
    cache = replicated(reference, bank, task)
    logits: Tensor = reference(**(inputs | {"attention_mask": mask}), past_key_values=cache, **positions).logits
    return logits


@pytest.mark.parametrize("tiny", ["llava", "qwen2_vl", "qwen3_vl"], indirect=True)
@torch.no_grad()
def test_an_image_behind_a_prefix(tiny: Any) -> None:
    reference = copy.deepcopy(tiny)
    reference.set_attn_implementation("eager")
    bank = random_bank(tiny)
    pa.patch(tiny, bank)
    inputs = inputs_with_an_image(tiny)
    got = tiny(**inputs, task_ids=["nine"]).logits
    torch.testing.assert_close(got, by_replica(reference, bank, "nine", inputs), rtol=0, atol=2e-5)
    assert (got - reference(**inputs).logits).abs().max() > 0.1

    out = tiny.generate(
        **inputs, task_ids=["nine"], max_new_tokens=4, do_sample=False, eos_token_id=-1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    expected = by_replica(reference, bank, "nine", inputs | longer)[0, -new - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")  # transformers 5.17, of its own call
@pytest.mark.parametrize("tiny", ["gemma3", "mllama"], indirect=True)
def test_images_that_change_a_mask_are_refused(tiny: Any) -> None:
    """gemma3's image tokens see each other; mllama's text attends to images in layers of their own."""
    inputs = inputs_with_an_image(tiny)
    tiny(**inputs)
    pa.patch(tiny, random_bank(tiny))
    with pytest.raises(pa.UnsupportedModel, match="attention_mask"):
        tiny(**inputs, task_ids=["nine"])


@torch.no_grad()
def test_stacks_beside_the_text_keep_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evolla's encoder of proteins, and the eyes of phi4, lie inside their decoders."""
    eyes = {"image_size": 56, "crop_size": 56, "patch_size": 14, "image_token_id": 97}
    monkeypatch.setitem(OVERRIDES, "phi4_multimodal", {"vision_config": eyes})
    ids = torch.tensor([[5, 6, *[97] * 13, 7, 8, 9]])
    rng = torch.Generator().manual_seed(0)
    cases: dict[str, dict[str, Any]] = {
        "evolla": {
            "input_ids": torch.tensor([[5, 6, 7, 8]]), "protein_input_ids": torch.tensor([[4, 5, 6, 7]]),
            "protein_attention_mask": torch.ones(1, 4, dtype=torch.long),
        },
        "phi4_multimodal": {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "image_pixel_values": torch.randn(1, 2, 3, 56, 56, generator=rng),
            "image_sizes": torch.tensor([[56, 56]]), "image_attention_mask": torch.ones(1, 2, 4, 4),
        },
    }  # fmt: skip
    for family, inputs in cases.items():
        model = tiny_random_model(family, (IMAGE_TEXT | CAUSAL)[family])
        before = model(**inputs).logits
        pa.patch(model, random_bank(model))
        for tasks in ({}, {"task_ids": [None]}):
            torch.testing.assert_close(model(**inputs, **tasks).logits, before, rtol=0, atol=1e-5)
        assert (model(**inputs, task_ids=["nine"]).logits - before).abs().max() > 0.01
        pa.unpatch(model)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("tiny", ["qwen2_vl"], indirect=True)
def test_a_prompt_with_an_image_is_not_truncated(tiny: Any) -> None:
    """The pixels of what is cut off would be those of the next image."""
    pa.patch(tiny, random_bank(tiny))
    inputs = inputs_with_an_image(tiny)
    with pytest.raises(pa.UnsupportedModel, match="text alone, got image_grid_thw, pixel_values"):
        tiny.generate(**inputs, task_ids=["nine"], truncation=True, max_new_tokens=2)


@pytest.mark.parametrize("tiny", ["llava"], indirect=True)
def test_a_text_that_stands_for_an_image_is_no_prefix(tiny: Any) -> None:
    token = tiny.config.image_token_id
    with pytest.raises(pa.IncompatiblePrefix, match=f"text alone, got the token {token}"):
        pa.PrefixBank.for_model(tiny).add_text("x", lambda *_, **__: {"input_ids": [5, token, 6]}, "text", tiny)


def test_what_a_model_remembers_of_its_last_batch_is_left_to_it() -> None:
    """qwen's omni models write it in every pass, also in those that a bank and a patch make."""
    model = tiny_random_model("qwen2_5_omni_thinker", IMAGE_TEXT["qwen2_5_omni_thinker"])
    model.rope_deltas = remembered = torch.tensor([[7]])
    bank = random_bank(model)
    pa.patch(model, bank, verify=True)
    bank.add_text("x", lambda *_, **__: {"input_ids": [5, 6]}, "text", model)
    assert model.rope_deltas is remembered


def test_a_text_that_looks_both_ways_is_refused() -> None:
    model = tiny_random_model("paligemma", IMAGE_TEXT["paligemma"])
    with pytest.raises(pa.UnsupportedModel, match="looks at later tokens too"):
        pa.patch(model, random_bank(model))


@pytest.mark.parametrize("tiny", ["qwen2_vl"], indirect=True)
@torch.no_grad()
def test_patching_a_model_that_remembers_another_batch(tiny: Any) -> None:
    """qwen2_vl keeps the offsets of its last sequences' positions, and uses them when it is given none."""
    inputs = inputs_with_an_image(tiny)
    bank = random_bank(tiny)
    expected = pa.patch(copy.deepcopy(tiny), bank)(**inputs, task_ids=["nine"]).logits
    tiny.generate(torch.randint(3, 90, (3, 5)), max_new_tokens=2)
    pa.patch(tiny, bank)
    torch.testing.assert_close(tiny(**inputs, task_ids=["nine"]).logits, expected)
