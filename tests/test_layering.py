"""The rules of CONTRIBUTING.md, checked in paths and imports."""

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("models", "data", "train", "measure", "theory")
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "registry", "manager"}
HEAVY = {"tensorflow_datasets", "tensorflow", "matplotlib", "tyro", "orbax", "rich", "PIL"}
NO_JAX = ("storage", "figures")  # folders without JAX


def modules(package):
    """Name of the module -> (source, whether it is a package)."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[: len(parts) - is_package])] = path.read_text(), is_package
    return found


LIBRARY, EXPERIMENTS = modules("sgd_sparse_jax"), modules("experiments")
INTERNAL = LIBRARY | EXPERIMENTS
COMMANDS = {name for name in EXPERIMENTS if name.count(".") == 1 and not EXPERIMENTS[name][1]}


def imports(name, source, is_package=False):
    """Modules that `source` imports, at its top or inside a function."""
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
                found.add(whole if whole in INTERNAL else origin)
    return found


def internal(name, source, is_package=False):
    found = imports(name, source, is_package) - {name}
    return {other for other in found if other.split(".")[0] in ("sgd_sparse_jax", "experiments")}


def against_library_rule(name, source, is_package=False):
    """Imports that rule 1 forbids in the library module `name`."""
    if name == "sgd_sparse_jax":
        return {other for other in internal(name, source, is_package) if "experiments" in other}
    subpackage = ".".join(name.split(".")[:2])
    return {
        other
        for other in internal(name, source, is_package)
        if other != "sgd_sparse_jax.types" and not f"{other}.".startswith(f"{subpackage}.")
    }


def against_experiment_rule(name, source, is_package=False):
    """Imports that rule 2 forbids in the module `name` of the experiments."""
    if name in ("experiments.reproduce", "experiments.report"):
        return set()
    return internal(name, source, is_package) & COMMANDS


def is_one_way(graph):
    """Whether the imports, module -> modules, have no cycle."""
    return bool(list(TopologicalSorter(graph).static_order()))


def in_new_process(program):
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "from sgd_sparse_jax.models import DiagonalNet",
        "from sgd_sparse_jax import models",
        "import sgd_sparse_jax",
        "import sgd_sparse_jax.measure.features as f",
        "from .. import models",
        "from ..data import images",
        "from experiments import storage",
        "def f():\n    from sgd_sparse_jax.data import images",
    ],
)
def test_violations_of_rule_1_are_detected(statement):
    assert against_library_rule("sgd_sparse_jax.train.step", statement)


def test_allowed_imports_pass():
    allowed = "import jax\nfrom sgd_sparse_jax.types import Batch\nfrom . import losses"
    assert not against_library_rule("sgd_sparse_jax.train.step", allowed)
    borrowed = "from experiments.diag_nets import run"
    assert against_experiment_rule("experiments.fc_nets", borrowed)
    assert against_experiment_rule("experiments.toy.run", borrowed)
    assert not against_experiment_rule("experiments.reproduce", borrowed)


def test_rule_1_a_subpackage_imports_types_and_itself():
    against = {name: against_library_rule(name, *module) for name, module in LIBRARY.items()}
    assert against and not {name: found for name, found in against.items() if found}


@pytest.mark.parametrize("package", [LIBRARY, EXPERIMENTS], ids=["library", "experiments"])
def test_imports_have_no_cycles(package):
    plain = {name: module for name, module in package.items() if not module[1]}
    assert is_one_way(
        {name: internal(name, *module) & plain.keys() for name, module in plain.items()}
    )


def test_folders_of_experiments_have_no_import_cycles():
    folder = lambda name: name.split(".")[1] if name.count(".") == 2 else ""
    graph = {}
    for name, module in EXPERIMENTS.items():
        others = {folder(other) for other in internal(name, *module) & EXPERIMENTS.keys()}
        graph.setdefault(folder(name), set()).update(others - {folder(name), ""})
    assert is_one_way({name: others for name, others in graph.items() if name})


def test_rule_2_the_top_of_experiments_lists_the_commands():
    for name in COMMANDS:
        tree = ast.parse(EXPERIMENTS[name][0])
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_rule_2_nothing_imports_a_command():
    against = {name: against_experiment_rule(name, *module) for name, module in EXPERIMENTS.items()}
    assert against and not {name: found for name, found in against.items() if found}


def test_files_and_figures_load_no_jax():
    plain = [name for name in EXPERIMENTS if name.split(".")[1:2] and name.split(".")[1] in NO_JAX]
    loaded = in_new_process(f"import sys, {', '.join(sorted(plain))}; print(*sys.modules)")
    assert loaded >= set(plain)
    assert "jax" not in loaded


def test_rule_3_importing_the_library_loads_nothing_heavy():
    """Except modules that jax, flax and optax load."""
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
    assert not loaded & HEAVY


def test_rule_4_no_meaningless_module_names():
    words = {name: set(name.rpartition(".")[2].split("_")) for name in INTERNAL}
    assert not {name for name in words if words[name] & VAGUE}
    classes = {
        f"{name}.{node.name}"
        for name, (source, _) in INTERNAL.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    assert classes
    assert not {name for name in classes if re.search("(Registry|Manager|Helper)s?$", name)}


def test_no_file_is_long():
    lines = {name: source.count("\n") for name, (source, _) in INTERNAL.items()}
    lines |= {
        str(path): path.read_text().count("\n") for path in Path(__file__).parent.rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count > 400}
