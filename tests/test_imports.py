"""The structure of the package: the order of imports, the length of modules, and no import of optional packages."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sb3_vpg

PACKAGE = Path(sb3_vpg.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
#: A module may import from its own row and from the rows above
ORDER = (
    {"common"},
    {"estimators", "policies", "presets"},
    {"buffers"},
    {"keywords"},
    {"rollout"},
    {"vpg"},
    {"diagnostics", "distributed", "maskable", "recurrent"},
    {"zoo"},
    {"study"},
    {"__init__", "__main__"},
)
#: These import nothing but common. They can be imported from zoo, study and the top level, not from the algorithm
ALONE, IMPORTERS_OF_ALONE = "envs", {"envs", "zoo", "study", "__init__", "__main__"}
#: Packages that are slow to import, optional, or change gymnasium. Only zoo, study and the classes for sb3-contrib's policies
#: import them at module level
OPTIONAL = {"rl_zoo3", "optuna", "pygame", "matplotlib", "sb3_contrib", "envpool", "ale_py", "minigrid"}
MAX_LINES, MAX_LINES_OF_VPG = 500, 450


def module_name(path: Path) -> str:
    """:return: dotted name within the package, such as "envs.vector", "envs" or "__init__" """
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imported(tree: ast.AST, in_functions: bool) -> Iterator[str]:
    """:return: dotted names of all imports, with the imported object; those within functions only if ``in_functions``"""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the order"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node, in_functions)


def imported_modules(source: str) -> set[str]:
    """:return: the modules of the package that a source imports anywhere, as :func:`module_name` returns them"""
    modules = set()
    for name in imported(ast.parse(source), in_functions=True):
        if name.split(".")[0] == "sb3_vpg":
            inside = name.removeprefix("sb3_vpg").removeprefix(".")
            modules.add(next((known for known in (inside, inside.rpartition(".")[0]) if known in NAMES), "__init__"))
    return modules


def may_import(importer: str, target: str) -> bool:
    """Whether a part of the package (the first component of a module's name) may import from another part."""
    if importer == target or target == "common":
        return True
    if ALONE in (importer, target):
        return target == ALONE and importer in IMPORTERS_OF_ALONE
    row = {part: i for i, parts in enumerate(ORDER) for part in parts}
    return row[target] < row[importer]


def optional_packages(source: str) -> set[str]:
    """:return: the optional packages that a source imports at module level"""
    return {name.split(".")[0] for name in imported(ast.parse(source), in_functions=False)} & OPTIONAL


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    importer = module_name(path).split(".")[0]
    for target in imported_modules(path.read_text()):
        assert may_import(importer, target.split(".")[0]), f"{path.relative_to(PACKAGE)} imports {target}"


def test_no_module_imports_itself_through_others():
    graph = {module_name(path): imported_modules(path.read_text()) - {module_name(path)} for path in MODULES}
    # Raises CycleError, which names the modules
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_are_short(path):
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= (MAX_LINES_OF_VPG if module_name(path) == "vpg" else MAX_LINES)


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if module_name(path).split(".")[0] not in ("zoo", "study", "maskable", "recurrent")],
    ids=module_name,
)
def test_optional_packages_are_not_imported_with_a_module(path):
    assert optional_packages(path.read_text()) == set()


def test_every_part_of_the_package_has_its_place():
    assert {name.split(".")[0] for name in NAMES} - {ALONE} <= set().union(*ORDER)


def test_the_checks_see_imports_in_functions_and_for_types_only():
    source = "if TYPE_CHECKING:\n    from sb3_vpg.vpg import VPG\ndef f():\n    import sb3_vpg.envs.vector\n    import pygame"
    assert imported_modules(source) == {"vpg", "envs.vector"}
    assert optional_packages(source) == set()
    assert optional_packages("class A:\n    from rl_zoo3.utils import ALGOS") == {"rl_zoo3"}
    assert imported_modules("from sb3_vpg import VPG, estimators") == {"__init__", "estimators"}


@pytest.mark.parametrize(
    ("importer", "target"),
    [("common", "estimators"), ("rollout", "vpg"), ("vpg", "envs"), ("envs", "buffers"), ("zoo", "study")],
)
def test_the_order_forbids(importer, target):
    assert not may_import(importer, target)


@pytest.mark.parametrize("name", ["MaskableVPG", "RecurrentVPG"])
def test_without_sb3_contrib_the_message_has_the_command(name, monkeypatch):
    class Missing:
        def find_spec(self, name, *_):
            if name == "sb3_contrib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in [module for module in sys.modules if module.split(".")[0] == "sb3_contrib"]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("sb3_vpg.maskable", "sb3_vpg.recurrent"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"^{name} needs sb3-contrib: pip install 'sb3_vpg\[contrib\]'$"):
        getattr(sb3_vpg, name)
    with pytest.raises(AttributeError, match="module 'sb3_vpg' has no attribute 'Other'"):
        sb3_vpg.Other  # noqa: B018
