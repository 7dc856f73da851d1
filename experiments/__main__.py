"""Lists the commands, one line each.

python -m experiments
"""

import ast
from pathlib import Path


def main() -> None:
    """Prints the name of each command and the first line of its docstring."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"python -m experiments.{path.stem:26s} {doc.splitlines()[0]}")
    print("\nEach takes --help, which shows an example, all flags and their defaults.")


if __name__ == "__main__":
    main()
