"""The quantizer's inner loops: against float64 numpy that searches by trying, exact cases, and native against torch."""

import numpy as np
import pytest
import torch
from encode_groups import Group, every_function, exact_group, slow_descent, slow_feedback, slow_search
from oracles import same_bits
from torch import Tensor

from exl_runtime.ops import encode, native
from exl_runtime.ops import encode_reference as reference

WIDTHS = [2, 3, 4, 5, 6, 8]
SHAPES = [(1, 15), (32, 1), (77, 17), (128, 100), (33, 64), (5, 33)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_reference_against_float64(bits: int) -> None:
    g = Group(35, 6, bits)  # more rows than the reference updates one by one
    codes, q, errors = reference.feedback_encode(g.w, g.u, g.scales, bits)
    slow_codes, slow_q, slow_errors = slow_feedback(g.w, g.u, g.scales, bits)
    assert np.array_equal(codes.numpy(), slow_codes)
    assert np.array_equal(q.double().numpy(), slow_q)
    assert np.allclose(errors.numpy(), slow_errors, atol=1e-5 * np.abs(slow_errors).max())
    loss = reference.feedback_loss(g.w, g.u, g.candidates, bits)
    for scales, row in zip(g.candidates, loss, strict=True):
        slow_loss = (slow_feedback(g.w, g.u, scales, bits)[2] ** 2).sum(0)
        assert np.allclose(row.numpy(), slow_loss, rtol=1e-5)

    best, least = reference.scale_search(g.w, g.row_weights, g.group_scales, bits)
    for i, m in enumerate(g.group_scales.tolist()):
        slow_best, slow_least = slow_search(g.w, g.row_weights, m, bits)
        assert np.array_equal(best[i].numpy(), slow_best)
        assert np.allclose(least[i].numpy(), slow_least, rtol=1e-5)

    # Powers of two, so that values are evenly spaced: where rounding to half shifts them, the nearest code is not
    # always the one with the nearest value. (With a scale of 0 all codes are equally good.)
    g.scales = 2.0 ** g.candidates[1].log2().round()
    g.round()
    codes, new_q, delta = reference.descend(g.q, g.gradient, g.h, g.scales, bits)
    slow_codes, slow_q = slow_descent(g.w, g.q, g.h, g.scales, bits)
    assert np.array_equal(codes.numpy(), slow_codes)
    assert np.array_equal(new_q.double().numpy(), slow_q)
    assert torch.equal(delta, g.q - new_q)
    assert delta.count_nonzero() > 10


def test_the_loss_is_the_quadratic_form_of_the_hessian() -> None:
    g = Group(64, 40, 3)
    _, q, errors = encode.feedback_encode(g.w, g.u, g.scales, 3)
    left = (g.w - q).double()
    form = (left * (g.h.double() @ left)).sum(0)
    assert torch.allclose(errors.double().square().sum(0), form, rtol=1e-4)
    assert torch.allclose(encode.feedback_loss(g.w, g.u, g.scales[None], 3)[0].double(), form, rtol=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_native_against_reference(rows: int, columns: int, bits: int, isa: str) -> None:
    """Sums round differently: a weight half-way between codes may fall either way, and changes its column below it.

    Other columns agree: their weights to the rounding of a sum of `rows` terms, their errors to that over u[r,r].
    """
    g, ops = Group(rows, columns, bits), native.ops()
    astray = (columns + 9) // 10 if columns > 1 else 0  # columns that may
    rounding = 2**-22 * rows**0.5 * float(g.w.abs().max())
    slack = rounding / float(g.u.diagonal().min())

    for i, close in ((3, slack), (6, 0.0)):  # feedback_encode, descend: codes, values, what was passed on
        fast, slow = (every_function(o, g)[i : i + 3] for o in (ops, reference))
        assert [t.dtype for t in fast] == [torch.int8, torch.float32, torch.float32]
        agree = (fast[0] == slow[0]).all(0)
        assert int((~agree).sum()) <= astray
        assert torch.equal(fast[1][:, agree], slow[1][:, agree])
        assert ((fast[2] - slow[2]).abs() <= close)[:, agree].all()

    codes, loss = ops.scale_search(g.w, g.row_weights, g.group_scales, bits)
    slow_codes, slow_loss = reference.scale_search(g.w, g.row_weights, g.group_scales, bits)
    assert torch.equal(codes, slow_codes)
    assert torch.allclose(loss, slow_loss, rtol=1e-5, atol=0)

    loss, slow_loss = (o.feedback_loss(g.w, g.u, g.candidates, bits).double() for o in (ops, reference))
    bound = 1e-5 * slow_loss + 2 * (slow_loss * rows).sqrt() * slack  # (e + slack)^2 - e^2, summed
    assert ((loss - slow_loss).abs() > bound).sum(1).max() <= astray


# ---- cases in which every intermediate result is exact, so that all implementations must agree to the bit


@pytest.mark.parametrize("bits", WIDTHS)
def test_exact_cases_agree_to_the_bit(bits: int, isa: str) -> None:
    g = exact_group(41, bits)
    for ops in (native.ops(), reference):
        codes, loss = ops.scale_search(g.quarters, g.row_weights, g.group_scales, bits)
        for i, m in enumerate(g.group_scales.tolist()):
            slow_codes, slow_loss = slow_search(g.quarters, g.row_weights, m, bits)
            assert np.array_equal(codes[i].numpy(), slow_codes)
            assert np.array_equal(loss[i].double().numpy(), slow_loss)
        loss = ops.feedback_loss(g.w, g.u, g.candidates, bits)
        for scales, row in zip(g.candidates, loss, strict=True):
            *_, slow_errors = slow_feedback(g.w, g.u, scales, bits)
            assert np.array_equal(row.double().numpy(), (slow_errors**2).sum(0))
        codes, q, errors = ops.feedback_encode(g.w, g.u, g.scales, bits)
        slow_codes, slow_q, slow_errors = slow_feedback(g.w, g.u, g.scales, bits)
        assert np.array_equal(codes.numpy(), slow_codes)
        assert np.array_equal(q.double().numpy(), slow_q)
        assert np.array_equal(errors.double().numpy(), slow_errors)
    fast, slow = (o.descend(g.q, g.gradient, g.h, g.scales, bits) for o in (native.ops(), reference))
    assert torch.equal(fast[0], slow[0])
    assert same_bits(fast[1], slow[1])
    assert same_bits(fast[2], slow[2])
    assert fast[2].count_nonzero() > 20
    assert not fast[2][20].any()  # h is 0 there


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_scale_rounds_as_the_format_does(bits: int, isa: str) -> None:
    """One row without feedback: all positive halves as scales, codes and values against numpy's float16."""
    patterns = np.arange(0x7C00 - 0x2000, dtype=np.uint16)  # up to 255, so that no value overflows
    scales = patterns.view(np.float16).astype(np.float32)
    w = (np.random.default_rng(bits).uniform(-1.3, 1.3, scales.shape) * 2 ** (bits - 1)).astype(np.float32) * scales
    w[::5] = np.float32(1.5) * scales[::5]  # a tie wherever the division is exact
    w[0] = 1.0
    with np.errstate(all="ignore"):
        code = np.clip(np.rint(w / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    code[0] = 0
    value = (code * scales).astype(np.float16).astype(np.float32) + np.float32(0)
    for ops in (native.ops(), reference):
        codes, q, errors = ops.feedback_encode(
            torch.from_numpy(w)[None], torch.ones(1, 1), torch.from_numpy(scales), bits
        )
        assert np.array_equal(codes[0].numpy(), code)
        assert same_bits(q[0], torch.from_numpy(value))
        assert same_bits(errors[0], torch.from_numpy(w - value))


def test_rows_of_zeros_and_ties_between_scale_codes(isa: str) -> None:
    g = Group(40, 20, 4)
    g.w[:, 3:9] = 0
    for ops in (native.ops(), reference):
        codes, loss = ops.scale_search(g.w, g.row_weights, g.group_scales, 4)
        assert (codes[:, 3:9] == 1).all()
        assert (loss[:, 3:9] == 0).all()
        assert (codes[:, 0] > 1).all()
        codes, loss = ops.scale_search(g.w, g.row_weights, torch.zeros(1), 4)
        assert (codes == 1).all()
        assert torch.allclose(loss[0], (g.row_weights[:, None] * g.w.square()).sum(0), rtol=1e-5)
        # 4 is a multiple of S = 1/16, 1/4, 1 and 4 (s = 1, 2, 4, 8): 64, 16, 4 and 1 of them
        codes, loss = ops.scale_search(torch.tensor([[4.0], [0.0]]), torch.ones(2), torch.tensor([1 / 16]), 8)
        assert codes.tolist() == [[1]]
        assert loss.tolist() == [[0.0]]
        codes, _ = ops.scale_search(torch.tensor([[4.0]]), torch.ones(1), torch.tensor([1 / 16]), 6)
        assert codes.tolist() == [[2]]


def test_scales_that_overflow_lose(isa: str) -> None:
    w, one = torch.tensor([[60000.0, 1.0]]), torch.ones(1)
    for ops in (native.ops(), reference):
        # s = 3: 7 * 9000 is 63008 as a half; s = 6: 2 * 36000 is too large for a half; s = 9 and above: S itself is
        codes, loss = ops.scale_search(w, one, torch.tensor([1000.0]), 4)
        assert codes.tolist() == [[3, 1]]
        assert loss.tolist() == [[3008.0**2, 1.0]]
        codes, loss = ops.scale_search(w, one, torch.tensor([torch.inf]), 4)
        assert codes.tolist() == [[1, 1]]
        assert loss.tolist() == [[torch.inf, torch.inf]]
        # S is 13200 and 52800 at s = 1 and 2. 5 * 13200 overflows in a row without weight; so does 2 * 52800.
        two = torch.tensor([[66000.0, 1.0], [52800.0, 13200.0]])
        codes, loss = ops.scale_search(two, torch.tensor([0.0, 1.0]), torch.tensor([13200.0]), 4)
        assert codes.tolist() == [[2, 1]]
        assert loss.tolist() == [[0.0, 0.0]]
        hopeless = torch.tensor([[66000.0], [1e5]]).repeat(1, 32)
        codes, loss = ops.scale_search(hopeless, torch.tensor([0.0, 1.0]), torch.tensor([13200.0]), 4)
        assert (codes == 1).all()
        assert (loss == torch.inf).all()
        loss = ops.feedback_loss(w, torch.ones(1, 1), torch.tensor([[36000.0, 1.0], [9000.0, torch.inf]]), 4)
        assert loss.tolist() == [[torch.inf, 0.0], [3008.0**2, torch.inf]]


def test_the_best_candidate_is_the_first_of_the_cheapest() -> None:
    g = Group(32, 50, 3)
    candidates = g.candidates[[0, 2, 1, 2, 1]]
    best, loss = encode.feedback_best(g.w, g.u, candidates, 3)
    losses = encode.feedback_loss(g.w, g.u, candidates, 3)
    assert best.dtype == torch.int64
    assert best.max() <= 2
    assert torch.equal(loss, losses.amin(0))
    assert torch.equal(losses.gather(0, best[None])[0], loss)
    with pytest.raises(ValueError, match="no candidate scales"):
        encode.feedback_best(g.w, g.u, candidates[:0], 3)


# ---- what a result must not depend on


def test_avx2_equals_avx512(restore: None) -> None:
    g, results = Group(77, 70, 4), []
    for name in ("avx2", "avx512"):
        try:
            native.ops().set_isa(name)
        except RuntimeError as err:
            pytest.skip(str(err))
        results.append(every_function(native.ops(), g))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_number_of_threads_does_not_matter(restore: None) -> None:
    g, seen = Group(40, 700, 3), []
    for threads in (1, 2, 3, 7):
        native.ops().set_threads(threads)
        seen.append(every_function(native.ops(), g))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_columns_and_what_lies_below_the_diagonal_do_not_matter(isa: str) -> None:
    g, piece = Group(45, 100, 5), slice(9, 74)
    whole = every_function(native.ops(), g)
    q, gradient = (t[:, piece].contiguous() for t in (g.q, g.gradient))
    lower = torch.full_like(g.u, 7.0).tril(-1)
    w, candidates, scales = g.w[:, piece].contiguous(), g.candidates[:, piece].contiguous(), g.scales[piece]
    part = [
        *native.ops().scale_search(w, g.row_weights, g.group_scales, 5),
        native.ops().feedback_loss(w, g.u.triu() + lower, candidates, 5),
        *native.ops().feedback_encode(w, g.u.triu() + lower, scales, 5),
        *native.ops().descend(q, gradient, g.h.triu() + lower, scales, 5),
    ]
    assert all(torch.equal(a[..., piece], b) for a, b in zip(whole, part, strict=True))


def test_inputs_stay_and_may_be_views(kernels: None) -> None:
    g = Group(33, 20, 4)
    inputs = {name: t for name, t in vars(g).items() if isinstance(t, Tensor)}
    assert len(inputs) == 9
    before = {name: t.clone() for name, t in inputs.items()}
    expected = [every_function(encode, g), every_function(reference, g)]
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    for name, t in inputs.items():  # every second element of something larger, transposed
        wide = torch.zeros(*(2 * size for size in reversed(t.shape)))
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
        setattr(g, name, view.copy_(t))
    for ops, wanted in zip((encode, reference), expected, strict=True):
        results = every_function(ops, g)
        assert all(torch.equal(a, b) or torch.allclose(a, b, rtol=1e-5) for a, b in zip(results, wanted, strict=True))


def test_empty_groups(kernels: None) -> None:
    for rows, columns in ((0, 3), (3, 0)):
        w, square, scales = torch.zeros(rows, columns), torch.eye(rows), torch.ones(columns)
        for ops in (native.ops(), reference):
            codes, _ = ops.scale_search(w, torch.ones(rows), torch.ones(2), 4)
            assert codes.tolist() == [[1] * columns] * 2
            assert ops.feedback_loss(w, square, scales[None], 4).tolist() == [[0.0] * columns]
            assert ops.feedback_loss(w, square, scales[None][:0], 4).shape == (0, columns)
            assert ops.feedback_encode(w, square, scales, 4)[0].shape == (rows, columns)
            assert ops.descend(w, w, square, scales, 4)[2].shape == (rows, columns)


# ---- who computes


def test_native_where_it_can_be_had(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    g, called = Group(4, 3, 4), []
    for name in ("scale_search", "feedback_loss", "feedback_encode", "descend"):
        original = getattr(reference, name)
        monkeypatch.setattr(
            reference, name, lambda *a, name=name, original=original: called.append(name) or original(*a)
        )
    every_function(encode, g)
    assert called == []
    for name, t in vars(g).items():
        if isinstance(t, Tensor):
            setattr(g, name, t.double())
    encode.feedback_loss(g.w, g.u, g.candidates, 4)
    assert called == ["feedback_loss"]
    monkeypatch.setattr(native, "resolve_backend", lambda requested, device: "reference")
    called.clear()
    every_function(encode, Group(4, 3, 4))
    assert called == ["scale_search", "feedback_loss", "feedback_encode", "descend"]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("feedback_encode", {"bits": 7}, "exl::feedback_encode: no codes have 7 bits"),
        ("feedback_encode", {"w": torch.zeros(5)}, r"w must have shape \(\*, \*\), got Float \(5\)"),
        ("feedback_encode", {"w": torch.zeros(4, 3, dtype=torch.float64)}, "w must be .* dtype Float, got Double"),
        ("feedback_encode", {"u": torch.eye(5)}, r"u must have shape \(4, 4\), got Float \(5, 5\)"),
        ("feedback_encode", {"scales": torch.ones(1, 3)}, r"scales must have shape \(3\)"),
        ("feedback_loss", {"u": torch.zeros(4, 8)[:, ::2]}, "u must be a contiguous .* not contiguous"),
        ("feedback_loss", {"candidates": torch.ones(2, 4)}, r"scales must have shape \(\*, 3\)"),
        ("scale_search", {"row_weights": torch.ones(3)}, r"row_weights must have shape \(4\)"),
        ("scale_search", {"row_weights": torch.tensor([1.0, -1, 1, 1])}, "row 1 has -1"),
        ("scale_search", {"group_scales": torch.ones(2).half()}, "group_scales must be .* got Half"),
        ("descend", {"gradient": torch.zeros(4, 4)}, r"gradient must have shape \(4, 3\)"),
        ("descend", {"h": torch.zeros(3, 4)}, r"h must have shape \(4, 4\)"),
        ("descend", {"q": torch.zeros(4, 3).half()}, "q must be .* got Half"),
    ],
)
def test_the_binding_refuses_what_would_read_outside(
    function: str, change: dict[str, object], message: str, kernels: None
) -> None:
    names = {
        "scale_search": ("w", "row_weights", "group_scales", "bits"),
        "feedback_loss": ("w", "u", "candidates", "bits"),
        "feedback_encode": ("w", "u", "scales", "bits"),
        "descend": ("q", "gradient", "h", "scales", "bits"),
    }
    g = Group(4, 3, 4)
    given = {**vars(g), **change}
    with pytest.raises(RuntimeError, match=message):
        getattr(native.ops(), function)(*(given[name] for name in names[function]))
