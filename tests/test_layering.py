"""The five rules of CONTRIBUTING.md, read off the imports."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOUNS = "sgd_sparse_jax._types"
PLAIN = {
    f"experiments.{noun}"
    for noun in ("records", "npz", "files", "values", "plots", "cli", "tables", "signals")
}
PLACES = {f"experiments.{noun}" for noun in ("devices", "hosts")}
TOYS = {
    f"experiments.{noun}"
    for noun in ("problems", "toy_flags", "toy_runs", "ensemble", "chunks", "report")
}
DEEP = {
    f"experiments.{noun}"
    for noun in ("deep_flags", "deep_parts", "classifiers", "gauges", "progress", "curves")
}
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "registry", "manager"}


def modules(package):
    """Name of the module -> (source, whether it is a package)."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[: len(parts) - is_package])] = path.read_text(), is_package
    return found


LIBRARY, EXPERIMENTS = modules("sgd_sparse_jax"), modules("experiments")
OURS = LIBRARY | EXPERIMENTS


def imports(name, source, is_package=False):
    """Every module that `source` imports, at its top or inside a function."""
    found = set()
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(origin, package)
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                found.add(whole if whole in OURS else origin)
    return found


def of(package, found):
    return {name for name in found if name.split(".")[0] == package}


def against_library_rule(name, source, is_package=False):
    """Imports of ours that rule 1 forbids."""
    found = of("sgd_sparse_jax", imports(name, source, is_package)) - {NOUNS}
    found |= of("experiments", imports(name, source, is_package))
    if is_package:  # opens its own shelf to the reader
        found = {other for other in found if not f"{other}.".startswith(f"{name}.")}
    return found


def against_experiment_rule(name, source, is_package=False):
    """Imports of ours that rule 2 forbids."""
    if name == "experiments.reproduce":
        return set()
    return of("experiments", imports(name, source, is_package)) - PLAIN - PLACES - TOYS - DEEP


def in_new_process(program):
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_files_are_found():
    shelves = {f"sgd_sparse_jax.{shelf}" for shelf in ("models", "data", "train", "measure")}
    assert {NOUNS} | shelves <= LIBRARY.keys()
    assert EXPERIMENTS.keys() >= PLAIN | PLACES | TOYS | DEEP


@pytest.mark.parametrize(
    "statement",
    [
        "from sgd_sparse_jax.models import DiagonalNet",
        "from sgd_sparse_jax import models",
        "import sgd_sparse_jax",
        "import sgd_sparse_jax.train.step as s",
        "from .losses import half_squared",
        "from . import losses",
        "from .. import models",
        "from ..data import images",
        "from experiments import records",
        "def f():\n    from sgd_sparse_jax.train import losses",
    ],
)
def test_the_reader_of_imports_sees_each_way_around_rule_1(statement):
    assert against_library_rule("sgd_sparse_jax.train.step", statement)


def test_the_reader_of_imports_lets_through_what_the_rules_allow():
    allowed = "import jax\nfrom sgd_sparse_jax._types import Batch\nfrom .. import _types"
    assert not against_library_rule("sgd_sparse_jax.train.step", allowed)
    shelf = "from .step import make_step as make_step\nfrom . import step as _step"
    assert not against_library_rule("sgd_sparse_jax.train", shelf, is_package=True)
    neighbour = "from ..models import DiagonalNet"
    assert against_library_rule("sgd_sparse_jax.train", neighbour, is_package=True)
    sentence = "from experiments import cli, ensemble, records\nfrom sgd_sparse_jax import train"
    assert not against_experiment_rule("experiments.new", sentence)
    borrowed = "from experiments.diag_nets import run"
    assert against_experiment_rule("experiments.new", borrowed)
    assert not against_experiment_rule("experiments.reproduce", borrowed)


def test_rule_1_library_modules_import_only_the_nouns():
    against = {name: against_library_rule(name, *module) for name, module in LIBRARY.items()}
    assert not {name: found for name, found in against.items() if found}


def test_rule_2_experiments_do_not_import_each_other():
    against = {name: against_experiment_rule(name, *module) for name, module in EXPERIMENTS.items()}
    assert not {name: found for name, found in against.items() if found}


def test_what_is_plain_names_no_jax():
    for name in PLAIN:
        roots = {other.split(".")[0] for other in imports(name, *EXPERIMENTS[name])}
        assert not roots & {"jax", "jaxlib", "flax", "optax", "jaxtyping", "sgd_sparse_jax"}, name


def test_what_is_plain_loads_no_jax():
    program = f"import sys, {', '.join(sorted(PLAIN))}; print(*sys.modules)"
    loaded = in_new_process(program)
    assert loaded >= PLAIN
    assert "jax" not in loaded


def test_rule_3_importing_the_library_loads_nothing_heavy():
    """Beyond what jax, flax and optax load themselves."""
    heavy = {"tensorflow_datasets", "tensorflow", "matplotlib", "tyro", "orbax", "rich", "PIL"}
    program = "\n".join(
        [
            "import sys, jax, flax.linen, optax",
            "before = set(sys.modules)",
            *(f"import {name}" for name in LIBRARY),
            "print(*set(sys.modules) - before)",
        ]
    )
    loaded = in_new_process(program)
    assert loaded >= LIBRARY.keys()
    assert not loaded & heavy


def test_rule_4_no_name_that_hides_the_noun():
    words = {name: set(name.rpartition(".")[2].split("_")) for name in OURS}
    assert not {name for name in words if words[name] & VAGUE}
    classes = {
        f"{name}.{node.name}"
        for name, (source, _) in OURS.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    assert classes
    assert not {name for name in classes if re.search("(Registry|Manager|Helper)s?$", name)}
