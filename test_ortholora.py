"""The specification of Ortho-LoRA, as tests. Read it from top to bottom.

The reference: for everything fast, the textbook function; for that, torchjd's PCGrad and numbers worked out by hand.
"""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torchjd.aggregation import PCGrad

from ortholora import OrthoLoRA, balance, project_conflicting, projection_coefficients, sequential_coefficients

SHAPES = [[(8, 24)], [(24, 8)], [(5,), (3, 4)], [(8, 24)], [(1,)]]  # five blocks; the third is of two tensors


def make(T, shapes=SHAPES, dtype=torch.float32, **options):
    """Parameters, an OrthoLoRA over them, and T random gradients for each: grads[t][i]."""
    torch.manual_seed(T)
    blocks = [[nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in block] for block in shapes]
    parameters = [p for block in blocks for p in block]
    grads = [[torch.randn_like(p) for p in parameters] for _ in range(T)]
    return parameters, OrthoLoRA(blocks, T, **options), grads


def collect(ortho, parameters, grads):
    for t, task in enumerate(grads):
        for p, g in zip(parameters, task, strict=True):
            p.grad = g.clone()
        ortho.collect(t)


def rows_of_blocks(ortho, parameters, grads):
    """(T, n) for each block, in the caller's order."""
    place = {id(p): i for i, p in enumerate(parameters)}
    for block in ortho.blocks:
        yield torch.stack([torch.cat([task[place[id(p)]].flatten() for p in block]) for task in grads])


def update_of(block):
    return torch.cat([p.grad.flatten() for p in block])


def one_block(*grads, **options):
    """(parameter, OrthoLoRA) of one block, the gradients, given as lists of numbers, collected."""
    parameter = nn.Parameter(torch.zeros(len(grads[0])))
    ortho = OrthoLoRA([[parameter]], len(grads), **options)
    collect(ortho, [parameter], [[torch.tensor(g)] for g in grads])
    return parameter, ortho


# ---------------------------------------------------------------------------------------------------------------------
# The rule, by hand: g1 is task 0's gradient, g2 task 1's, ...


def test_two_conflicting_gradients():
    # <g1, g2> = -1. v1 = g1 + 1/2 g2 = (.5, .5); v2 = g2 + 1/1 g1 = (0, 1).
    v = project_conflicting(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), [[1], [0]])
    assert v.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert v.sum(0).tolist() == [0.5, 1.5]


def test_sequential_reference_differs():
    # v1 = (.5, .5) as before, but g2 now meets v1, not g1: <g2, v1> = 0, so v2 = g2.
    grads, order = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), [[1], [0]]
    v = project_conflicting(grads, order, sequential=True)
    assert v.sum(0).tolist() == [-0.5, 1.5]
    C = sequential_coefficients((grads @ grads.mT)[None], order)  # order may be a list here, too
    assert torch.equal(C[0] @ grads, v)


def test_weights_by_hand():
    # <g1, g2> = -22, |g1|^2 = 18, |g2|^2 = 38: sum = (1 + 22/18) g1 + (1 + 22/38) g2.
    v = project_conflicting(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), [[1], [0]])
    torch.testing.assert_close(v.sum(0), torch.tensor([0.5848, 3.8012, 3.8012]), atol=1e-4, rtol=0)


def test_order_matters_for_three():
    # g1 = (1, 0), g2 = (-1, 1), g3 = (-1, -2).
    # g1 first meets g2: (1,0) + 1/2 (-1,1) = (.5, .5); then g3: dot -1.5, |g3|^2 = 5: + .3 (-1,-2) = (.2, -.1).
    # g1 first meets g3: (1,0) + 1/5 (-1,-2) = (.8, -.4); then g2: dot -1.2, + .6 (-1,1) = (.2, .2).
    # g2, either way: it meets g1 (dot -1): (0, 1); <(0,1), g3> = -2: + 2/5 g3 = (-.4, .2).
    #     g3 first: <g2, g3> = -1: g2 + 1/5 g3 = (-1.2, .6); then g1: dot -1.2: + 1.2 g1 = (0, .6).
    # g3: meets g1 (dot -1): (0, -2); <(0,-2), g2> = -2: + 1 g2 = (-1, -1).
    #     g2 first: <g3, g2> = -1: g3 + 1/2 g2 = (-1.5, -1.5); then g1: dot -1.5: (0, -1.5).
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
    up = project_conflicting(g, [[1, 2], [0, 2], [0, 1]])
    down = project_conflicting(g, [[2, 1], [2, 0], [1, 0]])
    torch.testing.assert_close(up, torch.tensor([[0.2, -0.1], [-0.4, 0.2], [-1.0, -1.0]]))
    torch.testing.assert_close(down, torch.tensor([[0.2, 0.2], [0.0, 0.6], [0.0, -1.5]]))


@pytest.mark.parametrize("T", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 300])
@pytest.mark.parametrize("shift", [0.0, 0.5])  # half of the pairs conflict; fewer, most with the last task
def test_textbook_equals_torchjd(T, n, shift):
    torch.manual_seed(1000 * T + n)
    grads = torch.randn(T, n) + shift * torch.randn(1, n) * torch.cat([torch.ones(T - 1, 1), -torch.ones(1, 1)])
    permutations = [torch.randperm(T) for _ in range(T)]
    with mock.patch("torch.randperm", side_effect=permutations):  # torchjd draws one for each task
        theirs = PCGrad()(grads)
    ours = project_conflicting(grads, [[j for j in p.tolist() if j != i] for i, p in enumerate(permutations)]).sum(0)
    assert (ours - theirs).norm() <= 1e-5 * grads.norm(dim=1).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The fast path is the textbook


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("T", range(1, 9))
def test_ortholora_equals_textbook(T, sequential):
    shapes = SHAPES[:-1] if sequential else SHAPES  # in one dimension v_j may be all rounding error, and is a reference
    parameters, ortho, grads = make(T, shapes, sequential=sequential)
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = project_conflicting(rows, order.tolist(), sequential).sum(0)
        assert (update_of(block) - expected).norm() <= 1e-5 * rows.norm(dim=1).sum()


