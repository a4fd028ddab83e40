"""What a notebook needs on Colab and Kaggle, where it arrives alone: badges that open it, a link to its page, and a cell that
installs the course.

`autograder.building.build` puts them into every notebook, if pyproject.toml says under [project.urls] where the repository is.
Without an address a notebook gets none of these: it must not install what somebody else may have put at a place that we guess.
`python -m autograder.building.hosted` writes the git remote's address there.
"""

import re
import subprocess
import sys
import tomllib

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from autograder.checking.masters import SOLUTIONS

ROOT = SOLUTIONS.parent
PYPROJECT, DATA = ROOT / "pyproject.toml", ROOT / "data-requirements.txt"
BADGES = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{place}/blob/main/course/{unit}/{unit}.ipynb) "
    "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    "(https://kaggle.com/kernels/welcome?src=https://github.com/{place}/blob/main/course/{unit}/{unit}.ipynb) "
    "[with all outputs and worked answers](https://{owner}.github.io/{name}/{unit}/{unit}.html)"
)
SETUP = """\
# Installs the course where it is missing, as on Colab and Kaggle, whose torch stays; anywhere else it does nothing.
import importlib.util

if importlib.util.find_spec("peftlab") is None:
    %pip install --quiet "git+{address}"
    %pip install --quiet --no-deps {data}
    if importlib.util.find_spec("peftlab") is None:
        raise RuntimeError(
            "pip could not install the course; its own message is above. It needs the internet: on Kaggle,"
            " switch on Settings > Internet. Then run this cell again."
        )

from peftlab import colab

colab.prepare()"""


def address() -> str | None:
    """Return the repository's address, such as https://github.com/someone/course, or None if pyproject.toml has no address."""
    return tomllib.loads(PYPROJECT.read_text())["project"].get("urls", {}).get("Repository")


def add_to(notebook: NotebookNode, unit: str) -> None:
    """Put badges and a link to the rendered page below the notebook's heading, and the cell that installs behind that."""
    repository = address()
    if repository is None:
        return
    place = repository.removeprefix("https://github.com/")
    owner, _, name = place.partition("/")
    badges = BADGES.format(place=place, owner=owner.lower(), name=name, unit=unit)
    heading, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{heading}\n\n{badges}\n{rest}"
    data = " ".join(line.split("#")[0].strip() for line in DATA.read_text().splitlines() if not line.startswith("#"))
    notebook.cells.insert(1, new_code_cell(SETUP.format(address=repository, data=data.strip())))


def remote() -> str:
    """Return the address of the git remote `origin`, as a browser takes it.

    Raises:
        LookupError: if the remote is missing or is not on GitHub.
    """
    command = ["git", "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    on_github = re.search(r"github\.com[:/](.+?)(\.git)?/?$", found)
    if not on_github:
        raise LookupError(f"the git remote `origin` is {found or 'not set'}: Colab and Kaggle open notebooks from GitHub")
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
    print(f"From the next `make build` on, badges and set-up cells lead to {wanted}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
