"""The directions and budgets of the design, kept by reading the source: what may import what, and how long things are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / "vkd").rglob("*.py"))
}
PURE = (
    "vkd.losses",
    "vkd.metrics",
    "vkd.layers",
    "vkd.similarity_layers",
    "vkd.regions",
    "vkd.triplets",
    "vkd.clips",
    "vkd.rounds",
    "vkd.schema",
    "vkd.errors",
)
ONLY_IN = {  # a library, and the modules or packages that may import it
    "ray": (
        "vkd.cluster",
        "vkd.autoscaler",
        "vkd.resources",
        "vkd.execution",
        "vkd.beside",
        "vkd.training",
        "vkd.preemption",
        "vkd.trial",
        "vkd.submit",
        "vkd.spot_notice",
        "vkd.search.sharded",
    ),
    "decord": ("vkd.video.decode",),
    "av": ("vkd.video.decode", "vkd.video.render"),
    "fsspec": ("vkd.store", "vkd.manifest", "vkd.sources", "vkd.video", "vkd.checkpoint"),
    "s3fs": ("vkd.store", "vkd.manifest", "vkd.sources", "vkd.video", "vkd.checkpoint"),
    "pyarrow.fs": ("vkd.store", "vkd.manifest", "vkd.sources", "vkd.video", "vkd.checkpoint"),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 40, 6


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, at the top or inside a function; for `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_is_something_to_check() -> None:
    assert {"vkd.cli", "vkd.video.decode", "vkd.recipes.kd"} <= set(MODULES)
    assert "ray" in imports_of(MODULES["vkd.execution"])
    assert "av" in imports_of(MODULES["vkd.video.decode"])


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {module for module, path in MODULES.items() if any(under(name, library) for name in imports_of(path))}
    assert {module for module in users if not any(under(module, place) for place in ONLY_IN[library])} == set()


@pytest.mark.parametrize("package", ["vkd.teachers", "vkd.students", "vkd.recipes"])
def test_siblings_do_not_import_each_other(package: str) -> None:
    """A sibling is a file or a folder; files within one folder may import each other."""
    of = {module: module.removeprefix(f"{package}.").partition(".")[0] for module in MODULES if module.startswith(f"{package}.")}
    assert "base" in of.values()
    for module, sibling in of.items():
        allowed = {"base", sibling} - ({"base"} if sibling == "base" else set())
        assert {of[name] for name in imports_of(MODULES[module]) if name in of} <= allowed, module


def test_pure_modules_import_nothing_of_vkd_but_each_other() -> None:
    for module, path in MODULES.items():
        if any(under(module, pure) for pure in PURE):
            ours = {name for name in imports_of(path) if under(name, "vkd")} - {"vkd"}
            assert {name for name in ours if not any(under(name, pure) for pure in PURE)} == set(), module


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("vkd.cli", ("torch", "ray", "pyarrow", "pydantic")),  # `vkd --help` and a typo must answer at once
        ("vkd.stages, vkd.video.decode, vkd.planning", ("torch", "ray")),  # decode workers
        ("vkd.status, vkd.manifest", ("torch", "ray", "av", "decord")),
    ],
)
def test_what_an_import_does_not_bring(modules: str, absent: tuple[str, ...]) -> None:
    program = f"import sys\nimport {modules}\nprint(*sorted({set(absent)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == []


def test_no_module_does_work_at_import() -> None:
    """Its top level holds only a docstring, imports, definitions and assignments."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            assert isinstance(node, allowed) or docstring or guarded, f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_budgets(module: str) -> None:
    path = MODULES[module]
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    for function in functions_of(path):
        assert (function.end_lineno or 0) - function.lineno + 1 <= MAX_FUNCTION_LINES, function.name
        is_command = any(ast.unparse(decorator).startswith("app.command") for decorator in function.decorator_list)
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        # a command's parameters are its options
        assert is_command or len([name for name in names if name not in ("self", "cls")]) <= MAX_PARAMETERS, function.name


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    caught = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(kind is not None and ast.unparse(kind) != "Exception" for kind in caught)
