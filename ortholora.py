"""Ortho-LoRA: take each task's gradient, find the conflicting pairs, project them off one another.

For every block of parameters (by default every LoRA factor, each A and each B, is a block of its own) and task i:

    v_i = g_i;   for each other task j, in random order:   if <v_i, g_j> < 0:   v_i -= <v_i, g_j> / |g_j|^2 g_j

and the optimizer gets sum_i v_i. The method: arXiv 2601.09684; the rule: PCGrad, arXiv 2001.06782.

This file needs torch alone and is meant to be pasted. It reads in three steps: `project_conflicting` is the textbook,
`projection_coefficients` the same for all blocks at once, `OrthoLoRA` the bookkeeping around `loss.backward()`.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch


def project_conflicting(grads, order, sequential=False):
    """One block, as the textbook has it.

    grads: (T, n), row i is g_i. order: (T, T - 1), row i names the other tasks in the order in which g_i meets them.
    Returns (T, n), row i is v_i. The g_j that v_i is held against is the original one (PCGrad's rule);
    `sequential=True` takes what has become of it so far, v_j, instead. Needs no epsilon: a zero g_j is in conflict with
    nobody, and one so short that its square is zero in this dtype counts as zero.
    """
    v = grads.clone()
    references = v if sequential else grads
    for i, others in enumerate(order):
        for j in others:
            dot, size = v[i] @ references[j], references[j] @ references[j]
            if dot < 0 and size > 0:
                v[i] -= dot / size * references[j]
    return v


def projection_coefficients(gram, order):
    """The same in coefficient space: every v_i is a combination of the original gradients, v_i = sum_j C_ij g_j.

    gram: (blocks, T, T), gram_ij = <g_i, g_j>. order: (T, T - 1), as above, for all blocks. Returns C, (blocks, T, T)
    in float32 or better. All blocks and all tasks i move together, so this takes T - 1 dependent steps and never looks
    at a number on the host. With no conflict C is exactly the identity.
    """
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    order = torch.as_tensor(order, device=gram.device)
    sizes = gram.diagonal(dim1=1, dim2=2)[..., None]  # (blocks, T, 1): |g_j|^2
    turn = -gram / torch.where(sizes > 0, sizes, torch.inf)  # (blocks, T, T): -<g_j, g_k> / |g_j|^2, 0 for a zero g_j
    C = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    places = order.expand(len(gram), -1, -1).split(1, dim=2)  # (blocks, T, 1) each
    for j, place in zip(order.unbind(1), places, strict=False):  # j: (T,), the task that each i meets now; T = 1: none
        c = (C * turn.index_select(1, j)).sum(2, keepdim=True)  # (blocks, T, 1): -<v_i, g_j> / |g_j|^2
        C.scatter_(2, place, c.clamp_(min=0))
    return C


def balancing_scales(gram):
    """s_i = mean_j |g_j| / |g_i|, so that every s_i g_i has the same norm over all blocks: (blocks, T, T) -> (T,).

    Not in the paper. Without it a task moves the adapter as far as its gradient is long, and one with short gradients
    is drowned by the others, in conflict or not. v_i grows with the length of g_i and ignores that of the other g_j, so
    scaling the gradients before the projection, or what it made of them, is the same.
    """
    norms = gram.diagonal(dim1=1, dim2=2).sum(0).sqrt()  # (T,)
    return norms.mean() / torch.where(norms > 0, norms, torch.inf)  # 0 for a zero gradient


def combine(grads, weights, out=None, clear=False):
    """sum_j w_j g_j from first to last, (k, T, n) and (k, T) -> (k, n). Weights of 1 give the plain sum, to the bit.

    clear: set each g_j to zero once it has been read, while it is still in the processor's cache.
    """
    for j, (g, w) in enumerate(zip(grads.unbind(1), weights[..., None].unbind(1), strict=True)):  # (k, n), (k, 1)
        out = torch.mul(g, w, out=out) if j == 0 else out.addcmul_(g, w)
        if clear:
            g.zero_()
    return out


@contextlib.contextmanager
def full_float32(device):
    """Products of float32 in float32: no autocast, no TF32 or bf16 shortcut (whose switches are process-wide)."""
    device = torch.device(device).type
    backend = torch.backends.cuda.matmul if device == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(backend, "fp32_precision"):  # torch >= 2.9; before, one switch for all
        before, full, switch = backend.fp32_precision, "ieee", partial(setattr, backend, "fp32_precision")
    else:
        before, full, switch = torch.get_float32_matmul_precision(), "highest", torch.set_float32_matmul_precision
    shortcut = before not in ("none", full)
    if shortcut:
        switch(full)
    try:
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
            yield
    finally:
        if shortcut:
            switch(before)


def removed_squares(gram, C):
    """|v_i - g_i|^2, out of v_i - g_i = sum_j D_ij g_j with D = C - 1: (blocks, T, T) twice -> (blocks, T)."""
    D = C - torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
    with full_float32(C.device):
        return ((D @ gram) * D).sum(2)


@dataclass
class Conflicts:
    """What one `project()` saw, worked out when asked, on the device, where it stays until someone reads it. T tasks.

    cosines    (blocks, T, T)  of the original gradients; 0 where one of the two is zero
    conflicts  (blocks, T, T)  bool: cosine < 0, so the diagonal is false
    removed    (blocks, T)     |g_i - v_i| / |g_i|, the share of task i's gradient that projection took; 0 if g_i is 0
    finite     (blocks, T)     bool: |g_i|^2 is finite in float32, so no NaN, no infinity, no norm beyond 1.8e19
    parameters [[tensor]]      the blocks themselves, for names in messages

    Read `finite`, or call `check`, before you trust the others: what is not finite counts as 0 there.
    """

    gram: torch.Tensor  # (blocks, T, T), in the buffer's order
    gone: Callable  # () -> (blocks, T): |g_i - v_i|^2
    places: torch.Tensor  # (blocks,): where each of the caller's blocks is in these
    parameters: list

    @cached_property
    def cosines(self):
        norms = self._sizes.sqrt()
        return (self.gram[self.places] / (norms[:, :, None] * norms[:, None, :])).nan_to_num(0.0, 0.0, 0.0)

    @cached_property
    def conflicts(self):
        return self.cosines < 0

    @cached_property
    def removed(self):
        return (self.gone()[self.places].clamp(min=0) / self._sizes).sqrt().nan_to_num(0.0, 0.0, 0.0)

    @cached_property
    def finite(self):
        return self._sizes.isfinite()

    @cached_property
    def _sizes(self):
        return self.gram.diagonal(dim1=1, dim2=2)[self.places]  # (blocks, T): |g_i|^2

    def check(self, model=None, tasks=None):
        """Raise FloatingPointError if a gradient was not finite, naming task and parameter (by name, given the model).

        This reads from the device, so it waits for it: call it when you log, not at every step. (With GradScaler a step
        that overflows is nothing unusual: check where `scaler.get_scale()` keeps falling.)
        """
        bad = (~self.finite).nonzero()
        if len(bad):
            block, task = bad[0].tolist()
            names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
            block_parameters = [names.get(id(p), f"a tensor {tuple(p.shape)}") for p in self.parameters[block]]
            where = f"block {block}: {', '.join(block_parameters[:3])}{', …' * (len(block_parameters) > 3)}"
            raise FloatingPointError(f"the gradient of task {tasks[task] if tasks else task} is not finite in {where}")


class OrthoLoRA:
    """Per-task gradients in, one projected gradient out.

        ortho = OrthoLoRA(blocks, num_tasks=len(tasks))
        for each step:
            optimizer.zero_grad()
            for t in range(len(tasks)):
                loss(t).backward()
                ortho.collect(t)
            conflicts = ortho.project()
            optimizer.step()

    blocks: a list of lists of parameters. The tensors of one inner list are projected as one vector, so the unit of
    projection is data: [[A1], [B1], [A2], ...] is Ortho-LoRA, [[A1, A2, ...], [B1, B2, ...]] is by role, [[everything]]
    is PCGrad. A parameter in no block (a task's head, a frozen factor) is never touched: its gradients just add up.
    weights: one number per task, g_t = w_t dL_t in the blocks (default 1). generator: draws the order, on the CPU.
    sequential: hold v_i against v_j, not g_j; only for comparison, it runs the textbook block by block.
    balance: write sum_i s_i v_i, s_i of `balancing_scales`, which leaves no say to `weights` but in the scale of all.
    surgery=False: project nothing, v_i = g_i; to balance alone, or to watch the conflicts of joint training.
    """

    def __init__(
        self, blocks, num_tasks, *, weights=None, generator=None, sequential=False, balance=False, surgery=True
    ):
        self.blocks = [list(block) for block in blocks]
        parameters = [p for block in self.blocks for p in block]
        if not parameters or not all(self.blocks):
            raise ValueError("OrthoLoRA: there is no parameter to project in blocks (or in one of them)")
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("OrthoLoRA: a parameter is in more than one block")
        if not all(p.is_leaf and p.requires_grad for p in parameters):
            raise ValueError("OrthoLoRA: a tensor in blocks never gets a .grad: it is frozen, or computed from others")
        if len({p.device for p in parameters}) > 1:
            raise ValueError("OrthoLoRA: the parameters in blocks are on several devices")
        if num_tasks < 1 or (weights is not None and len(weights) != num_tasks):
            raise ValueError(f"OrthoLoRA: num_tasks={num_tasks}, weights={weights}")
        self.num_tasks, self.generator, self.sequential = num_tasks, generator, sequential
        self.balance, self.surgery = balance, surgery
        others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
        self.others = torch.tensor(others, dtype=torch.long, device="cpu")  # (T, T - 1)
        self.weights = [1.0] * num_tasks if weights is None else [float(w) for w in weights]

        # One buffer holds every task's gradient. Blocks of one size lie side by side in it, so that k blocks of n are
        # one view (k, T, n): blocks of sizes 6, 2, 6 lie as 2, 6, 6, which is (1, T, 2) and (2, T, 6). Within a size,
        # blocks of one shape come together, so that their parameters are one view, too.
        sizes = [sum(p.numel() for p in block) for block in self.blocks]
        layout = sorted(range(len(sizes)), key=lambda b: (sizes[b], [p.shape for p in self.blocks[b]]))
        by_size = [(sizes.count(n), n) for n in sorted(set(sizes))]
        parts = [k * n for k, n in by_size]
        self.places = torch.tensor(layout, device=parameters[0].device).argsort()
        self.parameters = [p for b in layout for p in self.blocks[b]]
        self.runs = [(len(list(run)), shape) for shape, run in itertools.groupby(p.shape for p in self.parameters)]
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        self.rows = torch.zeros(num_tasks, sum(sizes), dtype=dtype, device=parameters[0].device)  # (T, P)
        self.weights_column = self.rows.new_tensor(self.weights)[:, None]  # (T, 1)
        self.views = [self._per_parameter(row) for row in self.rows]
        self.stacks = [
            part.unflatten(1, kn).transpose(0, 1)  # (k, T, n) for each size of block
            for part, kn in zip(self.rows.split(parts, 1), by_size, strict=True)
        ]
        self.update = self.rows.new_zeros(sum(sizes))  # (P,): what project() writes, each .grad a view of it
        exact = self._per_parameter(self.update)
        self.grads = [g.to(p.dtype) for g, p in zip(exact, self.parameters, strict=True)]  # or a copy in p's dtype
        self.cast = [pair for pair in zip(self.grads, exact, strict=True) if pair[0] is not pair[1]]
        self.sums = [part.view(kn) for part, kn in zip(self.update.split(parts), by_size, strict=True)]  # (k, n)

    def _per_parameter(self, row):
        """A vector (P,) as one view per parameter."""
        parts = row.split([count * shape.numel() for count, shape in self.runs])
        views = [part.view(count, *shape).unbind() for part, (count, shape) in zip(parts, self.runs, strict=True)]
        return list(itertools.chain(*views))

    @torch.no_grad()
    def collect(self, task):
        """After `task`'s backward(): add each parameter's .grad to the task's row, and clear it, without waiting.

        Call it once for each micro-batch; to give up a step half-way, `ortho.rows.zero_()`. Raises RuntimeError where
        .grad is still the tensor that `project` wrote.
        """
        self._check_cleared()
        pairs = [(v, p.grad) for v, p in zip(self.views[task], self.parameters, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_add_(*zip(*pairs, strict=True), alpha=self.weights[task])
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def collect_stacked(self, grads):
        """After the one backward() of `lora.per_task`: add every task's gradient to its row.

        grads: {parameter: its view}; a view's .grad is (T, *parameter.shape), or None where no loss depended on it.
        Raises RuntimeError as `collect` does, and where no gradient came at all; ValueError where they are those of
        another number of tasks; KeyError where a parameter of the blocks is not in grads.
        """
        self._check_cleared()
        found = [grads[p].grad for p in self.parameters]
        if all(g is None for g in found):
            raise RuntimeError("OrthoLoRA.collect_stacked: no gradient came; call backward() inside `with per_task`")
        stacked = next(len(g) for g in found if g is not None)
        if stacked != self.num_tasks:
            raise ValueError(f"OrthoLoRA: gradients of {stacked} tasks stacked, but num_tasks={self.num_tasks}")
        found = [
            p.new_zeros(self.num_tasks, p.numel()) if g is None else g.flatten(1)
            for g, p in zip(found, self.parameters, strict=True)
        ]
        self.rows.addcmul_(torch.cat(found, 1).to(self.rows.dtype), self.weights_column)
        for p in self.parameters:
            grads[p].grad = None

    def _check_cleared(self):
        for p, written in zip(self.parameters, self.grads, strict=True):
            if p.grad is written:
                raise RuntimeError(
                    "OrthoLoRA: .grad still holds the last projected gradient; call optimizer.zero_grad() "
                    "(with set_to_none=True, its default) before the first backward() of a step"
                )

    @torch.no_grad()
    def project(self, order=None):
        """Write sum_i v_i into every .grad, zeros where no task had a gradient, clear the rows, and return the
        `Conflicts`. (The next call writes the same memory anew: clone a .grad to keep it.)

        order: (T, T - 1) as in `project_conflicting`; by default drawn at random. A gradient that isn't finite is never
        projected away: it makes .grad not finite as well, so GradScaler skips the step as it should.
        With one task, or no conflict, a float32 .grad is, to the bit, the rows added from first to last (but for
        `balance`).
        """
        order = self.random_order() if order is None or not self.surgery else torch.as_tensor(order)
        with full_float32(self.rows.device):
            gram = torch.cat([g @ g.mT for g in self.stacks])  # (blocks, T, T)
            if self.sequential:
                v = [torch.stack([project_conflicting(rows, order.tolist(), True) for rows in g]) for g in self.stacks]
                taken = torch.cat([(g - x).square().sum(2) for g, x in zip(self.stacks, v, strict=True)])  # (blocks, T)
                scales = balancing_scales(gram) if self.balance else torch.ones_like(gram[0, 0])  # (T,)
                gone, weights = lambda: taken, scales.expand(len(gram), -1)  # (blocks, T)
                self.rows.zero_()  # v is a copy
            else:
                if gram.is_cuda and not order.is_cuda:  # from pinned memory the copy waits for nothing
                    order = order.pin_memory().to(gram.device, non_blocking=True)
                C = projection_coefficients(gram, order)
                v, gone = self.stacks, partial(removed_squares, gram, C)
                C = balancing_scales(gram)[:, None] * C if self.balance else C
                weights = C.sum(1)  # (blocks, T): sum_i s_i v_i = sum_j (sum_i s_i C_ij) g_j
            for x, w, out in zip(v, weights.split([len(g) for g in self.stacks]), self.sums, strict=True):
                combine(x, w, out=out, clear=not self.sequential)
        if self.cast:
            torch._foreach_copy_(*zip(*self.cast, strict=True))
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad
        return Conflicts(gram, gone, self.places, self.blocks)

    def random_order(self):
        """(T, T - 1): for each task the others, in an order drawn from `generator`."""
        if not self.surgery:
            return self.others[:, :0]  # nobody meets anybody
        draws = torch.rand(self.others.shape, generator=self.generator, device="cpu")
        return self.others.gather(1, draws.argsort(1))
