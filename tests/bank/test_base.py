"""What is read off a model: geometry, context, fingerprint; and the models that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prefix_attn import IncompatiblePrefix, UnsupportedModel
from prefix_attn.bank import PrefixBank
from prefix_attn.bank.base import Base
from prefix_attn.bank.config import context_limit, setting
from prefix_attn.bank.fingerprint import config_digest, weights_digest
from prefix_attn.bank.geometry import DECODER, Geometry, LayerGeometry
from prefix_attn.bank.window import SlidingWindow
from tests.bank.models import FAMILIES, tiny
from tests.hf.shrink import tiny_random_model

SHAPES = {
    "llama": [(2, 8), (2, 8)],
    "mistral": [(2, 8), (2, 8)],
    "gpt2": [(4, 8), (4, 8)],
    "gemma3_text": [(2, 16), (2, 16)],
    "gemma4_text": [(2, 8), (2, 16)],
    "opt": [(4, 8), (4, 8)],
    "bloom": [(4, 8), (4, 8)],
    "falcon": [(1, 8), (1, 8)],
    "gpt_bigcode": [(1, 8), (1, 8)],
    "gpt_neox": [(4, 8), (4, 8)],
    "mpt": [(4, 8), (4, 8)],
}


# transformers 5.17 compiles a function of GPT-BigCode with TorchScript, which torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", SHAPES)
def test_geometry(family: str) -> None:
    changes = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gpt_neox": {"intermediate_size": 48}}.get(family, {})
    base = Base.of(tiny(family, **changes))
    assert [layer[:2] for layer in base.geometry.layers] == SHAPES[family]
    assert base.context_limit == 64
    assert base.model_type == family
    assert Geometry.from_json(base.geometry.to_json()) == base.geometry


def test_the_body_of_a_model() -> None:
    model = tiny()
    assert Base.of(model.model).geometry == Base.of(model).geometry


def test_logits_are_not_computed() -> None:
    """For a long text they would be the largest tensor of all."""
    model = tiny()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the language-model head ran"))
    PrefixBank.for_model(model)


#: model_type -> what each layer keeps: nothing where it is convolutional or reads another's keys; latents.
KEPT = {
    "lfm2": [(0, 0, 0), (2, 8, 8), (0, 0, 0)],
    "gemma3n_text": [(2, 16, 16)] * 3 + [(0, 0, 0)] * 2,
    "deepseek_v3": [(1, 16, 8)] * 2,
}


@pytest.mark.parametrize("family", KEPT)
def test_layers_that_keep_something_else(family: str) -> None:
    bank = PrefixBank.for_model(tiny_random_model(family))
    layers = [tuple(layer) for layer in bank.geometry.layers]
    assert layers == KEPT[family][: len(layers)]
    assert not any(heads for heads, _, _ in KEPT[family][len(layers) :])  # 5.17 leaves them out
    prefix = [
        None if not heads else (torch.randn(heads, 3, dim), torch.randn(heads, 3, v_dim))
        for heads, dim, v_dim in bank.geometry.layers
    ]
    bank.add("task", prefix)
    for given, (k, v) in zip(prefix, bank.key_values("task"), strict=True):
        assert k.shape[1] == v.shape[1] == 3
        assert given is None or (torch.equal(given[0], k) and torch.equal(given[1], v))


@pytest.mark.parametrize(("family", "words"), [
    ("rwkv", "keeps no keys and values"), ("deepseek_v32", "more than a key and a value for each token"),
    ("git", "for an image"), ("prophetnet", "one token at a time"),
])  # fmt: skip
def test_models_without_plain_keys_and_values_are_refused(family: str, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        PrefixBank.for_model(tiny_random_model(family))


def test_what_is_no_loaded_model() -> None:
    with pytest.raises(UnsupportedModel, match="got Linear"):
        PrefixBank.for_model(nn.Linear(2, 2))
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(UnsupportedModel, match="meta device"):
        PrefixBank.for_model(model)


def test_layers_of_different_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [(torch.zeros(2, 1, 8, dtype=dtype),) * 2 for dtype in (torch.float32, torch.float16)]
    monkeypatch.setattr("prefix_attn.bank.base.cached_kv", lambda model, input_ids: layers)
    with pytest.raises(UnsupportedModel, match=r"in one dtype, got torch.float16, torch.float32"):
        PrefixBank.for_model(tiny())


def test_context_limit() -> None:
    class Config:
        max_position_embeddings = -1  # as XLNet writes "none"
        n_positions = 7

    assert context_limit(Config()) == 7
    assert context_limit(object()) is None


def test_settings_that_differ_by_layer() -> None:
    """transformers raises where a config has one value per layer; those are left to names and shapes of weights."""
    config = tiny("gemma4_text").config
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.head_dim
    assert setting(config, "head_dim") is None
    assert setting(config, "nothing") is None
    assert setting(config, "hidden_size") == 32


def test_token_bytes() -> None:
    geometry = Geometry((LayerGeometry(2, 8, 8), LayerGeometry(1, 16, 16)))
    assert geometry.token_bytes(torch.bfloat16) == 2 * (2 * 8 + 16) * 2
    assert str(geometry) == "2 layers of 2 kv heads of 8 or 1 kv heads of 16"


GOLDEN = {
    "llama": "fc2f8a275c0ff161",
    "mistral": "d63d7ce297cef91c",
    "gpt2": "c12a806832eca806",
    "gemma3_text": "2644f809baca4a91",
}


@pytest.mark.parametrize("family", GOLDEN)
def test_config_digest_is_the_same_in_every_version(family: str) -> None:
    """Files of one version of transformers must open under another; a change here orphans all files there are."""
    model = tiny(family)
    assert config_digest(model.config, {DECODER: Geometry((LayerGeometry(2, 8, 8),) * 2)})[:16] == GOLDEN[family]


def test_weights_digest_is_the_same_in_every_version() -> None:
    model = nn.Linear(40, 30)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) / 7)
    assert weights_digest(model)[:16] == "31b3fbe71ba72da4"


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_ignores_dtype_and_derived_buffers(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    expected = Base.of(model).fingerprint
    assert Base.of(model.float()).fingerprint == expected
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name not in saved:
            buffer.mul_(2.0)
    model.register_buffer("count", torch.ones(3, dtype=torch.int64))
    model.register_buffer("more", torch.ones(3), persistent=False)
    assert Base.of(model).fingerprint == expected
    model.register_buffer("weight", torch.ones(3))
    assert Base.of(model).fingerprint != expected


def test_a_buffer_that_is_saved_counts_as_a_weight() -> None:
    """gemma4 scales its layers by one."""
    model = tiny_random_model("gemma4_text")
    bank = PrefixBank.for_model(model)
    bank.check_model(model)
    (scale, *_) = (x for name, x in model.named_buffers() if name.endswith("layer_scalar"))
    scale.mul_(0.5)
    with pytest.raises(IncompatiblePrefix, match="expected the fingerprint"):
        bank.check_model(model)


def test_layers_that_slide_by_any_name() -> None:
    kinds = ["hybrid_full", "hybrid_sliding", "sliding_attention", "full_attention"]
    config = SimpleNamespace(sliding_window=8, layer_types=kinds, num_hidden_layers=4)
    assert SlidingWindow.of(config) == SlidingWindow(8, (1, 2))


def test_weights_digest_sees_weights_names_and_shapes() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model[1].bias[2] += 1
    changed = weights_digest(model)
    assert changed != before
    named = nn.Sequential()
    named.add_module("0", model[0])
    named.add_module("2", model[1])
    assert weights_digest(named) != changed
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert weights_digest(model) != changed


def test_weights_digest_of_odd_tensors() -> None:
    """Transposed, one-byte, empty and scalar parameters."""
    model = nn.Module()
    model.a = nn.Parameter(torch.arange(600.0).reshape(20, 30))
    before = weights_digest(model)
    model.a = nn.Parameter(torch.arange(600.0).reshape(20, 30).t().contiguous().t())
    assert weights_digest(model) == before
    model.b = nn.Parameter(torch.ones(300).to(torch.float8_e4m3fn), requires_grad=False)
    model.c = nn.Parameter(torch.ones(300, dtype=torch.int8), requires_grad=False)
    model.d = nn.Parameter(torch.zeros(0, 3))
    model.e = nn.Parameter(torch.tensor(2.0))
    before = weights_digest(model)
    model.e = nn.Parameter(torch.tensor(3.0))
    assert weights_digest(model) != before


def test_config_digest_sees_rotary_parameters_and_windows() -> None:
    geometry = Base.of(tiny()).geometry
    digests = {
        config_digest(tiny(**changes).config, {DECODER: geometry})
        for changes in (
            {},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"vocab_size": 65},
        )
    }
    assert len(digests) == 5
    windows = {config_digest(tiny("mistral", sliding_window=w).config, {DECODER: geometry}) for w in (4, 8, None)}
    assert len(windows) == 3
    whole_number = tiny(rope_parameters={"rope_type": "default", "rope_theta": 10000})
    assert config_digest(whole_number.config, {DECODER: geometry}) in digests


def test_weights_digest_copies_samples_only() -> None:
    """Neither time nor memory grow with the weights."""
    model = nn.Linear(4096, 4096)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        weights_digest(model)
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.key_averages()) < 1e6
