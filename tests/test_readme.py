"""What the README shows, runs."""

import contextlib
import importlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs_and_prints_what_its_comment_says():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(example, "README.md", "exec"), {})
    assert screen.getvalue() == "(64, 3, 3)\n"


def test_every_flag_of_the_commands_exists():
    for command, flags in re.findall(r"python -m experiments\.(\w+)([^`]*)", README):
        module = importlib.import_module(f"experiments.{command}")
        config = module.grid_type() if hasattr(module, "grid_type") else module.Config
        known = set(config.__dataclass_fields__) | {"help"}
        assert set(re.findall(r"--(\w+)", flags)) <= known, command


def test_every_setting_and_problem_of_the_commands_exists():
    from experiments import diag_nets, fc_nets, loss_surface
    from experiments.toy import problems

    for module in (diag_nets, fc_nets, loss_surface):
        name = module.__name__.rpartition(".")[2]
        for settings in re.findall(rf"experiments\.{name} --setting ([^|]*)", README):
            for setting in re.findall(r"[\w-]+", settings.replace("` or `", " ")):
                assert setting in module.SETTINGS, (name, setting)
    gallery = (Path(__file__).parents[1] / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"--problem ([\w-]+)", gallery)) <= problems.PROBLEMS.keys()


def test_the_gallery_shows_files_that_are_there():
    docs = Path(__file__).parents[1] / "docs"
    figures = re.findall(r"\]\((figures/[^)]*)\)", (docs / "gallery.md").read_text())
    assert len(figures) >= 15 and len(set(figures)) == len(figures)
    assert all((docs / figure).stat().st_size > 1000 for figure in figures)
