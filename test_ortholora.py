"""The specification of Ortho-LoRA, as tests. Read it from top to bottom.

The reference: for everything fast, the textbook function; for that, torchjd's PCGrad and numbers worked out by hand.
"""

from unittest import mock

import pytest
import torch
from torch import nn
from torchjd.aggregation import PCGrad

from ortholora import OrthoLoRA, combine, full_float32, project_conflicting, projection_coefficients

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


# ---------------------------------------------------------------------------------------------------------------------
# The rule, by hand


def test_two_conflicting_gradients():
    # <g1, g2> = -1. v1 = g1 + 1/2 g2 = (.5, .5); v2 = g2 + 1/1 g1 = (0, 1).
    v = project_conflicting(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), [[1], [0]])
    assert v.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert v.sum(0).tolist() == [0.5, 1.5]


def test_sequential_reference_differs():
    # v1 = (.5, .5) as before, but g2 now meets v1, not g1: <g2, v1> = 0, so v2 = g2.
    v = project_conflicting(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), [[1], [0]], sequential=True)
    assert v.sum(0).tolist() == [-0.5, 1.5]


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
@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])  # few conflicts, half of them, many against one task
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
    parameters, ortho, grads = make(T, sequential=sequential)
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = project_conflicting(rows, order.tolist(), sequential).sum(0)
        assert (update_of(block) - expected).norm() <= 1e-5 * rows.norm(dim=1).sum()


def test_order_is_used_and_seeded():
    orders = [make(5, generator=torch.Generator().manual_seed(s))[1].random_order() for s in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    for i, others in enumerate(orders[0].tolist()):
        assert sorted(others) == [j for j in range(5) if j != i]
    ortho = make(3)[1]
    first = torch.stack([ortho.random_order() for _ in range(600)])[:, 0, 0]
    assert 200 < (first == 1).sum() < 400  # task 0 meets 1 or 2 first, evenly


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
    torch.testing.assert_close(conflicts.removed, torch.ones(5, 2), atol=1e-3, rtol=0)


def test_zero_gradient_is_no_conflict():
    # The first step of LoRA: B = 0, so every task's gradient of A is exactly zero.
    parameters, ortho, grads = make(3)
    collect(ortho, parameters, [[0 * g for g in task] for task in grads])
    conflicts = ortho.project()
    for x in (conflicts.cosines, conflicts.conflicts, conflicts.removed):
        assert not x.any()  # and no NaN, which would count as true
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


def test_products_are_float32_under_autocast_and_fast_matmul():
    _, ortho, grads = make(6, [[(64, 96)]])
    rows = torch.stack([task[0].flatten() for task in grads])[None]
    exact = rows.double() @ rows.double().mT
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # allows bf16 inside, on processors that have it
        fast = rows @ rows.mT
        with torch.autocast("cpu", torch.bfloat16), full_float32("cpu"):
            gram = rows @ rows.mT
            assert gram.dtype == torch.float32 and (gram - exact).abs().max() < 1e-6 * exact.max()
        assert torch.get_float32_matmul_precision() == "medium" and torch.equal(rows @ rows.mT, fast)  # given back
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        parameters, ortho, grads = make(6, [[(64, 96)]])
        collect(ortho, parameters, grads)
        order = ortho.random_order()
        conflicts = ortho.project(order)
    C = projection_coefficients(exact, order)
    gone = ((C @ rows.double() - rows.double()).norm(dim=2) / rows.double().norm(dim=2)).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conflicts.removed, gone, atol=1e-5, rtol=1e-5)  # worked out here
    norms = exact.diagonal(dim1=1, dim2=2).sqrt()
    expected = exact / norms[:, :, None] / norms[:, None]
    torch.testing.assert_close(conflicts.cosines.double(), expected, atol=1e-6, rtol=1e-5)


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


def test_combine_adds_from_first_to_last():
    grads = torch.tensor([[[1e8], [1.0], [-1e8]]])  # (1 + 1e8) - 1e8 = 0 in float32, in this order only
    assert combine(grads, torch.ones(1, 3)).item() == (torch.tensor(1e8) + 1.0 - 1e8).item() == 0.0
    assert combine(grads, torch.tensor([[1.0, 2.0, 0.0]]), clear=True).item() == 1e8 and not grads.any()


# ---------------------------------------------------------------------------------------------------------------------
# Balance


def test_balance_by_hand():
    # Over both blocks |g1| = 5 and |g2| = sqrt(2 + 7) = 3, mean 4: s = (4/5, 4/3). In A they conflict, as at the top,
    # v1 = (1.5, 1.5) and v2 = (0, 1); in B they agree.
    A, B = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    grads = [[torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([-1.0, 1.0]), torch.tensor([7**0.5])]]
    ortho = OrthoLoRA([[A], [B]], 2, balance=True)
    collect(ortho, [A, B], grads)
    ortho.project()
    torch.testing.assert_close(A.grad, torch.tensor([1.2, 1.2 + 4 / 3]))
    torch.testing.assert_close(B.grad, torch.tensor([3.2 + 4 / 3 * 7**0.5]))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("T", range(1, 9))
def test_balance_is_projection_of_the_scaled_gradients(T, sequential):
    shapes = SHAPES[:-1] if sequential else SHAPES  # in one dimension v_j may be all rounding error, and is a reference
    parameters, ortho, grads = make(T, shapes, balance=True, sequential=sequential)
    grads = [[10.0**-t * g for g in task] for t, task in enumerate(grads)]
    order = ortho.random_order()
    collect(ortho, parameters, grads)
    ortho.project(order)
    norms = torch.stack([torch.cat([g.flatten() for g in task]).norm() for task in grads])  # over all blocks
    scaled = [[norms.mean() / norm * g for g in task] for norm, task in zip(norms, grads, strict=True)]
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, scaled), strict=True):
        expected = project_conflicting(rows, order.tolist(), sequential).sum(0)
        assert (update_of(block) - expected).norm() <= 1e-5 * rows.norm(dim=1).sum()


