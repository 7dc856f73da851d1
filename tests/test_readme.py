"""What the README shows, runs."""

import contextlib
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
    from experiments import resnet_cifar

    fields = resnet_cifar.Config.__dataclass_fields__
    flags = set(re.findall(r"--(\w+)", README)) - {"help", "upgrade"}
    assert flags and flags <= set(fields)
