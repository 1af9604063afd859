"""The operators: what PyTorch is told of them is true, for every backend, and their gradients are the formula's."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import prefix_attn as pa
from prefix_attn import ops
from prefix_attn.backends import reference
from prefix_attn.checks import checked_call
from prefix_attn.plan import row_tiles
from prefix_attn.types import AttentionCall, PerInput
from tests.cases import DECODE, DIFFERENTIABLE, PREFILL, Case, Inputs, make
from tests.test_op import cases
from tests.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: there are no kernels")
BACKENDS = ["torch", "reference", pytest.param("triton", marks=needs_triton)]

#: The fewest arguments, and all of them.
PLAIN = Case("plain", task_ids=(2, -1), q_heads=2, kv_heads=1, kv_len=20)
FULL = Case("full", task_ids=(2, -1), q_heads=2, kv_heads=1, kv_len=20, q_len=5, starts=(0, 2), ends=(20, 19),
            window=9, softcap=5.0, sinks=True, strided=True, reach=6)  # fmt: skip


def differentiable(backend: str) -> list[str]:
    """The kernels have no gradient of relative_bias."""
    return [name for name in DIFFERENTIABLE if backend != "triton" or name != "relative_bias"]


def arguments(operator: Any, call: AttentionCall, backend: str, **others: Any) -> tuple[Any, ...]:
    """A call as an operator takes it."""
    prefix, (planned, tasks, members) = call.prefix, call.tiles or (None, None, None)
    values = vars(call) | {
        "prefix_k": prefix.k, "prefix_v": prefix.v, "starts": prefix.starts, "lens": prefix.lens, "planned": planned,
        "tasks": tasks, "members": members, "max_len": prefix.expected_max_len, "backend": backend, **others,
    }  # fmt: skip
    return tuple(values[argument.name] for argument in operator._schema.arguments)


def forward_call(case: Case, requires_grad: list[str], **options: Any) -> AttentionCall:
    inputs, _ = make(case, device=DEVICE).requiring_grad(names=requires_grad)
    return checked_call(*inputs.args, **inputs.options, **options)


@pytest.mark.parametrize(("case", "return_lse"), [(PLAIN, False), (FULL, True)], ids=["plain", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, case: Case, return_lse: bool) -> None:
    forward = torch.ops.prefix_attn.attention.default
    call = forward_call(case, differentiable(backend), return_lse=return_lse)
    torch.library.opcheck(forward, arguments(forward, call, backend))
    if backend == "triton":
        tiles = row_tiles(call.task_ids, call.prefix.lens, call.q_len * call.group)
        torch.library.opcheck(forward, arguments(forward, replace(call, tiles=tiles), backend))


@pytest.mark.skipif(DEVICE != "cpu", reason="the backend cpu refuses tensors on a GPU")
@pytest.mark.parametrize(("case", "return_lse"), [(PLAIN, False), (FULL, True)], ids=["plain", "full"])
def test_opcheck_of_a_backend_without_gradients(case: Case, return_lse: bool) -> None:
    forward = torch.ops.prefix_attn.attention.default
    call = forward_call(case, requires_grad=[], return_lse=return_lse)
    torch.library.opcheck(forward, arguments(forward, call, "cpu"))


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward(backend: str, case: Case) -> None:
    operator = torch.ops.prefix_attn.attention_backward.default
    call = forward_call(case, requires_grad=[], return_lse=True)
    out, lse = ops.attention(call, backend)
    of_bias = case.reach is not None and "relative_bias" in differentiable(backend)
    everything, bank = [True] * 5 + [case.sinks, of_bias], [False] * 3 + [True] * 2 + [False] * 2
    for needed, grad_lse in ((everything, lse.nan_to_num(neginf=0.0)), (bank, None)):
        given = {"grad_out": out, "grad_lse": grad_lse, "out": out, "lse": lse, "needed": needed}
        torch.library.opcheck(operator, arguments(operator, call, backend, **given))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_gradients_of_any_call_equal_the_formulas(case: Case) -> None:
    """In float64, by autograd through the formula; the written backward is no part of it."""
    grads = []
    for backend in ("torch", "reference", None):
        inputs, leaves = make(case).requiring_grad(torch.float64)
        if backend is None:
            out = reference.attend(checked_call(*inputs.args, **inputs.options), torch.float64)[0]
        else:
            out = pa.prefix_attention(*inputs.args, **inputs.options, backend=backend)
        loss = (out * torch.linspace(-1, 1, out.shape[-1])).sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, *found, exact in zip(leaves, *grads, strict=True):
        for x in found:
            assert_close(f"gradient of {name}", x, exact, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_minus_infinity_has_no_gradient(backend: str) -> None:
    """And takes none from the others; a head without a sink and a row that sees nothing among them."""
    case = Case("", task_ids=(-1, 0), ends=(0, 13), sinks=True)
    inputs, leaves = make(case, device=DEVICE).requiring_grad()
    with torch.no_grad():
        leaves["sinks"][:2] = float("-inf")
    out = pa.prefix_attention(*inputs.args, **inputs.options, backend=backend)
    grads = dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["sinks"][:2].any()
    assert grads["sinks"][2:].all()


def test_only_what_is_needed_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(PREFILL, device=DEVICE)
    inputs.k.requires_grad_()
    wanted: list[Any] = []
    backward = reference.backward

    def spy(*args: Any) -> Any:
        wanted.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(reference, "backward", spy)
    pa.prefix_attention(*inputs.args, backend="reference").sum().backward()  # type: ignore[union-attr]
    assert wanted == [PerInput(*(name == "k" for name in PerInput._fields))]
    assert inputs.k.grad is not None


def test_second_derivatives_are_refused() -> None:
    inputs, leaves = make(PREFILL, device=DEVICE).requiring_grad()
    out = pa.prefix_attention(*inputs.args, backend="torch")
    assert isinstance(out, torch.Tensor)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(pa.BackendUnavailable, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """Inputs come in the precision that is wanted; a backend's own products are its business."""

    def results(autocast: bool, requires_grad: bool) -> list[torch.Tensor]:
        names = differentiable(backend) if requires_grad else []
        inputs, leaves = make(replace(FULL, reach=None), dtype, DEVICE).requiring_grad(dtype, names)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out, lse = pa.prefix_attention(*inputs.args, **inputs.options, return_lse=True, backend=backend)
            assert (out.dtype, lse.dtype) == (dtype, torch.float32)
            if not requires_grad:
                return [out, lse]
            ones = torch.ones_like(out), torch.ones_like(lse)
            given = [leaves[name] for name in names if name in leaves]
            return [out, lse, *torch.autograd.grad([out, lse], given, ones)]

    for requires_grad in (False, True):
        for with_it, without in zip(*(results(x, requires_grad) for x in (True, False)), strict=True):
            assert torch.equal(with_it, without)


