"""README and docs: examples run, commands parse, tables are the recorded results."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import re
import runpy
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import tree_leaves_with_path as leaves

from experiments.deep.config import Config
from experiments.launch import cli
from sgd_sparse_jax import data, models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "notebooks").glob("*.md"))  # `.ci/run` executes their cells

GUIDES = ("getting_started", "choosing", "coming_from", "your_own", "pitfalls")
MODULES = r"experiments\.\w+$|benchmarks\.(deep|scaling)$"  # others import optional packages


def commands(page):
    """(module, flags) of the command lines in ```sh blocks and in inline code.

    $NAME is replaced by its value on the page; commands with an ellipsis are skipped.
    """
    known = {}
    text = page.read_text(encoding="utf-8")
    spans = [" ".join(each.split()) for each in re.findall(r"`(python -m [^`…]+)`", text)]
    for block in [*re.findall(r"```sh\n(.*?)```", text, re.DOTALL), *spans]:
        for line in re.split(r"\n|;|&&|&(?!>)", re.sub(r"\\\n\s*", "", block)):
            line = re.sub(r"\$(\w+)", lambda name: known.get(name[1], name[0]), line)
            words = shlex.split(line, comments=True)
            if words[:1] == ["for"]:
                known[words[1]] = words[3]
            elif len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
                known[assigned[1]] = " ".join(assigned[2].split())
            elif words[:2] == ["sbatch", "docs/slurm.sh"]:
                yield "experiments.resnet_cifar", words[2:]
            for word, module in itertools.pairwise(words):
                if word == "-m" and re.match(MODULES, module):
                    yield module, words[words.index(module) + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page):
    """Nothing is run; an unknown flag or an invalid value raises SystemExit."""
    for name, flags in commands(page):
        assert not [word for word in flags if "$" in word], flags
        module = importlib.import_module(name)
        if hasattr(module, "grid_type") or hasattr(module, "Config"):
            config = module.grid_type() if hasattr(module, "grid_type") else module.Config
            cli.parse(config, flags, settings=getattr(module, "SETTINGS", None))


def test_the_help_names_every_network_and_data_set(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Config, ["--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    names = {name.removesuffix("_gs") for name in data.IMAGE_SETS} | {*models.NETWORKS}
    assert names <= {*words}


def test_names_and_flags_in_the_guides_exist():
    """Except flags of the released code that are not here."""
    text = "".join((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in GUIDES)
    for module, name in set(re.findall(r"\b(train|measure|models|data)\.([a-z_]+)\b", text)):
        library = importlib.import_module(f"sgd_sparse_jax.{module}")
        assert name in ("py", "npz") or hasattr(library, name), (module, name)
    commands = [path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")]
    modules = [importlib.import_module(f"experiments.{name}") for name in commands]
    configs = [module.Config for module in modules if hasattr(module, "Config")]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    used = set(re.findall(r"--([a-z]\w*)", " ".join(re.findall(r"`([^`\n]+)`", text))))
    assert used - known == {"attack", "at_pred_label", "gpu", "n_eval_every_k_iter"}


def test_the_commands_of_the_pages_are_found():
    count = {page.name: len(list(commands(page))) for page in PAGES}
    assert count["README.md"] >= 4 and count["running.md"] >= 12 and count["scaling.md"] >= 5


def test_the_tables_of_scaling_are_the_recorded_results():
    tables = runpy.run_path(str(ROOT / "docs" / "scaling_tables.py"))
    page = tables["PAGE"].read_text(encoding="utf-8")
    assert tables["filled"](page) == page, "run python docs/scaling_tables.py"
    marks = re.findall(r"<!-- (\w+) -->\n\|", page)
    assert sorted(marks) == sorted(tables["TABLES"])


def test_a_changed_number_is_detected():
    """The tables are generated, not read from the page."""
    tables = runpy.run_path(str(ROOT / "docs" / "scaling_tables.py"))
    page = tables["PAGE"].read_text(encoding="utf-8")
    assert tables["filled"](page.replace("11,173,962", "11,173,963")) == page


def test_numbers_of_the_science_log_are_those_of_the_pages_it_summarizes():
    estimate = r"-?\d*\.?\d+(?:e-\d+)? (?:\[[^\]a-z]*(?:e-\d[^\]]*)?\]|± \d*\.?\d+)"
    text = {page.name: page.read_text("utf-8").replace("−", "-") for page in PAGES}
    log = text.pop("science_log.md")
    found = re.findall(estimate, " ".join(log.split()))
    others = " ".join(" ".join(text.values()).split())
    assert len(found) > 50
    assert not [number for number in found if number not in others]


def test_links_lead_to_existing_files():
    for page in PAGES:
        links = re.findall(r"\]\(\s*([^)#\s]+)\)", page.read_text(encoding="utf-8"))
        for link in links:
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


def run_examples(name):
    """The names after the page's ```python blocks, in order, and what they print.

    A block after a line `<!-- not run: REASON -->` is not run.
    """
    text = (ROOT / "docs" / name).read_text("utf-8")
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        for example in re.findall(r"(?<!-->\n)```python\n(.*?)```", text, re.DOTALL):
            exec(compile(example, name, "exec"), names)
    return names, screen.getvalue()


def test_every_python_block_is_run_or_marked_with_a_reason():
    run = {"README.md", "curvature.md", "getting_started.md", "pitfalls.md", "your_own.md"}
    for page in PAGES:
        text = page.read_text("utf-8")
        unmarked = re.sub(r"<!-- not run: [^>]{10,} -->\n```python", "", text)
        assert "```python" not in unmarked or page.name in run | {"frameworks.md"}, page.name


def test_the_examples_of_getting_started_run(quick_compilation):
    names, printed = run_examples("getting_started.md")
    table = names["table"]
    assert dict(table.sizes) == {"seed": 8, "step_size": 3, "step": 9} and "sparsity" in printed
    assert (table.loss.isel(step=-1) < table.loss.isel(step=0)).all()


def test_the_examples_of_pitfalls_print_what_they_say():
    names, printed = run_examples("pitfalls.md")
    assert names["ranks"][0] == 2 and names["ranks"][1] > 10
    first, *shares = printed.splitlines()
    assert first.endswith("] 2") and shares == ["4 0.75", "32 0.97"]


def test_measurements_of_the_users_are_those_of_the_final_weights(
    quick_compilation, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names, printed = run_examples("your_own.md")
    assert names["special"].shape == (4, 2, 3) and names["losses"].shape == (4, 2, 1)
    images, _, _, last, saved = printed.splitlines()[:5]
    assert images == "(20, 8, 8, 3) ('0', '1', '2')" and last.split()[1] == saved
    weights = np.asarray(names["params"]["layer1"]["kernel"])
    expected = np.mean(np.abs(weights).max(0) ** 2 / (weights**2).sum(0))
    assert names["specialization"](names["params"]) == pytest.approx(expected)
    assert names["found"].verdict == "holds" and (tmp_path / "mine" / "verdicts.json").exists()


def test_the_library_examples_of_the_readme_print_what_they_say():
    """In their order, in one namespace."""
    examples = re.findall(r"```python\n(.*?)```", PAGES[0].read_text("utf-8"), re.DOTALL)
    screen, names = io.StringIO(), {}
    with contextlib.redirect_stdout(screen):
        for example in examples:
            exec(compile(example, "README.md", "exec"), names)
    first, second = screen.getvalue().splitlines()
    assert first == "(64, 3, 3)"
    hessian = jax.hessian(lambda u, v: names["mean_loss"]({"u": u, "v": v}), (0, 1))
    blocks = hessian(names["params"]["u"], names["params"]["v"])
    top = np.linalg.eigvalsh(np.block([list(row) for row in blocks])).max()
    converged, largest_step = second.split("] ")
    assert converged == "[ True  True" and float(largest_step) == pytest.approx(2 / top)


def test_the_examples_of_curvature_run_and_agree_with_dense_matrices():
    names, printed = run_examples("curvature.md")
    assert "generalized_sharpness" in printed
    flat, unravel = ravel_pytree(names["params"])
    loss = lambda flat: names["objective"](unravel(flat), names["stats"], names["data"])[0]
    dense = jax.jit(jax.hessian(loss))(flat)
    layer = [["layer2" in str(path)] * leaf.size for path, leaf in leaves(names["params"])]
    block = dense[np.ix_(*[np.flatnonzero(np.concatenate(layer))] * 2)]
    top = np.linalg.eigvalsh(block)[:-3:-1]
    np.testing.assert_allclose(names["pairs"].values, top, rtol=1e-5)
    assert abs(names["trace"].value - dense.trace()) < 4 * names["trace"].standard_error
    whole = ravel_pytree(names["whole"].matvec(names["gradient"]))[0]
    np.testing.assert_allclose(whole, dense @ ravel_pytree(names["gradient"])[0], rtol=1e-8)


def test_the_gallery_shows_existing_files():
    figures = re.findall(
        r"\]\((figures/[^)]*)\)", (ROOT / "docs" / "gallery.md").read_text("utf-8")
    )
    assert len(figures) >= 15 and len(set(figures)) == len(figures)
    assert all((ROOT / "docs" / figure).stat().st_size > 1000 for figure in figures)
