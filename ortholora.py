"""Ortho-LoRA: take each task's gradient, find the conflicting pairs, project them off one another.

For every block of parameters (in Ortho-LoRA every LoRA factor, each A and each B, is one of its own) and task i:

    v_i = g_i;   for each other task j, in random order:   if <v_i, g_j> < 0:   v_i -= <v_i, g_j> / |g_j|^2 g_j

and the optimizer gets sum_i v_i. The method: arXiv 2601.09684; the rule: PCGrad, arXiv 2001.06782.

This file needs torch alone and is meant to be pasted. It reads in three steps: `project_conflicting` is the textbook,
`projection_coefficients` the same for all blocks at once, `OrthoLoRA` the bookkeeping around `loss.backward()`; the
rest serves these. Apache-2.0, from "Ortho-LoRA and LoRI: a reference implementation"; test_ortholora.py specifies it.
"""

import torch


def project_conflicting(grads, order, sequential=False):
    """One block, as the textbook has it.

    grads: (T, n), row i is g_i. order: (T, T - 1), row i names the other tasks in the order in which g_i meets them.
    Returns (T, n), row i is v_i. The g_j that v_i is held against is the original one (PCGrad's rule);
    `sequential=True` takes what has become of it so far, v_j, instead. Needs no epsilon: a zero g_j is in conflict with
    nobody, and one so short that its square is zero in this dtype counts as zero (squares may overflow: cast up).
    """
    v = grads.clone()
    references = v if sequential else grads
    for i, others in enumerate(order):
        for j in others:
            dot, square = v[i] @ references[j], references[j] @ references[j]
            if dot < 0 and square > 0:
                v[i] -= dot / square * references[j]
    return v


def projection_coefficients(gram, order):
    """The same in coefficient space: every v_i is a combination of the original gradients, v_i = sum_j C_ij g_j.

    gram: (blocks, T, T), gram_ij = <g_i, g_j>. order: (T, T - 1) as above, or (T, 0): nobody meets anybody. Returns C,
    (blocks, T, T) in float32 or better, C_ii = 1, C_ij >= 0, with no conflict exactly the identity. All blocks and all
    tasks i move together, so this takes T - 1 dependent steps and never looks at a number on the host.
    """
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    squares = gram.diagonal(dim1=1, dim2=2)[:, None]  # (blocks, 1, T): |g_j|^2
    c_g = -gram / torch.where(squares > 0, squares, torch.inf)  # (blocks, T, T): g_i + c_ij g_j is orthogonal to g_j
    c_v = c_g.clone()  # the same of v_i, which begins as g_i
    C = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    for j in torch.as_tensor(order, dtype=torch.long, device=gram.device).unbind(1):  # (T,): whom each i meets now
        place = j.expand(len(gram), -1)[..., None]  # (blocks, T, 1)
        c = c_v.gather(2, place).clamp_(min=0)
        C.scatter_(2, place, c)  # v_i += c g_j: i meets j once, so C_ij was 0
        c_v.addcmul_(c, c_g[:, j])  # v_i grew by c g_j, so c_v by c times c_g's row j
    return C


def sequential_coefficients(gram, order):
    """The same where v_i meets v_j, not g_j; C in gram's dtype. A v_j that is only rounding error counts as zero."""
    C = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    noise = 100 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2)  # (blocks, T)
    for i, others in enumerate(torch.as_tensor(order).tolist()):
        for j in others:
            along = (gram * C[:, j, None]).sum(2)  # (blocks, T): <g_k, v_j>
            dot, square = (C[:, i] * along).sum(1), (C[:, j] * along).sum(1)  # (blocks,): <v_i, v_j>, |v_j|^2
            c = -dot / torch.where(square > noise[:, j], square, torch.inf)
            C[:, i] += c.clamp_(min=0)[:, None] * C[:, j]
    return C


