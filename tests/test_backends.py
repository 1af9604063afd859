"""One suite for every backend: the formula in float64 is the oracle of them all."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import prefix_attn as pa
from prefix_attn.backends import flash_attn, reference
from prefix_attn.backends.by_task import readers_of
from prefix_attn.checks import checked_call
from prefix_attn.regime import Regime, use_decode
from prefix_attn.types import AttentionCall
from tests import flash_attn_stand_in
from tests.cases import CASES, DECODE, DIFFERENTIABLE, PREFILL, Case, Inputs, make, poisoned
from tests.tolerance import GRADIENT, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(inputs: Inputs, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, everything in ``dtype``."""
    return reference.attend(checked_call(*inputs.args, **inputs.options), dtype)


class BackendSuite:
    """What each backend inherits; a subclass names it and says what it leaves out."""

    name: str
    differentiable = DIFFERENTIABLE
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def run(self, inputs: Inputs, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"return_lse": True} | options
        return pa.prefix_attention(*inputs.args, **inputs.options, backend=self.name, **options)

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
    def test_equals_the_formula(self, case: Case) -> None:
        everywhere = case in (DECODE, PREFILL) or (DEVICE == "cuda" and self.name == "triton")
        for dtype in self.dtypes if everywhere else self.dtypes[:1]:
            inputs = make(case, dtype, DEVICE)
            out, lse = self.run(inputs)
            assert out.dtype == dtype
            assert lse.dtype == torch.promote_types(dtype, torch.float32)
            exact, eager = oracle(inputs), oracle(inputs, dtype)
            assert_close("out", out, eager[0], exact[0])
            assert_close("lse", lse, eager[1], exact[1])

    @pytest.mark.parametrize("case", [c for c in CASES if len(c.task_ids) < 20], ids=lambda c: c.name)
    def test_reads_nothing_it_should_not(self, case: Case) -> None:
        inputs = make(case, device=DEVICE)
        out, lse = self.run(inputs)
        again, lse_again = self.run(poisoned(inputs))
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)

    @pytest.mark.parametrize("case", [c for c in CASES if len(c.task_ids) < 20], ids=lambda c: c.name)
    def test_a_row_alone_gives_the_same(self, case: Case) -> None:
        inputs = make(case, device=DEVICE)
        out, lse = self.run(inputs)
        for b in range(len(case.task_ids)):
            out_alone, lse_alone = self.run(inputs.rows([b]))
            torch.testing.assert_close(out[[b]], out_alone, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(lse[[b]], lse_alone, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("case", [
        *(c for c in CASES if c.name in ("decode", "prefill", "relative_bias_right_padding")),
        Case("long", prefix_lens=(5, 150, 333), kv_len=300)], ids=lambda c: c.name)  # fmt: skip
    def test_batch_invariant_bits(self, case: Case) -> None:
        inputs = make(case, device=DEVICE)
        out, _ = self.run(inputs, batch_invariant=True)
        torch.testing.assert_close(out, self.run(inputs)[0], rtol=1e-5, atol=1e-5)
        for rows in ([0], [3, 1], [1, 0, 2, 1, 3]):
            assert torch.equal(self.run(inputs.rows(rows), batch_invariant=True)[0], out[rows])

    @pytest.mark.parametrize("case", [
        DECODE, PREFILL, Case("no_prefix", task_ids=(-1, 1), q_len=13), Case("second_part", kv_len=260)],
        ids=lambda c: c.name)  # fmt: skip
    @pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum, in NumPy
    @pytest.mark.parametrize("of", ["a query", "own keys"])
    def test_nan_is_not_swallowed(self, case: Case, of: str) -> None:
        """Where all scores of a part are NaN, too: its other parts are not the answer."""
        inputs = make(case, device=DEVICE)
        if of == "a query":
            inputs.q[0, :, -1] = float("nan")
        else:
            inputs.k[0, :, case.kv_len // 256 * 256 :] = float("nan")
        for x, expected in zip(self.run(inputs), oracle(inputs, torch.float32), strict=True):
            assert expected.isnan().any()
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize("case", [
        Case("decode", reach=20), Case("prefill", reach=20, q_len=13), Case("cut", reach=20, window=18),
        Case("long", reach=20, q_len=13, prefix_lens=(70, 0, 90), starts=(0, 3, 0, 5)),
        Case("not_causal", reach=20, q_len=13, causal=False)], ids=lambda c: c.name)  # fmt: skip
    @pytest.mark.parametrize("far", [10, 20, 41])
    def test_a_relative_bias_may_hide_keys(self, case: Case, far: int) -> None:
        """By -inf at far distances, at all of a prefix's, and at all; for the last two heads only."""
        inputs = make(case, device=DEVICE)
        inputs.options["relative_bias"][2:, :far] = float("-inf")
        exact, eager = oracle(inputs), oracle(inputs, torch.float32)
        for x, rounded, expected in zip(self.run(inputs), eager, exact, strict=True):
            assert_close("out and lse", x, rounded, expected)

    @pytest.mark.parametrize("case", [
        Case("decode", sinks=True), Case("prefill", sinks=True, q_len=13, starts=(0, 3, 12, 13)),
        Case("nothing_visible", sinks=True, task_ids=(-1, 1, 0, -1), ends=(0, 0, 0, 5))],
        ids=lambda c: c.name)  # fmt: skip
    def test_a_sink_of_minus_infinity_is_none(self, case: Case) -> None:
        inputs = make(case, device=DEVICE)
        without = replace(inputs, options=inputs.options | {"sinks": None})
        inputs.options["sinks"][:] = float("-inf")
        exact, eager = oracle(without), oracle(without, torch.float32)
        for x, rounded, expected in zip(self.run(inputs), eager, exact, strict=True):
            assert_close("out and lse", x, rounded, expected)

    @pytest.mark.parametrize("case", [
        Case("decode", reach=9), Case("reordered", task_ids=(0, 2, 0, 2), sinks=True),
        Case("in_order", task_ids=(0, 2, 2, 2), reach=9, prefix_lens=(70, 0, 90), q_len=13)],
        ids=lambda c: c.name)  # fmt: skip
    def test_the_default_device_does_not_matter(self, case: Case) -> None:
        """Nor is what a call leaves in a cache on it."""
        readers_of.cache_clear()
        inputs = make(case, device=DEVICE)
        with torch.device("meta"):
            inside = self.run(inputs)
        listed = replace(inputs, task_ids=inputs.task_ids.tolist())
        with torch.device("meta"):
            of_list = self.run(listed)
        for x, y, expected in zip(inside, of_list, self.run(inputs), strict=True):
            assert torch.equal(x, expected)
            assert torch.equal(y, expected)

    def test_empty_batch_and_no_queries(self) -> None:
        for rows, queries in ((slice(0, 0), slice(None)), (slice(None), slice(0, 0))):
            inputs = make(PREFILL, device=DEVICE)
            empty = Inputs(inputs.q[rows, :, queries], inputs.k[rows], inputs.v[rows], inputs.prefix,
                           inputs.task_ids[rows], inputs.options)  # fmt: skip
            out, lse = self.run(empty)
            assert out.shape == empty.q.shape
            assert lse.shape == empty.q.shape[:3]

    @pytest.mark.parametrize("case", [c for c in CASES if c.name in (
        "decode", "prefill", "left_padding_prefill", "softcap_prefill", "sinks_prefill", "not_causal", "mqa",
        "elements_apart", "elements_apart_prefill", "negative_scale", "relative_bias_prefill",
        "relative_bias_and_all_else")], ids=lambda c: c.name)  # fmt: skip
    @pytest.mark.parametrize("with_lse", [False, True])
    def test_gradients(self, case: Case, with_lse: bool) -> None:
        def gradients(dtype: torch.dtype, backend: bool, seed: int) -> dict[str, torch.Tensor]:
            inputs, leaves = make(case, device=DEVICE, seed=seed).requiring_grad(dtype, self.differentiable)
            if not backend:
                out, lse = oracle(inputs, dtype)
            elif with_lse:
                out, lse = self.run(inputs)
            else:
                out = self.run(inputs, return_lse=False)
            loss = (out * torch.linspace(-1, 1, out.shape[-1], dtype=dtype, device=DEVICE)).sum()
            if with_lse:
                loss = loss + lse.masked_fill(lse.isinf(), 0.0).square().sum()
            return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

        runs = [
            [gradients(dtype, backend, seed) for seed in range(8)]  # a largest error over few numbers is noise
            for dtype, backend in ((torch.float32, True), (torch.float32, False), (torch.float64, False))
        ]
        for name in runs[0][0]:
            x, eager, exact = (torch.stack([grads[name] for grads in run]) for run in runs)
            assert_close(f"gradient of {name}", x, eager, exact, GRADIENT)


class ForwardOnlySuite(BackendSuite):
    """Of a backend that refuses whatever needs a gradient."""

    @pytest.mark.parametrize("case", [DECODE], ids=lambda c: c.name)
    @pytest.mark.parametrize("with_lse", [False])
    def test_gradients(self, case: Case, with_lse: bool) -> None:
        with pytest.raises(pa.BackendUnavailable, match="has no backward"):
            self.run(make(case).requiring_grad()[0])


class TestReference(BackendSuite):
    name = "reference"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class TestTorch(BackendSuite):
    name = "torch"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    @pytest.mark.parametrize("copied_below", [0, 10**9])
    def test_sharing_and_copying_give_the_same(self, monkeypatch: pytest.MonkeyPatch, copied_below: int) -> None:
        """Both ways are right for every call, whichever the rule would take."""
        from prefix_attn.backends import torch_sdpa

        if DEVICE != "cpu":
            pytest.skip("the shared way is the CPU's")
        monkeypatch.setattr(torch_sdpa, "COPIED_BELOW", copied_below)
        if copied_below:
            monkeypatch.setattr(torch_sdpa._Batch, "window_cuts_prefixes", lambda *_: True)
        for case in CASES:
            inputs = make(case)
            exact, eager = oracle(inputs), oracle(inputs, torch.float32)
            assert_close(case.name, self.run(inputs)[0], eager[0], exact[0])

    @pytest.mark.parametrize("far", [10, 20, 41])
    def test_gradients_where_a_relative_bias_hides_keys(self, far: int) -> None:
        for case in (Case("decode", reach=20), Case("prefill", reach=20, q_len=13, prefix_lens=(70, 0, 90))):
            inputs, leaves = make(case, device=DEVICE).requiring_grad(torch.float64, names=["q", "k", "prefix.v"])
            inputs.options["relative_bias"][2:, :far] = float("-inf")
            found, exact = (
                torch.autograd.grad((out * torch.linspace(-1, 1, 16, device=DEVICE)).sum(), list(leaves.values()))
                for out in (self.run(inputs)[0], oracle(inputs)[0])
            )
            for name, x, expected in zip(leaves, found, exact, strict=True):
                assert_close(f"gradient of {name}", x, expected, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="its kernel runs on CPUs, and the suite's tensors are on a GPU")
class TestCpu(ForwardOnlySuite):
    name = "cpu"

    def run(self, inputs: Inputs, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Of elements apart it takes only those of queries."""
        if inputs.k.stride(3) != 1:
            with pytest.raises(pa.BackendUnavailable, match="contiguous"):
                super().run(inputs, **options)
            prefix = replace(inputs.prefix, k=inputs.prefix.k.contiguous(), v=inputs.prefix.v.contiguous())
            inputs = replace(inputs, k=inputs.k.contiguous(), v=inputs.v.contiguous(), prefix=prefix)
        return super().run(inputs, **options)

    @pytest.mark.parametrize(
        ("case", "dtype", "why"),
        [
            (DECODE, torch.float64, "float64"),
            (replace(DECODE, head_dim=300), torch.float32, "256"),
            (Case("wide_group", q_heads=300, kv_heads=1), torch.float32, "256 query heads"),
        ],
        ids=["float64", "head_dim", "group"],
    )
    def test_refusals(self, case: Case, dtype: torch.dtype, why: str) -> None:
        with pytest.raises(pa.PrefixAttnError, match=why):
            self.run(make(case, dtype))

    @pytest.mark.parametrize("head_dim", [1, 5, 24, 80, 256])
    def test_any_head_dim(self, head_dim: int) -> None:
        for case in (
            DECODE,
            Case("many_queries", q_heads=20, q_len=3, kv_len=270, prefix_lens=(7, 0, 520)),
            Case("long_prefill", q_len=300, kv_len=300, prefix_lens=(7, 0, 520), starts=(0, 10, 299, 300)),
        ):
            inputs = make(replace(case, head_dim=head_dim))
            exact, eager = oracle(inputs), oracle(inputs, torch.float32)
            assert_close("out", self.run(inputs)[0], eager[0], exact[0])

    @pytest.mark.parametrize("slot", [23, 267])
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_a_value_reaches_only_rows_whose_window_has_it(self, slot: int, value: float) -> None:
        """Though rows that it is hidden from read the same prefix: 0 times infinity is NaN."""
        m = slot + 17
        case = Case("", prefix_lens=(m,), task_ids=(0, 0, 0), window=20, ends=(13, 2, 12))
        inputs = make(case)
        expected = self.run(inputs)
        inputs.prefix.v[:, slot] = value
        out, lse = self.run(inputs)
        assert not out[1].isfinite().any()
        for x, before in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(x[::2], before[::2], rtol=1e-5, atol=1e-5)


class TestCpuInLanes(TestCpu):
    """Queries in SIMD lanes, however few they are."""

    def run(self, inputs: Inputs, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return super().run(inputs, **options | {"batch_invariant": True})


class TestFlashAttn(ForwardOnlySuite):
    """Its packing and merging, over functions that do what flash-attn's documentation says; those in float32 too."""

    name = "flash_attn"

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if DEVICE != "cpu":
            pytest.skip("the functions stand in on the CPU; tests/gpu/test_flash_attn.py runs the package's own")
        monkeypatch.setattr(flash_attn, "unavailable", lambda device: None)
        monkeypatch.setattr(flash_attn, "package", lambda: flash_attn_stand_in)
        monkeypatch.setattr(flash_attn, "DTYPES", (torch.float32, torch.bfloat16, torch.float16))

    def run(self, inputs: Inputs, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        refused = flash_attn.refusal(checked_call(*inputs.args, **inputs.options))
        if refused is not None and any(x in refused for x in ("window", "relative_bias", "positive scale")):
            with pytest.raises(pa.BackendUnavailable, match="backend='flash_attn' cannot run this call"):
                super().run(inputs, **options)
            pytest.skip(f"refused: {refused}")
        return super().run(inputs, **options)

    @pytest.mark.parametrize("case", [DECODE], ids=lambda c: c.name)
    def test_batch_invariant_bits(self, case: Case) -> None:
        with pytest.raises(pa.BackendUnavailable, match="bits depend on the batch"):
            self.run(make(case), batch_invariant=True)

    @pytest.mark.parametrize(
        ("case", "dtype", "why"),
        [
            (DECODE, torch.float64, "float64"),
            (replace(DECODE, head_dim=20), torch.float32, "multiples of 8"),
        ],
        ids=["float64", "head_dim"],
    )
    def test_refusals(self, case: Case, dtype: torch.dtype, why: str) -> None:
        with pytest.raises(pa.BackendUnavailable, match=why):
            self.run(make(case, dtype))

    def test_what_max_len_says_is_not_relied_on(self) -> None:
        inputs = make(DECODE)
        window = max(m for _, m in inputs.prefix.spans) + inputs.k.shape[2] - 1
        with pytest.raises(pa.BackendUnavailable, match=f"a window of {window} tokens may cut prefixes"):
            pa.prefix_attention(*inputs.args[:3], replace(inputs.prefix, max_len=1), inputs.task_ids, window=window,
                                backend=self.name)  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU; tests/gpu/test_flash_attn.py says what it needs there")
def test_flash_attn_says_what_is_missing() -> None:
    with pytest.raises(pa.BackendUnavailable, match="flash-attn runs on GPUs, not on 'cpu'"):
        pa.prefix_attention(*make(DECODE, torch.bfloat16).args, backend="flash_attn")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: there are no kernels to run")
class TestTriton(BackendSuite):
    name = "triton"
    differentiable = tuple(name for name in DIFFERENTIABLE if name != "relative_bias")

    @pytest.mark.parametrize("case", [c for c in CASES if c.name in (
        "decode", "sinks_prefill", "relative_bias_and_all_else")], ids=lambda c: c.name)  # fmt: skip
    @pytest.mark.parametrize("with_lse", [False, True])
    def test_gradients(self, case: Case, with_lse: bool) -> None:
        """Fewer cases than elsewhere; tests/kernels/test_backward.py has the others."""
        super().test_gradients(case, with_lse)

    def test_the_gradient_of_a_relative_bias_is_left_to_torch(self) -> None:
        inputs, _ = make(replace(DECODE, reach=4), device=DEVICE).requiring_grad(names=["relative_bias"])
        with pytest.raises(pa.BackendUnavailable, match="relative_bias"):
            self.run(inputs)
        with torch.no_grad():
            self.run(inputs)
        table = inputs.options["relative_bias"]
        with pytest.raises(pa.BackendUnavailable, match="relative_bias"):
            torch.vmap(lambda t: self.run(replace(inputs, options=inputs.options | {"relative_bias": t}))[0])(
                torch.stack([table, table])
            )


class TestTritonGrouped(TestTriton):
    """Every decode call made grouped, which by shapes alone none of the suite's would be."""

    @pytest.fixture(autouse=True)
    def grouped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from prefix_attn.backends import triton

        def choose(call: AttentionCall) -> Regime:
            if not use_decode(call.q_len, call.group) or call.q_len > 8:
                pytest.skip("more than a handful of queries a row")
            return Regime("grouped", "forced")

        monkeypatch.setattr(triton, "choose_regime", choose)

    @pytest.mark.parametrize("case", [DECODE], ids=lambda c: c.name)
    @pytest.mark.parametrize("with_lse", [True])
    def test_gradients(self, case: Case, with_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The backward kernels are the same for every regime: out and lse, which they get, differ by roundings."""
        from prefix_attn.backends import triton

        found = []
        for regime in ("grouped", "inline"):
            monkeypatch.setattr(triton, "choose_regime", lambda call, name=regime: Regime(name, "forced"))
            inputs, leaves = make(case, device=DEVICE).requiring_grad()
            out, lse = self.run(inputs)
            found.append(torch.autograd.grad(out.square().sum() + lse.square().sum(), list(leaves.values())))
        for grouped, inline in zip(*found, strict=True):
            torch.testing.assert_close(grouped, inline, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("case", [c for c in CASES if c.name in (
        "decode", "few_queries", "sinks_nothing_visible", "static_cache_padded", "window_cuts_prefix")],
        ids=lambda c: c.name)  # fmt: skip
    def test_a_row_alone_gives_the_same(self, case: Case) -> None:
        """Fewer cases than elsewhere: the interpreter is slow."""
        super().test_a_row_alone_gives_the_same(case)

    @pytest.mark.parametrize("case", [DECODE], ids=lambda c: c.name)
    def test_batch_invariant_bits(self, case: Case) -> None:
        """Grouping is not for this mode."""
        from prefix_attn import regime

        inputs = make(case, device=DEVICE)
        call = checked_call(*inputs.args, **inputs.options, batch_invariant=True)
        assert regime.choose(call).name == "inline"
