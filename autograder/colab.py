"""What a notebook needs on Colab, where it arrives alone: a badge that opens it there, and a cell that installs the course.

`autograder.build` puts both into every notebook, if pyproject.toml says under [project.urls] where the repository is. Without
an address there is neither: a notebook must not install what somebody else may have put at a place that we only guess.
`python -m autograder.colab` writes the git remote's address there.
"""

import re
import subprocess
import sys
import tomllib

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from autograder.reference import SOLUTIONS

ROOT = SOLUTIONS.parent
PYPROJECT, DATA = ROOT / "pyproject.toml", ROOT / "data-requirements.txt"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = """\
# Installs the course where it is missing, as on Colab, whose torch stays; anywhere else it does nothing.
import importlib.util

if importlib.util.find_spec("peftlab") is None:
    %pip install --quiet "git+{address}"
    %pip install --quiet --no-deps {data}

from peftlab import colab

colab.prepare()"""


def address() -> str | None:
    """Return the repository's address, such as https://github.com/someone/course, or None if there is none."""
    return tomllib.loads(PYPROJECT.read_text())["project"].get("urls", {}).get("Repository")


def add_to(notebook: NotebookNode, unit: str) -> None:
    """Put the badge below the notebook's heading, and the cell that installs behind the first cell."""
    repository = address()
    if repository is None:
        return
    place = repository.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/course/{unit}/{unit}.ipynb"
    heading, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{heading}\n\n[![Open in Colab]({BADGE})]({link})\n{rest}"
    data = " ".join(line.split("#")[0].strip() for line in DATA.read_text().splitlines() if not line.startswith("#"))
    notebook.cells.insert(1, new_code_cell(SETUP.format(address=repository, data=data.strip())))


def remote() -> str:
    """Return the address of the git remote `origin`, as a browser takes it.

    Raises:
        LookupError: if there is none on GitHub.
    """
    command = ["git", "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    on_github = re.search(r"github\.com[:/](.+?)(\.git)?/?$", found)
    if not on_github:
        raise LookupError(f"the git remote `origin` is {found or 'not set'}: Colab opens notebooks from GitHub")
    return f"https://github.com/{on_github[1]}"


def main() -> int:
    """Write the git remote's address into pyproject.toml."""
    try:
        wanted = remote()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    text = re.sub(r"\[project\.urls\]\nRepository = .*\n\n", "", PYPROJECT.read_text())
    before, heading, after = text.partition("[project.optional-dependencies]")
    PYPROJECT.write_text(f'{before}[project.urls]\nRepository = "{wanted}"\n\n{heading}{after}')
    print(f"From the next `make build` on, badges and Colab's cells lead to {wanted}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