def gram_matrix(grads):
    """<g_i, g_j> in each block, (k, T, n) -> (k, T, T), in float64 (on mps float32): no square of a float32 over- or
    underflows, and neither autocast nor TF32 touches it. Summed by pieces of n, without a copy of the whole."""
    k, T, n = grads.shape
    dtype = torch.float32 if grads.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    gram = torch.zeros(k, T, T, dtype=dtype, device=grads.device)
    room = torch.empty(k, T, min(n, max(64, 2**18 // (k * T))), dtype=dtype, device=grads.device)  # 2 MiB, in the cache
    for piece in grads.split(room.shape[2], dim=2):
        g = room[..., : piece.shape[2]].copy_(piece)
        gram.baddbmm_(g, g.mT)  # in place, which autocast leaves alone in float32, too
    return gram


def balance(rows):
    """Scale every task's row of `OrthoLoRA.rows`, (T, P), in place to the mean norm of the tasks that have a gradient.

    Call it between `collect` and `project`. Not the paper's, but after DB-MTL (arXiv 2308.12029): else long gradients
    drown short ones, in conflict or not. Rows of zeros or not finite stay so, out of the mean. Waits for nothing.
    """
    norms = gram_matrix(rows[:, None])[:, 0, 0].sqrt()  # (T,), as T blocks of one task
    norms = norms.where(norms.isfinite(), 0.0)
    scales = norms.sum() / norms.count_nonzero().clamp(min=1) / torch.where(norms == 0, 1.0, norms)
    rows *= scales.clamp(max=torch.finfo(rows.dtype).max).to(rows.dtype)[:, None]


class Conflicts:
    """What one `project()` of T tasks saw: tensors on the device, worked out when asked for; only reading them waits.

    cosines   (blocks, T, T)  of the original gradients; 0 where one of the two is zero
    conflicts (blocks, T, T)  bool: cosine < 0, so the diagonal is false
    removed   (blocks, T)     |g_i - v_i| / |g_i|, how far projection moved it, at most 1 for T = 2; 0 if g_i is 0
    finite    (blocks, T)     bool: no NaN and no infinity in g_i (their sum may still overflow); else 0 above
    weights   (blocks, T)     w_j = sum_i C_ij >= 1, the factor that the update gives g_j: sum_i v_i = sum_j w_j g_j, so
                              projection is a reweighting (Kurin et al. 2022, arXiv 2201.04122, Prop. 3)
    effective (T,)            sqrt(sum_blocks w^2 |g|^2 / sum_blocks |g|^2), one weight per task; 1 without a gradient
    rate      ()              the share in conflict of the pairs i < j where both have a gradient; 0 without any

    Read `finite` first, or call `check`: else weights and effective may be NaN. Blocks are in the caller's order.
    """

    def __init__(self, gram, C, blocks):
        self.gram, self.C, self.blocks = gram, C, blocks  # <g_i, g_j>; v_i = sum_j C_ij g_j; the parameters, for names
        self.squares = gram.diagonal(dim1=1, dim2=2)  # (blocks, T): |g_i|^2
        self.finite, self.weights = self.squares.isfinite(), C.sum(1)

    def __repr__(self):
        return f"Conflicts(blocks={len(self.C)}, tasks={self.C.shape[1]}, device={str(self.C.device)!r})"

    @property
    def cosines(self):
        norms = self.squares.sqrt()
        return (self.gram / (norms[:, :, None] * norms[:, None])).nan_to_num(0.0, 0.0, 0.0)

    @property
    def conflicts(self):
        return self.cosines < 0

    @property
    def removed(self):
        D = self.C - torch.eye(self.C.shape[1], dtype=self.C.dtype, device=self.C.device)  # v_i - g_i = sum_j D_ij g_j
        squares = (torch.zeros_like(D).baddbmm_(D, self.gram) * D).sum(2)  # in place, as in gram_matrix
        return (squares.clamp(min=0) / self.squares).sqrt().nan_to_num(0.0, 0.0, 0.0)

    @property
    def effective(self):
        moved, squares = (self.weights.square() * self.squares).sum(0), self.squares.sum(0)
        return torch.where(squares == 0, 1.0, (moved / squares).sqrt())

    @property
    def rate(self):
        present = self.finite & (self.squares > 0)
        pairs = (present[:, :, None] & present[:, None]).triu(1)
        return (self.conflicts & pairs).sum() / pairs.sum().clamp(min=1)

    def check(self, model=None, tasks=None):
        """Raise FloatingPointError if a gradient was not finite, naming task and parameter (by name, given the model).

        It waits for the device, so call it when you log. With GradScaler, which skips such steps, they are usual.
        """
        bad = (~self.finite).nonzero()
        if len(bad):
            block, task = bad[0].tolist()
            names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
            found = [names.get(id(p), f"a tensor {tuple(p.shape)}") for p in self.blocks[block]]
            where = f"block {block}: {', '.join(found[:3])}{', …' if len(found) > 3 else ''}"
            raise FloatingPointError(f"the gradient of task {tasks[task] if tasks else task} is not finite in {where}")


class OrthoLoRA:
    """Per-task gradients in, one projected gradient out.

        ortho = OrthoLoRA(blocks, num_tasks=len(tasks))  # last: after .to(device), a cast, prepare
        for each step:
            optimizer.zero_grad()
            for t in range(len(tasks)):
                loss(t).backward()
                ortho.collect(t)
            conflicts = ortho.project()
            optimizer.step()

    blocks: a list of lists of parameters. The tensors of one inner list are projected as one vector, so the unit of
    projection is data: [[A1], [B1], [A2], ...] is Ortho-LoRA, [[A1, A2, ...], [B1, B2, ...]] by factor, [[everything]]
    PCGrad. A parameter in no block (a task's head, a frozen factor) is never touched: its gradients just add up.
    weights: one per task, g_t = weights[t] dL_t (default 1), not those of Conflicts; may change. generator: draws the
    order, on the CPU; by default one of its own, seeded 0, so that every process draws the same. sequential: v_i meets
    v_j, not g_j. `rows` (T, P) may be averaged or rescaled before `project`. Raises ValueError: unfit blocks.
    """

    def __init__(self, blocks, num_tasks, *, weights=None, generator=None, sequential=False):
        blocks = list(blocks)
        if any(isinstance(block, torch.Tensor) for block in blocks):
            raise ValueError("OrthoLoRA: blocks is a list of lists: [[p] for p in parameters]")
        self.blocks = [list(block) for block in blocks]
        parameters = [p for block in self.blocks for p in block]
        if not parameters or not all(self.blocks):
            raise ValueError("OrthoLoRA: there is no parameter to project in blocks (or in one of them)")
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("OrthoLoRA: a parameter is in blocks twice")
        if any(hasattr(p, "device_mesh") or hasattr(p, "_fsdp_flattened") for p in parameters):  # FSDP2's, FSDP1's
            raise ValueError("OrthoLoRA: a parameter in blocks is sharded, by FSDP; see FSDP2 in docs/recipes.md")
        if not all(p.is_leaf and p.requires_grad for p in parameters):
            raise ValueError("OrthoLoRA: a tensor in blocks never gets a .grad: it is frozen, or computed from others")
        if len({p.device for p in parameters}) > 1:
            raise ValueError("OrthoLoRA: parameters in blocks are on several devices: make an OrthoLoRA for each")
        if num_tasks < 1 or (weights is not None and len(weights) != num_tasks):
            raise ValueError(f"OrthoLoRA: num_tasks={num_tasks} is below 1, or weights={weights} are not as many")
        self.num_tasks, self.sequential = num_tasks, sequential
        self.weights = [1.0] * num_tasks if weights is None else [float(w) for w in weights]
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

        # Blocks of one size lie side by side in rows, so that k blocks of n numbers are one view (k, T, n): blocks of
        # sizes 6, 2, 6 lie as 2, 6, 6, which is (1, T, 2) and (2, T, 6).
        sizes = [sum(p.numel() for p in block) for block in self.blocks]
        layout = sorted(range(len(sizes)), key=lambda b: sizes[b])
        self.groups = [(sizes.count(n), n) for n in sorted(set(sizes))]  # k blocks of n
        self.parameters = [p for b in layout for p in self.blocks[b]]
        self.made = [(tuple(p.shape), p.dtype) for p in self.parameters]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        self.rows = torch.zeros(num_tasks, sum(sizes), dtype=dtype, device=parameters[0].device)  # (T, P)
        self.places = torch.tensor(layout, device=self.rows.device).argsort()  # [b]: in rows, the caller's block b

    def __setstate__(self, state):
        vars(self).update(state, rows=state["rows"].clone())  # torch.multiprocessing would share the sender's memory

    def _per_parameter(self, row):  # (P,) -> a view for each parameter
        parts = row.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def _per_size(self, x):  # (..., P) -> a view (..., k, n) for each size of block
        parts = x.split([k * n for k, n in self.groups], dim=-1)
        return [part.unflatten(-1, kn) for part, kn in zip(parts, self.groups, strict=True)]

    def collect(self, task):
        """After `task`'s backward(): add each parameter's .grad to the task's row, and clear it, without waiting.

        Call it once per micro-batch, not for an absent task; `ortho.rows.zero_()` gives up a step. ValueError: no such
        task; RuntimeError: no .grad, or still the one that `project` wrote; another shape, dtype or device.
        """
        if task not in range(self.num_tasks):
            raise ValueError(f"OrthoLoRA: task {task} is none of 0 to {self.num_tasks - 1}")
        self._check()
        self._add(task, [p.grad for p in self.parameters])
        for p in self.parameters:
            p.grad = None

    def collect_stacked(self, grads):
        """After the one backward() of `lora.per_task`: add every task's gradient to its row.

        grads: {parameter: its view}; a view's .grad is (T, *parameter.shape), or None where no loss depended on it.
        Raises as `collect` does, ValueError where a .grad has another shape, KeyError where a view is missing.
        """
        self._check()
        found = [grads[p].grad for p in self.parameters]
        for p, g in zip(self.parameters, found, strict=True):
            if g is not None and g.shape != (self.num_tasks, *p.shape):
                raise ValueError(f"OrthoLoRA: a stacked .grad is {tuple(g.shape)}, not {(self.num_tasks, *p.shape)}")
        found = [[None] * self.num_tasks if g is None else g.unbind() for g in found]
        for task, of_task in enumerate(zip(*found, strict=True)):
            self._add(task, of_task)
        for p in self.parameters:
            grads[p].grad = None

    def _check(self):  # raises where a parameter was moved, cast or reshaped, or .grad is still project's
        for p, (shape, dtype) in zip(self.parameters, self.made, strict=True):
            if tuple(p.shape) != shape or p.dtype != dtype or p.device != self.rows.device:
                raise RuntimeError(
                    f"OrthoLoRA: a {shape} {dtype} parameter on {self.rows.device} is {tuple(p.shape)} {p.dtype} on "
                    f"{p.device} now; make OrthoLoRA last: after .to(device), a cast, Trainer(...), prepare, MaskedB"
                )
            if getattr(p.grad, "projected", False):
                raise RuntimeError(
                    "OrthoLoRA: .grad still holds the last projected gradient; before backward() set it to None in "
                    "every block, by optimizer.zero_grad(); when accumulating, project once, after the last micro-batch"
                )

    @torch.no_grad()
    def _add(self, task, grads):
        pairs = [(row, g) for row, g in zip(self._per_parameter(self.rows[task]), grads, strict=True) if g is not None]
        if not pairs:
            raise RuntimeError(
                "OrthoLoRA: no parameter in blocks has a .grad; collect right after each task's backward() (stacked: "
                "it runs inside `with per_task`), and make OrthoLoRA of the parameters that the model has now"
            )
        torch._foreach_add_(*zip(*pairs, strict=True), alpha=float(self.weights[task]))

    def project(self, order=None):
        """Write sum_i v_i into .grad (zeros where no task had one; none where frozen), clear rows; return Conflicts.

        order: (T, T - 1) as in `project_conflicting`; by default drawn at random. With (T, 0) nobody meets anybody: the
        rows add up, Conflicts sees them. What isn't finite makes .grad not finite, so GradScaler skips the step. With
        one task or no conflict a float32 .grad is the plain sum. ValueError: another order; RuntimeError: a .grad left.
        """
        T = self.num_tasks
        if any(p.grad is not None and p.requires_grad for p in self.parameters):
            raise RuntimeError("OrthoLoRA: a .grad is left: collect after each backward(), project() once a step")
        order = self.random_order() if order is None else torch.as_tensor(order)
        met = order.tolist() if order.is_cpu else []  # what is on a GPU is not looked at
        if order.shape not in ((T, T - 1), (T, 0)) or any(m and {i, *m} != {*range(T)} for i, m in enumerate(met)):
            raise ValueError(f"OrthoLoRA: row i of order names all tasks but i, or none; not {order.tolist()}")
        stacks = [x.transpose(0, 1) for x in self._per_size(self.rows)]  # (k, T, n) each
        gram = torch.cat([gram_matrix(g) for g in stacks])  # (blocks, T, T), as the blocks lie in rows
        if order.is_cpu and gram.is_cuda and not self.sequential:
            order = order.pin_memory().to(gram.device, non_blocking=True)  # from pinned memory, so nothing waits
        C = (sequential_coefficients if self.sequential else projection_coefficients)(gram, order)
        weights = C.sum(1)  # (blocks, T): sum_i v_i = sum_j (sum_i C_ij) g_j
        largest = torch.finfo(self.rows.dtype).max  # a weight may be infinite in float32 where g_j is all but zero
        parts = weights.clamp(max=largest).to(self.rows.dtype).split([len(g) for g in stacks])
        total = torch.empty_like(self.rows[0])  # (P,)
        for g, w, out in zip(stacks, parts, self._per_size(total), strict=True):
            # From first to last, so weights of 1 give the plain sum, to the bit.
            for j, (g_j, w_j) in enumerate(zip(g.unbind(1), w[..., None].unbind(1), strict=True)):  # (k, n), (k, 1)
                torch.mul(g_j, w_j, out=out) if j == 0 else out.addcmul_(g_j, w_j)
        self.rows.zero_()
        for p, grad in zip(self.parameters, self._per_parameter(total), strict=True):
            grad = grad.to(p.dtype) if p.is_contiguous() else torch.empty_like(p).copy_(grad)  # p's strides, for fused
            if p.requires_grad:  # one that was frozen since is left alone
                p.grad, grad.projected = grad, True  # `_check` raises where it is still there
        return Conflicts(gram[self.places], C[self.places], self.blocks)

    def random_order(self):
        """(T, T - 1): for each task the others, in an order drawn from `generator`."""
        draws = torch.rand(self.num_tasks, self.num_tasks, generator=self.generator, device="cpu")
        return draws.fill_diagonal_(2.0).argsort(1)[:, :-1]  # the task itself comes last, and is left out