def test_balance_alone():
    parameters, ortho, grads = make(3, balance=True, surgery=False)
    grads[1] = [0 * g for g in grads[1]]  # a task without a gradient takes no part
    grads[2] = [-4 * g for g in grads[0]]  # and opposite ones of the same size cancel, unprojected
    collect(ortho, parameters, grads)
    conflicts = ortho.project()
    assert all(p.grad.abs().max() <= 1e-6 * g.norm() for p, g in zip(parameters, grads[2], strict=True))
    assert conflicts.conflicts[:, 0, 2].all() and not conflicts.removed.any()  # they are seen, and nothing is taken


def test_without_surgery_or_balance_it_is_the_sum_to_the_bit():
    parameters, ortho, grads = make(2, surgery=False)
    collect(ortho, parameters, grads)
    assert ortho.project([[1], [0]]).conflicts.any()  # whatever order is given
    assert all(torch.equal(p.grad, a + b) for p, a, b in zip(parameters, *grads, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_balance_lets_what_is_not_finite_through(bad):
    parameters, ortho, grads = make(2, balance=True)
    grads[1][0][0] = bad
    collect(ortho, parameters, grads)
    ortho.project()
    assert not torch.isfinite(parameters[0].grad).all()


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
    torch.testing.assert_close(conflicts.cosines[:, 0, 1], torch.tensor([-(0.5**0.5), 0.96]))
    assert conflicts.conflicts.tolist() == [[[False, True], [True, False]], [[False] * 2] * 2]
    torch.testing.assert_close(conflicts.removed, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 0.0]]))
    assert conflicts.finite.all()


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
# Misuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to_none", [None, False])  # no zero_grad() at all; zero_grad(set_to_none=False)
def test_forgotten_zero_grad_is_an_error(to_none, dtype):
    parameters, ortho, grads = make(2, dtype=dtype)
    collect(ortho, parameters, grads)
    ortho.project()
    if to_none is not None:
        torch.optim.SGD(parameters, lr=1.0).zero_grad(set_to_none=to_none)
    for p in parameters:
        p.sum().backward()  # adds to .grad in place
    before = ortho.rows.clone()
    with pytest.raises(RuntimeError, match="zero_grad"):
        ortho.collect(0)
    assert torch.equal(ortho.rows, before)
    torch.optim.SGD(parameters, lr=1.0).zero_grad()
    collect(ortho, parameters, grads)  # and goes on after it
    ortho.project()


def test_rows_are_the_buffer():
    # What a distributed run averages between collect and project: changing rows changes the result.
    parameters, ortho, grads = make(2)
    collect(ortho, parameters, grads)
    ortho.rows.mul_(2.0)
    ortho.project(torch.tensor([[1], [0]]))
    for block, rows in zip(ortho.blocks, rows_of_blocks(ortho, parameters, grads), strict=True):
        expected = 2 * project_conflicting(rows, [[1], [0]]).sum(0)
        torch.testing.assert_close(update_of(block), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_stacked_gradients_are_collected_as_single_ones(weights):
    parameters, loop, grads = make(3, weights=weights)
    stacked = OrthoLoRA(loop.blocks, 3, weights=weights)
    views = {p: p.detach().expand(3, *p.shape).requires_grad_() for p in parameters}
    for _ in range(2):  # twice, as with gradient accumulation
        collect(loop, parameters, grads)
        for i, p in enumerate(parameters[:-1]):  # the last one is not reached by any loss
            views[p].grad = torch.stack([task[i] for task in grads])
        stacked.collect_stacked(views)
        assert all(view.grad is None for view in views.values())
    ends = [p.numel() for p in loop.parameters].index(1)  # where the last one, of one number, lies
    loop.views[0][ends].zero_(), loop.views[1][ends].zero_(), loop.views[2][ends].zero_()
    assert torch.equal(loop.rows, stacked.rows) and loop.rows.abs().sum() > 0
    stacked.project()
    with pytest.raises(RuntimeError, match="zero_grad"):
        stacked.collect_stacked(views)


def test_stacked_without_any_gradient_is_an_error():
    parameters, ortho, _ = make(2)
    with pytest.raises(RuntimeError, match="backward"):  # called where per_task was over, or not at all
        ortho.collect_stacked({p: p.detach().expand(2, *p.shape).requires_grad_() for p in parameters})


def test_stacked_gradients_of_another_number_of_tasks_are_an_error():
    parameters, ortho, _ = make(2)
    views = {p: p.detach().expand(1, *p.shape).requires_grad_() for p in parameters}  # would be added to both rows
    for view in views.values():
        view.sum().backward()
    with pytest.raises(ValueError, match="of 1 tasks"):
        ortho.collect_stacked(views)
    assert not ortho.rows.any()


def test_bad_arguments():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    for blocks, T, weights in (
        ([], 2, None),
        ([[p], []], 2, None),
        ([[p], [q, p]], 2, None),
        ([[p]], 0, None),
        ([[p]], 2, [1.0]),
        ([[p], [frozen]], 2, None),
        ([[p * 2]], 2, None),
    ):
        with pytest.raises(ValueError, match="OrthoLoRA"):
            OrthoLoRA(blocks, T, weights=weights)