def test_sequential_takes_rounding_error_for_zero():
    # In one dimension a conflict takes all of v_i, so exactly nothing is left; what float64 leaves, 1e-16 of g_i, must
    # not become a reference for the tasks that come after: it would move the update little, but the weights a lot.
    torch.manual_seed(0)
    scales = torch.logspace(-9, 9, 100)  # however long gradients are
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(100)]
    ortho = OrthoLoRA([[p] for p in parameters], 4, sequential=True)
    grads, order = torch.randn(4, 100) * scales, ortho.random_order()
    collect(ortho, parameters, grads[..., None])
    weights = ortho.project(order).weights
    for p, w, v, scale in zip(parameters, weights, grads.T.tolist(), scales, strict=True):
        C = torch.eye(4).double()
        for i, others in enumerate(order.tolist()):
            for j in others:
                if v[i] * v[j] < 0:
                    C[i] -= v[i] / v[j] * C[j]
                    v[i] = 0.0
        torch.testing.assert_close(w, C.sum(0))
        torch.testing.assert_close(p.grad / scale, torch.tensor([sum(v)]) / scale, atol=1e-6, rtol=1e-6)


def test_coefficients_by_hand():
    # g1 = (1, 0), g2 = (-1, 1), g3 = (-1, -2) as above, the other tasks in ascending order, in two blocks of which the
    # second has no conflict. v1 = g1 + 1/2 g2 + 3/10 g3; v2 = 1 g1 + g2 + 2/5 g3; v3 = 1 g1 + 1 g2 + g3.
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
    C = projection_coefficients(torch.stack([g @ g.mT, torch.eye(3)]), [[1, 2], [0, 2], [0, 1]])
    torch.testing.assert_close(C[0], torch.tensor([[1.0, 0.5, 0.3], [1.0, 1.0, 0.4], [1.0, 1.0, 1.0]]))
    assert torch.equal(C[1], torch.eye(3))
    assert torch.equal(projection_coefficients((g @ g.mT)[None], torch.empty(3, 0)), torch.eye(3)[None])


def test_order_is_used_and_seeded():
    orders = [make(5, generator=torch.Generator().manual_seed(s))[1].random_order() for s in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    for i, others in enumerate(orders[0].tolist()):
        assert sorted(others) == [j for j in range(5) if j != i]
    ortho = make(3)[1]
    first = torch.stack([ortho.random_order() for _ in range(600)])[:, 0, 0]
    assert 200 < (first == 1).sum() < 400  # task 0 meets 1 or 2 first, evenly


def test_every_process_draws_the_same_order():
    # Whatever else has been drawn there (dropout, a collator's masks) and whatever the default device is.
    orders = []
    for noise in (1, 2):
        ortho = make(6)[1]
        torch.rand(noise)
        with torch.device("meta"):
            orders.append(torch.stack([ortho.random_order() for _ in range(4)]))
    assert orders[0].device.type == "cpu" and torch.equal(*orders)
    assert not torch.equal(orders[0][0], orders[0][1])
    assert torch.equal(orders[0][0], make(6, generator=torch.Generator().manual_seed(0))[1].random_order())


def test_step_is_one_order_for_all_tasks_and_blocks():
    parameters, ortho, grads = make(4, generator=torch.Generator().manual_seed(3))
    order = make(4, generator=torch.Generator().manual_seed(3))[1].random_order()
    collect(ortho, parameters, grads)
    ortho.project()
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = project_conflicting(rows, order.tolist()).sum(0)
        torch.testing.assert_close(update_of(block), expected, atol=1e-5, rtol=1e-5)


def test_unit_is_data():
    # A: g1 = (1, 0), g2 = (-1, 1) conflict, dot -1. B: both (2, 0), dot 4. As one vector they agree, dot 3.
    A, B = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    grads = [[torch.tensor(a), torch.tensor([2.0, 0.0])] for a in ([1.0, 0.0], [-1.0, 1.0])]
    for blocks, expected in (([[A], [B]], [0.5, 1.5]), ([[A, B]], [0.0, 1.0]), ([[B]], [0.0, 1.0])):
        ortho = OrthoLoRA(blocks, 2)
        A.grad = B.grad = None
        for t, (a, b) in enumerate(grads):
            A.grad = a.clone() if A.grad is None else A.grad + a  # what backward() does
            B.grad = b.clone() if B.grad is None else B.grad + b
            ortho.collect(t)
        ortho.project()
        assert A.grad.tolist() == expected  # the last: A is in no block, so its gradients add up
        assert B.grad.tolist() == [4.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# When nothing happens


def test_one_task_is_untouched():
    parameters, ortho, grads = make(1)
    collect(ortho, parameters, grads)
    ortho.project()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, grads[0], strict=True))


def test_no_conflict_is_the_sum_to_the_bit():
    parameters, ortho, grads = make(5)
    grads = [[g.abs() for g in task] for task in grads]  # all in one orthant: no negative dot product
    collect(ortho, parameters, grads)
    conflicts = ortho.project()
    assert not conflicts.conflicts.any() and not conflicts.removed.any()
    for i, p in enumerate(parameters):
        total = grads[0][i].clone()
        for task in grads[1:]:
            total += task[i]
        assert torch.equal(p.grad, total)


