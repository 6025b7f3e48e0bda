"""How tests of a host's private.py find what it takes, and say what has broken."""

import ast
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

HOSTS = Path(__file__).parents[2] / "integrations"


class Privates:
    """The private names of one toolkit, seen in one version of it."""

    def __init__(self, toolkit: str, seen: str) -> None:
        self.toolkit, self.seen = toolkit, seen
        self._folder = HOSTS / toolkit

    @contextmanager
    def needs(self, what: str, feature: str):
        """Have any failure within say what broke, and what depends on it."""
        try:
            yield
        except Exception as error:
            raise AssertionError(
                f"{what} of {self.toolkit} {version(self.toolkit)} is not what it was "
                f"in {self.seen}: {type(error).__name__}: {error}; needed for "
                f"{feature}: see integrations/{self.toolkit}/private.py"
            ) from error

    def exists(self, module: str, name: str, feature: str) -> None:
        with self.needs(f"{module}.{name}", feature):
            getattr(import_module(module), name)

    def imported(self, file: str = "private.py") -> set[tuple[str, str]]:
        """What a file imports from the toolkit, as (module, name)."""
        nodes = ast.walk(ast.parse((self._folder / file).read_text()))
        prefixes = (self.toolkit, f"{self.toolkit}_examples")
        return {
            (node.module, alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            and node.module.partition(".")[0] in prefixes
            for alias in node.names
        }

    def reached_elsewhere(self, attributes: set[str]) -> list[str]:
        """Where other files import what private.py does, or touch private attributes.

        Args:
            attributes: Names without an underscore that count as private, too.
        """
        found = []
        for path in sorted(self._folder.glob("*.py")):
            if path.name == "private.py":
                continue
            taken = self.imported(path.name) & self.imported()
            found += [f"{path.name}: {module}.{name}" for module, name in taken]
            tree = ast.parse(path.read_text())
            own = _own_names(tree)
            for node in ast.walk(tree):
                if not isinstance(node, ast.Attribute):
                    continue
                base = node.value.id if isinstance(node.value, ast.Name) else ""
                hidden = node.attr.startswith("_") and not node.attr.startswith("__")
                if base in ("self", "torch", "private") or node.attr in own:
                    continue
                if hidden or node.attr in attributes:
                    found.append(f"{path.name}:{node.lineno}: .{node.attr}")
        return found


def _own_names(tree: ast.AST) -> set[str]:
    """Names that a file gives to attributes and functions itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            names |= {
                target.id
                for line in node.body
                if isinstance(line, ast.Assign)
                for target in line.targets
                if isinstance(target, ast.Name)
            }
    return names
