"""The examples in docstrings run as shown, and every public name of the library has one."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re

import pytest

import sgd_sparse_jax

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(sgd_sparse_jax.__path__, "sgd_sparse_jax.")
    if not module.ispkg
]
THEORY = ("theory.stabilization", "theory.shallow", "theory.sampling")
SUBPACKAGES = ("models", "data", "train", "measure", *THEORY)


def public(name):
    """Public functions and classes defined in the module `name`, unwrapped."""
    found = {}
    for key, value in vars(importlib.import_module(name)).items():
        value = value.func if isinstance(value, functools.partial) else value
        value = inspect.unwrap(value) if callable(value) else value  # jit, custom_batching
        local = str(getattr(value, "__module__", "")).startswith("sgd_sparse_jax.")
        if local and (inspect.isclass(value) or inspect.isroutine(value)):
            found[key] = value
    return found


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_as_shown(name):
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    module = vars(importlib.import_module(name))
    for key, value in public(name).items():
        if value.__module__ == name:
            text = inspect.getdoc(value) or ""
            place = inspect.getsourcefile(value)
            runner.run(parser.get_doctest(text, dict(module), f"{name}.{key}", place, 0))
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_every_public_name_has_an_example(subpackage):
    names = public(f"sgd_sparse_jax.{subpackage}")
    assert names
    assert not [name for name, value in names.items() if ">>>" not in (value.__doc__ or "")]


@pytest.mark.parametrize("subpackage", (*SUBPACKAGES, "theory.flows"))
def test_functions_of_several_arguments_describe_each(subpackage):
    for name, value in public(f"sgd_sparse_jax.{subpackage}").items():
        arguments = inspect.signature(value).parameters if inspect.isroutine(value) else ()
        described = re.findall(r"^    (\w+): ", inspect.getdoc(value) or "", re.MULTILINE)
        assert len(arguments) < 2 or set(arguments) <= set(described), name