@pytest.mark.parametrize("order", [torch.empty(2, 0, dtype=torch.long), [[], []]])
def test_an_empty_order_adds_the_rows_to_the_bit_and_watches(order):
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, grads)
    conflicts = ortho.project(order)
    assert conflicts.conflicts.any() and not conflicts.removed.any() and (conflicts.weights == 1).all()
    assert all(torch.equal(p.grad, a + b) for p, a, b in zip(parameters, *grads, strict=True))


def test_conflict_in_one_block_leaves_the_others_to_the_bit():
    parameters, ortho, grads = make(2)
    grads = [[g.abs() for g in task] for task in grads]
    grads[1][0] = -grads[0][0] + 0.1 * grads[1][0]
    collect(ortho, parameters, grads)
    conflicts = ortho.project()
    assert conflicts.conflicts.any((1, 2)).tolist() == [True] + [False] * 4
    assert all(torch.equal(p.grad, a + b) for p, a, b in list(zip(parameters, *grads, strict=True))[1:])


def test_opposite_gradients_vanish():
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, [grads[0], [-4 * g for g in grads[0]]])  # a power of two: exactly opposite
    conflicts = ortho.project()
    assert all(p.grad.abs().max() <= 1e-6 * g.norm() for p, g in zip(parameters, grads[0], strict=True))
    torch.testing.assert_close(conflicts.removed, torch.ones(5, 2).double())


def test_zero_gradient_is_no_conflict():
    # The first step of LoRA: B = 0, so every task's gradient of A is exactly zero.
    parameters, ortho, grads = make(3)
    collect(ortho, parameters, [[0 * g for g in task] for task in grads])
    conflicts = ortho.project()
    for x in (conflicts.cosines, conflicts.conflicts, conflicts.removed, conflicts.rate):
        assert not x.any()  # and no NaN, which would count as true
    assert (conflicts.effective == 1).all()
    conflicts.check()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_zero_next_to_conflict():
    parameters, ortho, grads = make(3)
    grads[1] = [0 * g for g in grads[1]]
    grads[2] = [-g + 0.5 * torch.randn_like(g) for g in grads[0]]
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = project_conflicting(rows, order.tolist()).sum(0)
        torch.testing.assert_close(update_of(block), expected, atol=1e-5, rtol=1e-4)


def test_task_that_does_not_use_a_parameter():
    parameters, ortho, grads = make(2)
    for t, task in enumerate(grads):
        for p, g in list(zip(parameters, task, strict=True))[t:]:  # task 1 has no gradient for the first
            p.grad = g.clone()
        ortho.collect(t)
    ortho.project()
    assert torch.equal(parameters[0].grad, grads[0][0])


def test_absent_tasks_take_no_part():
    # Three of eight tasks have a batch in this step: as if there were three. The five meet nobody, and count nowhere.
    present, absent = [5, 2, 7], [0, 1, 3, 4, 6]
    parameters, eight, grads = make(8)
    three = OrthoLoRA(eight.blocks, 3)
    order = three.random_order().tolist()
    collect(three, parameters, grads[:3])
    expected = three.project(order)
    updates = [p.grad for p in parameters]
    long_order = eight.random_order().tolist()
    for t, others in zip(present, order, strict=True):  # those that are there first, in the order of the three
        long_order[t] = [present[j] for j in others] + absent
    for t, task in zip(present, grads, strict=False):
        for p, g in zip(parameters, task, strict=True):
            p.grad = g.clone()
        eight.collect(t)
    conflicts = eight.project(long_order)
    for p, g in zip(parameters, updates, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-5)
    assert conflicts.finite.all() and not conflicts.removed[:, absent].any()
    assert not conflicts.cosines[:, absent].any() and (conflicts.weights[:, absent] == 1).all()
    assert conflicts.rate == expected.rate > 0
    torch.testing.assert_close(conflicts.effective[present], expected.effective)
    assert (conflicts.effective[absent] == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-20, 1e12, 1e-12])
def test_scale_equivariance(scale):
    parameters, ortho, grads = make(4)
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    plain = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    collect(ortho, parameters, [[scale * g for g in task] for task in grads])
    ortho.project(order)
    for p, g in zip(parameters, plain, strict=True):
        assert torch.equal(p.grad, scale * g) if scale in (2.0**16, 2.0**-20) else True
        torch.testing.assert_close(p.grad / scale, g, atol=1e-5, rtol=1e-4)


def test_square_that_underflows_is_no_conflict():
    # |g2|^2 = 1e-50 is 0 in float32 but <g1, g2> = -1e-15 is not: nothing can be divided by it, and nothing is removed.
    grads = torch.tensor([[1e10, 0.0], [-1e-25, 1e-25]])
    assert torch.equal(project_conflicting(grads, [[1], [0]])[0], grads[0])
    C = projection_coefficients((grads @ grads.mT)[None], [[1], [0]])
    assert C[0, 0].tolist() == [1.0, 0.0]


def test_square_that_underflows_in_float64_has_no_cosine():
    p = nn.Parameter(torch.zeros(1).double())
    ortho = OrthoLoRA([[p]], 3)
    collect(ortho, [p], torch.tensor([[[1e10]], [[-1e-200]], [[1e-200]]], dtype=torch.float64))
    conflicts = ortho.project()
    assert torch.equal(conflicts.cosines[0], torch.diag(torch.tensor([1.0, 0.0, 0.0])).double())
    assert not conflicts.conflicts.any() and not conflicts.removed.any() and (conflicts.weights == 1).all()


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_squares_beyond_float32_are_projected_all_the_same(scale):
    # |g|^2 would be 1e50 or 1e-60. As at the top: the sum of (1, 0) and (-1, 1) is (.5, 1.5).
    parameter, ortho = one_block([scale, 0.0], [-scale, scale])
    conflicts = ortho.project()
    torch.testing.assert_close(parameter.grad / scale, torch.tensor([0.5, 1.5]))
    assert conflicts.finite.all() and conflicts.conflicts.sum() == 2


