"""Do the tasks' gradients conflict, beyond what a batch's noise makes of them? At fixed points of joint training.

    python experiments/premise.py --model M --glue G --tasks cola,mrpc,sst2,stsb,mnli --rank 8 --seeds 0 --out OUT

The other flags are train.py's, as far as they are about joint training. There is no dropout but the heads', at the
checkpoint's rate. It runs on the CPU. After 25, 100 and all --steps, training stops for a while, and 512 batches of
each task, drawn anew from its training rows, are run through the model as it stands, in G = 8 groups of 64. With x_gi
the mean gradient of task i in group g, the products of the true mean gradients, free of bias where the groups are
independent (nearly, for a task with fewer rows than 512 batches take, which is read more than once), are

    c_ij = sum_{g != h} <x_gi, x_hj> / G (G - 1)      cos_ij = c_ij / sqrt(c_ii c_jj)      SNR_i = c_ii / E |g_i|^2

g_i being the gradient of one batch, of which SNR is the signal's share (McCandlish et al. 2018, arXiv 1812.06162).
Errors are the jackknife's over the groups. This is done for all A, for all B and for both. OUT/results.json has it,
beside the share of pairs that conflict batch by batch, per factor, as Ortho-LoRA sees it.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
import train  # noqa: E402
from glue import batches_of_steps  # noqa: E402
from ortholora import OrthoLoRA, gram_matrix  # noqa: E402
from support import runs  # noqa: E402
from support.checkpoint import BadInput, write_text  # noqa: E402

POINTS, GROUPS, BATCHES = (25, 100), 8, 64  # and the last step; BATCHES in a group

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def unbiased(gram):
    """<x_gi, x_hj>, (G, T, G, T) -> c, (T, T), of all groups, and (G, T, T), of all but one."""
    G = len(gram)
    same = torch.einsum("gigj->gij", gram)  # (G, T, T)
    total = gram.sum((0, 2))  # (T, T)
    c = (total - same.sum(0)) / (G * (G - 1))
    rows, columns = gram.sum(2), gram.sum(0).transpose(0, 1)  # (G, T, T): g with all, all with g
    left = total - rows - columns + same  # (G, T, T): the sums over all groups but g
    return c, (left - (same.sum(0) - same)) / ((G - 1) * (G - 2))


def jackknife(without):
    """The standard error of a statistic out of what it is without each group: (G, …) -> (…)."""
    G = len(without)
    return ((without - without.mean(0)).square().sum(0) * (G - 1) / G).sqrt()


def cosines(c):
    """c_ij / sqrt(c_ii c_jj), (…, T, T); NaN where a task shows no gradient, c_ii <= 0."""
    norms = c.diagonal(dim1=-2, dim2=-1).sqrt()  # (…, T), of a negative number NaN
    return c / (norms[..., :, None] * norms[..., None, :])


def numbers(x):
    """As JSON has them: None in the place of NaN."""
    return [numbers(y) for y in x] if x.ndim else None if x.isnan() else round(x.item(), 6)


def described(gram, squares):
    """{"cosine", "error", "signal", "snr"} of one space, and its cosines, (T, T) and (G, T, T).

    gram: (G, T, G, T). signal: c_ii over its own error. squares: (T,), E |g_i|^2 of one batch.
    """
    c, without = unbiased(gram)
    own, others = c.diagonal(), without.diagonal(dim1=1, dim2=2)  # (T,), (G, T)
    found = {"cosine": cosines(c), "error": jackknife(cosines(without)), "signal": own / jackknife(others)}
    found["snr"] = own / squares
    return {name: numbers(x) for name, x in found.items()}, cosines(c), cosines(without)


# ---------------------------------------------------------------------------------------------------------------------
# One point of the training


def measure(model, tasks, stream, bar):
    """What the docstring says, at the model as it stands. Its parameters and their gradients are left alone."""
    T, factors = len(tasks), lora.lora_parameters(model.encoder)  # A1, B1, A2, ...
    ortho = OrthoLoRA(lora.blocks(model.encoder), T)
    nobody = torch.empty(T, 0, dtype=torch.long)
    means = [torch.zeros(GROUPS, T, *p.shape) for p in factors]
    squares, rate = torch.zeros(2, T, dtype=torch.float64), []  # of all A, of all B
    for g in range(GROUPS):
        for _ in range(BATCHES):
            for t, batch in enumerate(next(stream)):
                for p in model.parameters():
                    p.grad = None
                (loss,) = train.task_losses(model, batch)
                loss.backward()
                for mean, p in zip(means, factors, strict=True):
                    mean[g, t] += p.grad / BATCHES
                norms = torch.stack(torch._foreach_norm([p.grad for p in factors])).double().square()
                squares[:, t] += norms.view(-1, 2).sum(0) / (GROUPS * BATCHES)
                ortho.collect(t)
                bar.update()
            rate.append(ortho.project(nobody).rate.item())
    A, B = torch.zeros(2, GROUPS * T, GROUPS * T, dtype=torch.float64)
    for gram, of_one in ((A, means[::2]), (B, means[1::2])):
        for x in of_one:
            gram += gram_matrix(x.view(1, GROUPS * T, -1))[0]
    spaces = {"A": (A, squares[0]), "B": (B, squares[1]), "A and B": (A + B, squares.sum(0))}
    result, kept = {"rate": sum(rate) / len(rate)}, {}
    for name, (gram, of_one) in spaces.items():
        result[name], *kept[name] = described(gram.view(GROUPS, T, GROUPS, T), of_one)
    less, errors = (a - b for a, b in zip(kept["A"], kept["B"], strict=True))
    result["A less B"] = {"cosine": numbers(less), "error": numbers(jackknife(errors))}
    for p in model.parameters():
        p.grad = None
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The job


def run(s):
    """Train jointly with one seed, measuring on the way. Returns {steps: what `measure` says}, and seconds."""
    encoder, frozen, tasks = train.load(s)
    seed, found = int(s.seeds), {}
    model, pad, device = train.build("joint", frozen, tasks, seed, s), frozen.config.pad_token_id, torch.device("cpu")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, begin = train.make_optimizer("joint", trained, s), time.perf_counter()
    points = [*(point for point in POINTS if point < s.steps), s.steps]
    stream = batches_of_steps(tasks, seed, s, pad, device)
    others = batches_of_steps(tasks, train.seed_of("others", seed), s, pad, device)
    with tqdm(total=len(tasks) * (s.steps + len(points) * GROUPS * BATCHES), unit="batch", mininterval=10) as bar:
        for step in range(s.steps):
            optimizer.zero_grad()
            train.gradients("joint", model, next(stream), None, train.seed_of(seed, step), s)
            torch.nn.utils.clip_grad_norm_(trained.values(), s.clip or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * train.lr_at(step, s)
            optimizer.step()
            bar.update(len(tasks))
            if step + 1 in points:
                found[step + 1] = measure(model, tasks, others, bar)
    seconds = time.perf_counter() - begin
    kept = {name: value for name, value in asdict(s).items() if name not in ("model", "glue", "out")}
    results = {"settings": kept, "tasks": [d.name for d in tasks], "methods": {"joint": {s.seeds: {"points": found}}}}
    timing = {"seconds_per_step": seconds / s.steps, "steps": s.steps, "hardware": runs.hardware(encoder)}
    return results, timing | {"source": runs.source_checksum()}


def main(argv=None):
    try:
        given = train.parse(sys.argv[1:] if argv is None else argv, "premise.py", __doc__)
        if unused := {"demo", "methods", "resume", "jobs"} & given.keys():
            raise BadInput(f"leave out --{min(unused)}: there is nothing here that it could change")
        s = train.Settings(**given)
        s.device, s.dtype, s.per_task = "cpu", s.dtype.replace("auto", "fp32"), "loop"
        train.check(s)
        if not s.seeds.isdecimal() or not s.out:
            raise BadInput(f"give one seed and --out FOLDER, not --seeds {s.seeds} --out {s.out!r}")
        for name in ("settings.json", "results.json"):
            if (Path(s.out) / name).exists():
                raise BadInput(f"--out {s.out} has a {name}; choose another folder")
        results, timing = run(s)
        Path(s.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(s.out) / "timing.json", json.dumps(timing) + "\n")
        write_text(Path(s.out) / "results.json", json.dumps(results) + "\n")
    except (BadInput, OSError) as e:
        print(f"premise.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
