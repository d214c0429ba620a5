"""The pages keep their word: the README's snippets run, links point at what they name, flags exist, sizes hold."""

import ast
import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import train

ROOT = Path(__file__).parent.parent
PATHS = ("README.md", "experiments/README.md", "docs/choices.md", "docs/recipes.md")
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
README, RECIPES = PAGES["README.md"], PAGES["docs/recipes.md"]


def snippets(text):
    """Its Python blocks."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def world():
    """What the usage snippet takes for granted: encoder, heads, the names of three tasks, data, loss."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertModel(BertConfig(vocab_size=50, **sizes))
    heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(3))
    data = [[(torch.randint(50, (4, 6)), torch.randint(2, (4,))) for _ in range(3)] for _ in range(4)]

    def loss(t, batch):
        ids, labels = batch
        return nn.functional.cross_entropy(heads[t](encoder(ids).last_hidden_state[:, 0]), labels)

    return {"encoder": encoder, "heads": heads, "tasks": ["a", "b", "c"], "data": data, "loss": loss}


def test_the_example_prints_what_the_readme_says():
    """As the README shows it, in comments under the print; the last bits are the machine's."""

    def printed(code):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, {})  # noqa: S102
        return re.findall(r"^(.+?)  a (\S+)  b (\S+)$", out.getvalue(), re.M)

    code = snippets(README)[0]
    shown, found = re.findall(r"^# (.+?)  a (\S+)  b (\S+)$", code, re.M), printed(code)
    assert [name.strip() for name, *_ in shown] == [name.strip() for name, *_ in found] and len(shown) == 3
    for (_, *a), (_, *b) in zip(shown, found, strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], abs=0.02)
    assert "range(100)" in code and "with `range(300)` all errors print as 0.00" in README
    assert {x for _, *errors in printed(code.replace("range(100)", "range(300)")) for x in errors} == {"0.00"}


def test_the_usage_snippet_runs_and_trains(world):
    code = snippets(README)[1]
    heads = [p.detach().clone() for p in world["heads"].parameters()]
    exec(code, world)  # noqa: S102
    layers = [m for m in world["encoder"].modules() if hasattr(m, "A")]
    assert len(layers) == 4 and all(layer.B.abs().sum() > 0 for layer in layers)
    assert all(not torch.equal(p, q) for p, q in zip(heads, world["heads"].parameters(), strict=True))


def test_recipes_are_python_and_begin_with_what_they_need():
    parts = re.split(r"^## ", RECIPES, flags=re.M)[1:]
    assert len(parts) >= 19
    for part in parts:
        assert snippets(part), part.splitlines()[0]
        for code in snippets(part):
            ast.parse(code)
        assert "iven " in part.partition("```python")[0], part.splitlines()[0]


def anchor(heading):
    """A heading's anchor on the page: letters and digits in lower case, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_point_at_what_they_name(page):
    folder, text = (ROOT / page).parent, re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.S | re.M)
    for name, file, line in re.findall(r"\[`(?:\w+\.)?(\w+)`\]\(([\w./]+\.py)#L(\d+)\)", text):
        there = (folder / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", there), f"{page}: {file}#L{line} is {there!r}, not {name}"
    for path, where in re.findall(r"\]\((?!https?://)([\w/.-]*)(?:#([\w-]+))?\)", text):
        target = folder / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if target.suffix == ".md" and where:
            assert where in [anchor(x) for x in re.findall(r"^#+ (.+)$", target.read_text(), re.M)], f"{page}: {where}"


def test_the_readme_points_at_the_method():
    assert len(re.findall(r"\.py#L\d+\)", README)) >= 5


def test_flags_and_files_exist():
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train.Settings)} | {"--help"}
    known |= {"--nproc-per-node"}  # torchrun's
    for script in [*ROOT.glob("experiments/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("evaluate.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    named = {flag for text in PAGES.values() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert named <= known, sorted(named - known)
    files = {file for text in PAGES.values() for file in re.findall(r"`((?:\w+/)*\w+\.py)`", text)}
    files |= {file for text in PAGES.values() for file in re.findall(r"python ((?:\w+/)*\w+\.py)", text)}
    missing = [x for x in sorted(files) if not any((ROOT / at / x).exists() for at in ("", "experiments"))]
    assert "train.py" in files and not missing, missing


def test_every_method_is_in_the_readme():
    assert all(f"`{method}`" in README for method in train.METHODS)


def paragraphs(text):
    """Prose alone: no code, no table, no heading, no block of results; each item of a list is one."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    text = re.sub(r"<!-- experiments/\S+ -->.*?<!-- end -->", "", text, flags=re.S)
    lines = ["" if line.startswith(("|", "#", "![")) else line for line in text.splitlines()]
    return [part for part in re.split(r"\n\s*\n|\n(?=- |\d+\. )", "\n".join(lines)) if part.strip()]


def test_the_readme_can_be_read_in_ten_minutes():
    assert len(README.splitlines()) <= 220 and len(README.encode()) <= 16 * 1024
    long = [part for part in paragraphs(README) if len(part.split()) > 60]
    assert len(paragraphs(README)) > 20 and not long, long
    usage = README.partition("\n## Use it in your code\n")[2].partition("\n## ")[0]
    assert usage and len(usage.splitlines()) <= 40