def test_a_gradient_next_to_nothing_is_projected_without_infinity():
    # w2 = 1 + 1e10 / 1e-36 is beyond float32. What is added stays below what exact projection would add.
    parameter, ortho = one_block([1e10, 1e10], [-1e-36, 0.0])
    assert ortho.project().finite.all()
    assert parameter.grad.isfinite().all() and parameter.grad[1] == 1e10 and 0 <= parameter.grad[0] <= 1e10


@pytest.mark.parametrize("sequential", [False, True])
def test_products_are_exact_under_autocast_and_fast_matmul(sequential):
    # "medium" allows bf16 inside a product of float32, on processors that have it. None of it may reach the projection.
    before = torch.get_float32_matmul_precision()
    found = []
    for precision, autocast in (("highest", False), ("medium", True)):
        try:
            torch.set_float32_matmul_precision(precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                parameters, ortho, grads = make(6, [[(64, 96)]], sequential=sequential)
                collect(ortho, parameters, grads)
                conflicts = ortho.project()
                found.append([parameters[0].grad, conflicts.cosines, conflicts.removed, conflicts.effective])
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    g = torch.stack([task[0].flatten() for task in grads]).double()
    norms = g.norm(dim=1)
    torch.testing.assert_close(conflicts.cosines[0], g @ g.mT / norms / norms[:, None], atol=1e-14, rtol=1e-12)


def test_large_blocks_are_summed_over_pieces():
    # Wider than a piece, in a batch of blocks and alone, with a remainder.
    parameters, ortho, grads = make(3, [[(300, 701)], [(300, 701)], [(5,)]])
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    conflicts = ortho.project(order)
    for block, cosines, rows in zip(
        ortho.blocks, conflicts.cosines, rows_of_blocks(ortho, parameters, grads), strict=True
    ):
        rows = rows.double()
        expected = project_conflicting(rows, order.tolist()).sum(0).float()
        torch.testing.assert_close(update_of(block), expected, atol=1e-5, rtol=1e-5)
        norms = rows.norm(dim=1)
        torch.testing.assert_close(cosines, rows @ rows.mT / norms / norms[:, None], atol=1e-14, rtol=1e-12)


def peak_of(run):
    """Bytes allocated at the peak of run(), beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        total += change
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 500])
def test_memory_is_two_sums_and_a_little(blocks, dtype):
    T, P = 4, 24_000_000  # a float64 copy of one block alone would be 768 MB
    parameters = [nn.Parameter(torch.empty(P // blocks, dtype=dtype)) for _ in range(blocks)]
    ortho = OrthoLoRA([[p] for p in parameters], T)
    ortho.rows.fill_(1.0)
    peak = peak_of(ortho.project)
    assert P * parameters[0].grad.element_size() <= peak <= 2 * 4 * P + 2**26 + 8 * blocks * T * T * 8
    ortho.rows.fill_(1.0)
    assert peak_of(lambda: balance(ortho.rows)) <= 2**26


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    parameters, ortho, grads = make(3, dtype=dtype)
    assert ortho.rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = project_conflicting(rows.double(), order.tolist()).sum(0).to(dtype)
        assert update_of(block).dtype == dtype
        torch.testing.assert_close(update_of(block), expected)
    assert projection_coefficients(torch.eye(2, dtype=torch.bfloat16)[None], [[1], [0]]).dtype == torch.float32


def test_rows_are_added_from_first_to_last():
    # (1 + 1e8) - 1e8 = 0 in float32, in this order only; the sum alone has no conflict to project.
    parameter, ortho = one_block([1e8], [1.0], [-1e8])
    ortho.project([[]] * 3)
    assert parameter.grad.item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_not_finite_propagates_and_is_named(bad, T):
    parameters, ortho, grads = make(T)
    grads[T - 1][2][3] = bad  # in the second tensor of the third block
    collect(ortho, parameters, grads)
    conflicts = ortho.project()
    assert not torch.isfinite(parameters[2].grad).all()
    assert all(torch.isfinite(parameters[i].grad).all() for i in (0, 1, 4, 5))  # the other blocks
    model = nn.Module()
    model.A, model.B = parameters[2], parameters[3]
    with pytest.raises(FloatingPointError, match=r"task rte .*: A, B"):
        conflicts.check(model, ["x"] * (T - 1) + ["rte"])
    with pytest.raises(FloatingPointError, match=rf"task {T - 1} .*block 2"):
        conflicts.check()
    assert not ortho.rows.any()  # nothing of it stays
    for p in parameters:
        p.grad = None
    collect(ortho, parameters, make(T)[2])
    ortho.project().check()


# ---------------------------------------------------------------------------------------------------------------------
# Balance


def test_balance_by_hand():
    # Over both blocks |g1| = 5 and |g2| = sqrt(2 + 7) = 3, mean 4: s = (4/5, 4/3). In A they conflict, as at the top,
    # v1 = (1.5, 1.5) and v2 = (0, 1); in B they agree.
    A, B = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    grads = [[torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([-1.0, 1.0]), torch.tensor([7**0.5])]]
    ortho = OrthoLoRA([[A], [B]], 2)
    collect(ortho, [A, B], grads)
    balance(ortho.rows)
    ortho.project()
    torch.testing.assert_close(A.grad, torch.tensor([1.2, 1.2 + 4 / 3]))
    torch.testing.assert_close(B.grad, torch.tensor([3.2 + 4 / 3 * 7**0.5]))


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-35])
def test_balance_leaves_absent_tasks_out(scale):
    # The norms 5, absent, 1: both become 3, whatever their squares are in float32, and zero stays zero.
    rows = scale * torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert balance(rows) is None
    torch.testing.assert_close(rows / scale, torch.tensor([[1.8, 2.4], [0.0, 0.0], [0.0, 3.0]]))
    rows[0] = 0
    alone = rows.clone()
    balance(rows)
    torch.testing.assert_close(rows, alone)  # its own mean
    rows.zero_()
    balance(rows)
    assert not rows.any()


def test_balance_of_a_row_next_to_nothing_is_finite():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1e-44]])  # to the norm 1/2 it would take a factor beyond float32
    balance(rows)
    assert rows[0, 0] == 0.5 and rows.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_balance_lets_what_is_not_finite_through(bad):
    rows = torch.tensor([[3.0, 4.0], [1.0, bad], [0.0, 1.0]])
    balance(rows)
    assert not rows[1].isfinite().all()
    torch.testing.assert_close(rows[::2], torch.tensor([[1.8, 2.4], [0.0, 3.0]]))  # without it: else all were NaN


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_by_hand():
    # Block 1: g1 = (1, 0), g2 = (-1, 1): cosine -1/sqrt 2; |g1 - v1| = 1/sqrt 2 of 1; |g2 - v2| = 1 of sqrt 2.
    # Block 2: (3, 4) and (4, 3): cosine 24/25, no conflict.
    A, B = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    ortho = OrthoLoRA([[A], [B]], 2)
    rows = [([1.0, 0.0], [3.0, 4.0]), ([-1.0, 1.0], [4.0, 3.0])]
    collect(ortho, [A, B], [[torch.tensor(a), torch.tensor(b)] for a, b in rows])
    conflicts = ortho.project()
    torch.testing.assert_close(conflicts.cosines[:, 0, 1], torch.tensor([-(0.5**0.5), 0.96]).double())
    assert conflicts.conflicts.tolist() == [[[False, True], [True, False]], [[False] * 2] * 2]
    torch.testing.assert_close(conflicts.removed, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 0.0]]).double())
    assert conflicts.finite.all()
    # v1 = g1 + 1/2 g2 and v2 = g2 + 1 g1 in block 1: the update is 2 g1 + 3/2 g2. In block 2 it is g1 + g2.
    assert conflicts.weights.tolist() == [[2.0, 1.5], [1.0, 1.0]]
    # Task 1: sqrt((4 · 1 + 1 · 25) / 26). Task 2: sqrt((9/4 · 2 + 1 · 25) / 27). One of two pairs is in conflict.
    torch.testing.assert_close(conflicts.effective, torch.tensor([(29 / 26) ** 0.5, (29.5 / 27) ** 0.5]).double())
    assert conflicts.rate == 0.5
    assert repr(conflicts) == "Conflicts(blocks=2, tasks=2, device='cpu')"


@pytest.mark.parametrize("sequential", [False, True])
def test_projection_is_a_reweighting(sequential):
    # sum_i v_i = sum_j w_j g_j in every block (Kurin et al. 2022, Prop. 3), with the weights that Conflicts reports.
    parameters, ortho, grads = make(5, SHAPES[:-1], sequential=sequential)
    collect(ortho, parameters, grads)
    weights = ortho.project().weights
    assert (weights >= 1).all()
    for block, w, rows in zip(ortho.blocks, weights, rows_of_blocks(ortho, parameters, grads), strict=True):
        torch.testing.assert_close(update_of(block), (w @ rows.double()).float(), atol=1e-5, rtol=1e-5)


def test_rate_is_a_share_of_the_pairs_that_are_there():
    # Pairs (1, 2) and (1, 4) conflict, (2, 4) agrees; task 3 has no gradient. 2 of 3, and not 4 of 16.
    _, ortho = one_block([1.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [-1.0, 2.0])
    torch.testing.assert_close(ortho.project().rate, torch.tensor(2 / 3))
    assert one_block([1.0, 0.0], [0.0, 0.0])[1].project().rate == 0.0  # there is no pair


def test_statistics_come_in_the_callers_order():
    # Blocks of unequal size are sorted inside; the smallest stands last here.
    parameters, ortho, grads = make(2)
    for i, g in enumerate(grads[0]):
        grads[1][i] = -g if i == 5 else g  # parameter 5 is block 4
    collect(ortho, parameters, grads)
    assert ortho.project().conflicts[:, 0, 1].tolist() == [False] * 4 + [True]


# ---------------------------------------------------------------------------------------------------------------------
# Ten steps of training equal ten steps by hand


class Net(nn.Module):
    """Two shared factors and a head for each task."""

    def __init__(self, T):
        super().__init__()
        self.A, self.B = nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(T))

    def loss(self, t, x, y):
        return nn.functional.cross_entropy(self.heads[t](torch.tanh(self.B(torch.tanh(self.A(x))))).float(), y)


@pytest.mark.parametrize("case", ["plain", "accumulation", "autocast", "clipping", "scaler", "weights"])
def test_ten_steps_by_hand(case):
    T, micro = 3, 2 if case == "accumulation" else 1
    torch.manual_seed(0)
    ours, hand = Net(T), Net(T)
    hand.load_state_dict(ours.state_dict())
    weights = [1.0, 0.5, 2.0] if case == "weights" else None
    ortho = OrthoLoRA([[ours.A.weight], [ours.B.weight]], T, weights=weights)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9) for net in (ours, hand)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4, enabled=case == "scaler")
    conflicts = 0
    for step in range(10):
        data = [[(torch.randn(8, 6), torch.randint(2, (8,))) for _ in range(micro)] for _ in range(T)]
        if case == "scaler" and step == 4:
            data[1][0][0][3] = float("inf")
        order = ortho.random_order()

        optimizers[0].zero_grad()
        for t in range(T):
            for x, y in data[t]:
                with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
                    loss = ours.loss(t, x, y) / micro
                scaler.scale(loss).backward()
                ortho.collect(t)
        conflicts += ortho.project(order).conflicts.sum().item()
        scaler.unscale_(optimizers[0])
        if case == "clipping":
            nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        scaler.step(optimizers[0])
        scaler.update()

        if case == "scaler" and step == 4:
            assert scaler.get_scale() == 2.0**8  # 2^8 grew to 2^9 after four good steps; the inf halved it
            continue  # GradScaler must have skipped the step, so by hand there is none
        optimizers[1].zero_grad()
        rows = {}
        for t in range(T):
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
                loss = sum(hand.loss(t, x, y) for x, y in data[t]) / micro
            grads = torch.autograd.grad(loss, [hand.A.weight, hand.B.weight, *hand.heads[t].parameters()])
            for name, g in zip("AB", grads, strict=False):
                rows.setdefault(name, []).append(g.flatten() * (weights[t] if weights else 1.0))
            for p, g in zip(hand.heads[t].parameters(), grads[2:], strict=True):
                p.grad = g
        for name, p in (("A", hand.A.weight), ("B", hand.B.weight)):
            p.grad = project_conflicting(torch.stack(rows[name]), order.tolist()).sum(0).view_as(p)
        if case == "clipping":
            nn.utils.clip_grad_norm_(hand.parameters(), 0.1)
        optimizers[1].step()
    assert conflicts > 0
    tolerance = 2e-3 if case == "autocast" else 1e-5  # bf16 rounds the two ways of adding micro-steps apart
    for a, b in zip(ours.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_without_conflict_training_is_joint_training_to_the_bit():
    # Both tasks are the same task, so their gradients are equal: Ortho-LoRA and joint training are the same run.
    torch.manual_seed(0)
    nets = [Net(1), Net(1)]
    nets[1].load_state_dict(nets[0].state_dict())
    ortho = OrthoLoRA([[nets[0].A.weight], [nets[0].B.weight]], 2)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
    for _ in range(5):
        x, y = torch.randn(8, 6), torch.randint(2, (8,))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            for t in range(2):
                net.loss(0, x, y).backward()
                if net is nets[0]:
                    ortho.collect(t)
            if net is nets[0]:
                ortho.project()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The buffer: rows, weights, stacked gradients, copies


def test_rows_are_the_buffer():
    # What a distributed run averages between collect and project: changing rows changes the result.
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, grads)
    ortho.rows.mul_(2.0)
    ortho.project([[1], [0]])
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = 2 * project_conflicting(rows, [[1], [0]]).sum(0)
        torch.testing.assert_close(update_of(block), expected, atol=1e-5, rtol=1e-5)


def test_a_gradient_stays_what_it_was():
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, grads)
    ortho.project([[1], [0]])
    kept = [p.grad for p in parameters]
    copies = [g.clone() for g in kept]
    torch.optim.SGD(parameters, lr=1.0).zero_grad()
    collect(ortho, parameters, [[-3 * g for g in task] for task in grads])
    ortho.project([[1], [0]])
    assert all(
        torch.equal(g, c) and not torch.equal(g, p.grad) for g, c, p in zip(kept, copies, parameters, strict=True)
    )


def stack_up(parameters, grads):
    """What `lora.per_task` leaves behind for `collect_stacked`: {parameter: something with the stacked .grad}."""
    stacked = [None if task_grads[0] is None else torch.stack(task_grads) for task_grads in zip(*grads, strict=True)]
    return {p: SimpleNamespace(grad=g) for p, g in zip(parameters, stacked, strict=True)}


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_gradients_are_collected_as_single_ones(weights, dtype):
    parameters, loop, grads = make(3, weights=weights, dtype=dtype)
    stacked = OrthoLoRA(loop.blocks, 3, weights=weights)
    for task in grads:
        task[-1] = None  # the last one is not reached by any loss
    for _ in range(2):  # twice, as with gradient accumulation
        for t, task in enumerate(grads):
            for p, g in zip(parameters, task, strict=True):
                p.grad = None if g is None else g.clone()
            loop.collect(t)
        views = stack_up(parameters, grads)
        stacked.collect_stacked(views)
        assert all(view.grad is None for view in views.values())
    assert torch.equal(loop.rows, stacked.rows) and loop.rows.any(1).all()
    stacked.project()
    assert parameters[0].grad.any() and not parameters[-1].grad.any()
    with pytest.raises(RuntimeError, match="zero_grad"):
        stacked.collect_stacked(stack_up(parameters, grads))


@pytest.mark.parametrize("new", [[0.5, 2.0, 0.0], torch.tensor([0.5, 2.0, 0.0])])
def test_weights_may_change_at_any_time(new):
    parameters, loop, grads = make(3)
    stacked = OrthoLoRA(loop.blocks, 3, weights=[9, 9, 9])
    plain = OrthoLoRA(loop.blocks, 3)
    collect(plain, parameters, grads)
    loop.weights = stacked.weights = new
    collect(loop, parameters, grads)
    stacked.collect_stacked(stack_up(parameters, grads))
    for ortho in (loop, stacked):
        assert torch.equal(ortho.rows, torch.tensor([[0.5], [2.0], [0.0]]) * plain.rows)


def through_torch_save(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_multiprocessing(x):
    return pickle.loads(ForkingPickler.dumps(x))  # as to a process that is spawned: the tensors' memory is shared


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save, through_multiprocessing])
def test_a_copy_works_on_its_own(copied):
    # In the middle of a step: rows, weights and the generator's state go along, and the parameters stay the model's.
    model = nn.ParameterList([torch.zeros(8, 3), torch.zeros(3, 5), torch.zeros(2)])
    grads = [[torch.randn_like(p) for p in model] for _ in range(4)]
    ortho = OrthoLoRA([[p] for p in model], 4, weights=[1.0, 2.0, 3.0, 4.0])
    ortho.random_order()
    collect(ortho, model, grads)
    half = ortho.rows.clone()
    other = copied({"model": model, "ortho": ortho})
    model2, ortho2 = other["model"], other["ortho"]
    assert all(block[0] is p is not q for block, p, q in zip(ortho2.blocks, model2, model, strict=True))
    collect(ortho2, model2, grads)
    assert torch.equal(ortho2.rows, 2 * half) and torch.equal(ortho.rows, half)
    ortho2.rows /= 2
    ortho.project(), ortho2.project()  # each draws its own order, from equal states
    assert all(torch.equal(p.grad, q.grad) and p.grad.any() for p, q in zip(model, model2, strict=True))
    assert torch.equal(ortho.random_order(), ortho2.random_order())
    with pytest.raises(RuntimeError, match="zero_grad"):
        ortho2.collect(0)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing waits for the device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_on_the_host(dtype):
    # On the device "meta" there are no numbers, so whatever would wait for one raises; as `check` does, which may wait.
    blocks = [[nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in block] for block in SHAPES]
    parameters = [p for block in blocks for p in block]
    ortho = OrthoLoRA(blocks, 3, weights=[1.0, 2.0, 3.0])
    grads = [[torch.empty_like(p) for p in parameters] for _ in range(3)]
    collect(ortho, parameters, grads)
    ortho.project(torch.empty(3, 2, dtype=torch.long, device="meta"))  # an order that is there already
    for p in parameters:
        p.grad = None
    collect(ortho, parameters, grads)
    ortho.collect_stacked(stack_up(parameters, grads))
    balance(ortho.rows)
    conflicts = ortho.project()
    assert all(p.grad.is_meta and p.grad.dtype == dtype for p in parameters)
    for name in ("cosines", "conflicts", "removed", "finite", "weights", "effective", "rate"):
        assert getattr(conflicts, name).is_meta
    assert repr(conflicts) == "Conflicts(blocks=5, tasks=3, device='meta')"
    with pytest.raises(NotImplementedError):
        conflicts.check()


# ---------------------------------------------------------------------------------------------------------------------
# Misuse is told at once, with its cause


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to_none", [None, False])  # no zero_grad() at all; zero_grad(set_to_none=False)
def test_forgotten_zero_grad(to_none, dtype):
    parameters, ortho, grads = make(2, dtype=dtype)
    collect(ortho, parameters, grads)
    ortho.project()
    if to_none is not None:
        torch.optim.SGD(parameters, lr=1.0).zero_grad(set_to_none=to_none)
    for p in parameters:
        p.sum().backward()  # adds to .grad in place
    before = ortho.rows.clone()
    with pytest.raises(RuntimeError, match="zero_grad.*when accumulating, project once, after the last micro-batch"):
        ortho.collect(0)
    assert torch.equal(ortho.rows, before)
    torch.optim.SGD(parameters, lr=1.0).zero_grad()
    collect(ortho, parameters, grads)  # and goes on after it
    ortho.project()


def test_collect_without_any_gradient():
    parameters, ortho, grads = make(2)
    with pytest.raises(RuntimeError, match="no parameter in blocks has a .grad.*the parameters that the model has now"):
        ortho.collect(0)  # the model was built again, or gradients were taken by autograd.grad
    for p, g in zip(parameters, grads[0], strict=True):
        p.grad = g  # both backward() first, and then
    ortho.collect(0)
    with pytest.raises(RuntimeError, match="right after each task's backward"):
        ortho.collect(1)
    with pytest.raises(RuntimeError, match="inside `with per_task`"):
        ortho.collect_stacked({p: SimpleNamespace(grad=None) for p in parameters})


def test_a_gradient_that_was_not_collected_is_not_lost():
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, grads)
    before = ortho.rows.clone()
    parameters[0].sum().backward()  # a task without its collect, or a penalty on the factors
    with pytest.raises(RuntimeError, match="a .grad is left: collect after each backward"):
        ortho.project()
    assert torch.equal(ortho.rows, before) and torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    parameters[0].grad = None
    ortho.project()
    projected = parameters[0].grad.clone()
    with pytest.raises(RuntimeError, match="a .grad is left: .*project\\(\\) once a step"):
        ortho.project()  # of empty rows: zeros in its place
    assert torch.equal(parameters[0].grad, projected) and projected.any()


def test_a_zero_gradient_is_a_gradient():
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, [[0 * g for g in task] for task in grads])  # as for A while B = 0: nothing is raised


@pytest.mark.parametrize("task", [-1, 2])
def test_there_is_no_such_task(task):
    parameters, ortho, grads = make(2)
    parameters[0].grad = grads[0][0]
    with pytest.raises(ValueError, match=f"task {task} is none of 0 to 1"):
        ortho.collect(task)
    assert parameters[0].grad is grads[0][0] and not ortho.rows.any()


@pytest.mark.parametrize("now", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}])
def test_made_too_early(now):
    # model.to() changes what is in a parameter (.data), not which object it is; the rows stay where and what they were.
    p = nn.Parameter(torch.zeros(2, 3))
    ortho = OrthoLoRA([[p]], 2)
    if "device" in now:  # for a GPU .to() does this; for "meta" torch makes a new parameter, so another stands for it
        ortho.parameters[0] = p = nn.Parameter(torch.zeros(2, 3, **now))
    else:
        p.data = p.data.to(**now)
    p.grad = torch.zeros_like(p)
    with pytest.raises(
        RuntimeError, match=rf"torch.float32 parameter on cpu is .* {p.dtype} on {p.device} now; make OrthoLoRA last"
    ):
        ortho.collect(0)
    with pytest.raises(RuntimeError, match="make OrthoLoRA last"):
        ortho.collect_stacked({p: SimpleNamespace(grad=torch.zeros(2, 2, 3))})


def test_a_parameter_that_has_another_shape_since():
    p = nn.Parameter(torch.zeros(2, 3))
    ortho = OrthoLoRA([[p]], 2)
    p.data = torch.zeros(4)  # as LoRI's mask makes of B the vector of its active entries
    p.grad = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"a \(2, 3\) torch.float32 parameter on cpu is \(4,\) .*OrthoLoRA last"):
        ortho.collect(0)


def test_a_parameter_that_is_frozen_since_stays_where_it_is():
    # a .grad of zeros would let Adam go on along its momentum, and decay the weight
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    ortho, optimizer = OrthoLoRA([[p], [q]], 1), torch.optim.AdamW([p, q], lr=0.1)
    for frozen in (False, True):
        q.requires_grad_(not frozen)
        q.grad = None
        for _ in range(3):
            optimizer.zero_grad()
            (p * q).sum().backward()
            ortho.collect(0)
            ortho.project()
            before = p.detach().clone(), q.detach().clone()
            optimizer.step()
            assert not torch.equal(p, before[0]) and torch.equal(q, before[1]) == frozen
    optimizer.zero_grad()
    (p * q).sum().backward()
    ortho.collect(0)
    q.grad = torch.ones(2)  # somebody's, of before it was frozen, say
    ortho.project()
    assert q.grad.tolist() == [1, 1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("lay", [lambda x: x.mT, lambda x: x.view(1, 3, 2, 2).to(memory_format=torch.channels_last)])
def test_a_parameter_that_is_not_contiguous(lay, make_optimizer, fused):
    # autograd gives .grad the strides of its parameter, and a fused optimizer goes by memory, not by index
    start, targets = torch.arange(12.0).view(4, 3), torch.randn(3, 12)
    found = []
    for projected in (False, True):
        p = nn.Parameter(lay(start.clone()))
        ortho, optimizer = OrthoLoRA([[p]], 1), make_optimizer([p], lr=0.1, fused=fused)
        for target in targets:
            optimizer.zero_grad()
            (p.reshape(-1) @ target).square().backward()
            if projected:
                ortho.collect(0)
                ortho.project()
            optimizer.step()
        found.append(p.detach())
    assert not found[0].is_contiguous() and torch.equal(*found)


@pytest.mark.parametrize("shape", [(1, 8, 24), (3, 8, 24), (2, 24, 8), (2, 24), (2,)])
def test_stacked_gradients_of_another_shape(shape):
    parameters, ortho, _ = make(2)
    views = {p: SimpleNamespace(grad=None) for p in parameters}
    views[parameters[0]].grad = torch.ones(shape)  # most would have been broadcast
    with pytest.raises(ValueError, match=r"not \(2, 8, 24\)"):
        ortho.collect_stacked(views)
    assert not ortho.rows.any()


@pytest.mark.parametrize(
    "order",
    [[[0, 1], [0, 2], [0, 1]], [[1, 1], [0, 2], [0, 1]], [[1], [0], [0]], [[1, 2], [0, 2]], [[1, 3]] * 3, [1, 2]],
)
def test_order_that_is_none(order):
    parameters, ortho, grads = make(3)
    collect(ortho, parameters, grads)
    for given in (order, torch.tensor(order)):
        with pytest.raises(ValueError, match="names all tasks but i"):
            ortho.project(given)
    ortho.project([[1, 2], [0, 2], [0, 1]])


def test_sharded_parameters():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        p = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.zeros(4, 2), mesh))
        wrapped = FullyShardedDataParallel(nn.Linear(4, 2), use_orig_params=True, device_id=torch.device("cpu"))
        for sharded in (p, wrapped.weight):  # FSDP2's, and FSDP1's, which look like whole ones
            with pytest.raises(ValueError, match="FSDP2 in docs/recipes.md"):
                OrthoLoRA([[sharded]], 2)
    finally:
        torch.distributed.destroy_process_group()


def test_one_for_each_device_is_as_good_as_one():
    # As the refusal of parameters on several devices has it: their default generators draw the same order.
    parameters, ortho, grads = make(4)
    apart = [OrthoLoRA(ortho.blocks[:2], 4), OrthoLoRA(ortho.blocks[2:], 4)]
    for _ in range(3):
        collect(ortho, parameters, grads)
        ortho.project()
        expected = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        for t, task in enumerate(grads):
            for p, g in zip(parameters, task, strict=True):
                p.grad = g.clone()
            for one in apart:
                one.collect(t)
        for one in apart:
            one.project()
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
        for p in parameters:
            p.grad = None


def test_bad_arguments():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    elsewhere = nn.Parameter(torch.zeros(2, device="meta"))
    for blocks, T, weights, message in (
        ([p, q], 2, None, r"a list of lists: \[\[p\] for p in parameters\]"),
        (iter([p, q]), 2, None, "a list of lists"),
        ([], 2, None, "no parameter"),
        ([[p], []], 2, None, "no parameter"),
        ([[p], [q, p]], 2, None, "in blocks twice"),
        ([[p]], 0, None, "num_tasks=0"),
        ([[p]], 2, [1.0], r"weights=\[1.0\]"),
        ([[p], [frozen]], 2, None, "frozen"),
        ([[p * 2]], 2, None, "computed from others"),
        ([[p], [elsewhere]], 2, None, "several devices"),
    ):
        with pytest.raises(ValueError, match=message):
            OrthoLoRA(blocks, T, weights=weights)
    with pytest.raises(TypeError):
        OrthoLoRA([[p]], 2, balance=True)  # `balance(ortho.rows)` now