def dual(attend: Any, q: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return attend(forward_ad.make_dual(q, q))


def dual_of_a_gradient(attend: Any, q: torch.Tensor) -> Any:
    out = attend(q.requires_grad_())
    with forward_ad.dual_level():
        return torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), out.detach()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own, in its first jvp
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "derive",
    [
        lambda attend, q: torch.func.jvp(attend, (q,), (q,)),
        lambda attend, q: torch.func.jacfwd(attend)(q),
        lambda attend, q: torch.func.linearize(attend, q),
        lambda attend, q: torch.func.jvp(torch.vmap(attend), (q[None],), (q[None],)),
        lambda attend, q: torch.func.hessian(lambda q: attend(q).sum())(q),
        dual,
        dual_of_a_gradient,
    ],
    ids=["jvp", "jacfwd", "linearize", "jvp_of_vmap", "hessian", "dual", "dual_of_a_gradient"],
)
def test_forward_mode_is_refused(derive: Any, backend: str) -> None:
    inputs = make(PREFILL, device=DEVICE)
    with pytest.raises(pa.BackendUnavailable, match="not differentiable in forward mode"):
        derive(lambda q: pa.prefix_attention(q, *inputs.args[1:], backend=backend), inputs.q)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own, in its first jvp
def test_forward_mode_may_pass_by() -> None:
    """Where attention has no part in what is differentiated."""
    inputs = make(PREFILL, device=DEVICE)
    out = pa.prefix_attention(*inputs.args)
    _, tangent = torch.func.jvp(lambda x: x * pa.prefix_attention(*inputs.args), (inputs.q,), (inputs.q,))
    torch.testing.assert_close(tangent, inputs.q * out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of any operator that is mapped
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_reverse_mode_transforms(backend: str) -> None:
    """Gradients by torch.func are autograd's, also of mapped and by mapped functions."""
    inputs = make(DECODE, device=DEVICE)

    def attend(q: torch.Tensor) -> torch.Tensor:
        out = pa.prefix_attention(q, *inputs.args[1:], backend=backend)
        assert isinstance(out, torch.Tensor)
        return out

    def losses(q: torch.Tensor) -> torch.Tensor:
        return attend(q).square().sum((2, 3)).sum(0)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return losses(q).sum()

    both = torch.stack([inputs.q, 2 * inputs.q]).requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(q) for q in both), both)  # type: ignore[arg-type]
    found = {"vmap": torch.autograd.grad(torch.vmap(loss)(both).sum(), both)[0]}
    both = both.detach()
    found |= {
        "grad": torch.stack([torch.func.grad(loss)(q) for q in both]),
        "vmap(grad)": torch.vmap(torch.func.grad(loss))(both),
        "grad(vmap)": torch.func.grad(lambda both: torch.vmap(loss)(both).sum())(both),
        "jacrev": torch.stack([torch.func.jacrev(losses)(q).sum(0) for q in both]),
    }
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(pa.BackendUnavailable, match="differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(inputs.q)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_out_has_the_layout_of_q(backend: str) -> None:
    for strided in (False, True):
        inputs = make(replace(PREFILL, strided=strided), device=DEVICE)
        out = pa.prefix_attention(*inputs.args, **inputs.options, backend=backend)
        assert isinstance(out, torch.Tensor)
        assert out.stride() == inputs.q.stride()


def test_values_are_checked_in_a_compiled_call() -> None:
    """A compiler does not see task ids; on a CPU a wrong one is still an error, and costs no graph."""
    inputs = make(PREFILL)
    compiled = torch.compile(lambda ids: pa.prefix_attention(*inputs.args[:4], ids), backend="eager", fullgraph=True)
    for ids in ([0, 1, 2, -1], [2, 2, 2, 2]):
        expected = pa.prefix_attention(*inputs.args[:4], ids)
        assert torch.equal(compiled(torch.tensor(ids, dtype=torch.int32)), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for wrong in (3, -2):
            with pytest.raises(pa.UnknownTask, match=r"task_ids\[1\]"):
                compiled(torch.tensor([0, wrong, 1, -1], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step_compiles(backend: str) -> None:
    """Forward and backward as one graph each, with the eager gradients."""

    def gradients(function: Any) -> list[torch.Tensor]:
        inputs, leaves = make(FULL).requiring_grad(names=differentiable(backend))
        return list(torch.autograd.grad(function(inputs), list(leaves.values())))

    def loss(inputs: Inputs) -> torch.Tensor:
        out, lse = pa.prefix_attention(*inputs.args, **inputs.options, return_lse=True, backend=backend)
        return out.square().sum() + lse.nan_to_num(neginf=0.0).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.15: under vmap it runs once for each
def test_whoever_watches_sees_the_operator() -> None:
    """In plain eager mode a call goes to its backend directly; a mode, a profiler and a transform get the operator."""
    x = make(PREFILL)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    direct = pa.prefix_attention(*x.args)
    with Watch():
        watched = pa.prefix_attention(*x.args)
    assert "prefix_attn.attention.default" in seen
    assert torch.equal(direct, watched)
    with torch.profiler.profile() as profile:
        pa.prefix_attention(*x.args)
    assert "prefix_attn::attention" in {event.key for event in profile.key_averages()}
    mapped = torch.vmap(lambda q: pa.prefix_attention(q, *x.args[1:]))(torch.stack([x.q, 2 * x.q]))
    for out, scale in zip(mapped, (1, 2), strict=True):
        assert torch.equal(out, pa.prefix_attention(scale * x.q, *x.args[1:]))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_negated_views(backend: str) -> None:
    """`x.conj().imag` is a view of memory that holds ``-x``."""
    inputs = make(replace(FULL, strided=False, q_len=1), device=DEVICE)

    def negated(x: torch.Tensor) -> torch.Tensor:
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        return view

    expected = pa.prefix_attention(*inputs.args, **inputs.options, backend=backend)
    for name in DIFFERENTIABLE:
        tensors = {n: x for n in DIFFERENTIABLE if (x := inputs.tensor(n)) is not None}
        tensors[name] = negated(tensors[name])
        prefix = replace(inputs.prefix, k=tensors["prefix.k"], v=tensors["prefix.v"])
        options = inputs.options | {n: tensors[n] for n in ("sinks", "relative_bias")}
        args = tensors["q"], tensors["k"], tensors["v"], prefix, inputs.task_ids
        torch.testing.assert_close(pa.prefix_attention(*args, **options, backend=backend), expected)


@pytest.mark.parametrize("name", ["sinks", "kv_len", "task_ids"])
def test_fake_tensors_make_fake_results(name: str) -> None:
    inputs = make(FULL)
    arguments = dict(zip(("q", "k", "v", "prefix", "task_ids"), inputs.args, strict=True)) | inputs.options
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(arguments[name])
    assert isinstance(pa.prefix_attention(**arguments | {name: fake}), FakeTensor)


def test_tensors_without_memory_have_results_without() -> None:
    x = make(replace(PREFILL, strided=True))
    q, k, v, pk, pv, starts, lens = (
        t.to("meta") for t in (x.q, x.k, x.v, x.prefix.k, x.prefix.v, x.prefix.starts, x.prefix.lens)
    )
    for backend in ("auto", "torch", "reference"):
        out = pa.prefix_attention(q, k, v, pa.PrefixKV(pk, pv, starts, lens), x.task_ids, backend=backend)
        assert isinstance(out, torch.Tensor)
        assert out.is_meta
        assert (out.shape, out.stride()) == (x.q.shape, x.q.stride())


def test_a_dynamic_head_dim_compiles() -> None:
    compiled = torch.compile(pa.prefix_attention, backend="eager", fullgraph=True, dynamic=True)
    for head_dim in (16, 24):
        inputs = make(Case("", head_dim=head_dim), device=DEVICE)
        assert torch.equal(compiled(*inputs.args), pa.prefix_attention(*inputs.args))
