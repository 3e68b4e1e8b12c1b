"""Print what lodeset and some of its extras need, one requirement a line: python dependencies.py EXTRA..."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(need for extra in sys.argv[1:] for need in extras[extra]), sep="\n")
