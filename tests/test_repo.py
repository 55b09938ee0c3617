"""Truths about the repository itself: its layers, what its code never does, its dependencies, files and documents."""

import ast
import graphlib
import re
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spar

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "spar"
MODULES = sorted(SOURCE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Layer of each package. Imports point down, and packages of one layer do not import each other.
LAYERS = {
    "common": 1,
    "flow": 2, "losses": 2, "processing": 2,
    "data": 3, "models": 3, "worlds": 3,
    "checkpoints": 4,
    "inference": 5, "training": 5,
    "recipes": 6, "evaluation": 6, "serving": 6,
    "reporting": 7,
    "ui": 8,
    "cli": 9, "__main__": 10, "__init__": 10,
}  # fmt: skip
CONSOLE_MODULES = {"spar.cli.main", "spar.cli.console"}  # may use rich; the CLI alone prints
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # where the imported name is not the name that pip knows

MAX_FILE_BYTES = 10 * 2**20
# Of the bundled weights, 40 MB in all.
MAX_WEIGHTS_BYTES = {"src/spar/assets/weights/": 25 * 10**6, "src/spar/assets/dualtoken/": 15 * 10**6}
# A folder that only one machine has, at the start of a path (so no match in `https://...` or `tests/home/...`).
MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:work|farm|root|home|Users|tmp/bash_jobs)/\w")


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """The package of a module: the part of its name after `spar`."""
    return (module.split(".") + ["__init__"])[1]


def imports(tree: ast.Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too; a name out of a package is its module where it is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full not in ("spar.__version__", "spar.DISTRIBUTION"):  # which every layer may import from the top
                    yield node.lineno, full if full in known else base


def layer_faults(module: str, tree: ast.Module, known: set[str]) -> list[str]:
    """Imports that point up or sideways, or that are relative and so hide where they point."""
    own = package_of(module)
    faults = []
    for line, target in imports(tree, known):
        if target.startswith("."):
            faults.append(f"{module}:{line}: expected an absolute import, got {target}")
        if target.split(".")[0] != "spar":
            continue
        other = package_of(target)
        if own == other or own == "__init__":
            continue
        if own not in LAYERS or other not in LAYERS:
            faults.append(f"{module}:{line}: {own if own not in LAYERS else other} has no layer; give it one in LAYERS")
        elif LAYERS[other] >= LAYERS[own]:
            faults.append(f"{module}:{line}: {own} (layer {LAYERS[own]}) imports {target} (layer {LAYERS[other]})")
    return faults


def forbidden(module: str, tree: ast.Module) -> list[str]:
    """What the code never does: printing outside the CLI, loading loosely, running code out of a file."""
    faults = []

    def fault(node: ast.AST, what: str) -> None:
        faults.append(f"{module}:{node.lineno}: {what}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            fault(node, "assert: checks raise (python -O drops assertions)")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    fault(node, f"imports {name}")
                if name.split(".")[0] == "rich" and module not in CONSOLE_MODULES:
                    fault(node, "imports rich: only the CLI prints")
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in ("sys.stdout", "sys.stderr") and not module.startswith("spar.cli."):
                fault(node, f"{dotted}: only the CLI prints")
            if node.attr == "MAX_IMAGE_PIXELS" and isinstance(node.ctx, ast.Store):
                fault(node, "changes Pillow's global limit")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "print" and not module.startswith("spar.cli."):
                fault(node, "print: only the CLI prints")
            if called in ("eval", "exec"):
                fault(node, called)
            if called.startswith("yaml.") and "load" in called and keywords.get("Loader") != "PlainLoader":
                fault(node, f"{called} without Loader=PlainLoader, which is safe and bounded")
            if called == "torch.load" and keywords.get("weights_only") != "True":
                fault(node, "torch.load without weights_only=True")
            if keywords.get("strict") == "False" and called != "zip":
                fault(node, "strict=False")
            if called.endswith("load_state_dict") and len(node.args) > 1 and ast.unparse(node.args[1]) == "False":
                fault(node, "strict=False")
            for keyword in ("trust_remote_code", "allow_pickle"):
                if keywords.get(keyword, "False") != "False":
                    fault(node, f"{keyword}={keywords[keyword]}")
    return faults


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}


@pytest.fixture(scope="module")
def known(trees) -> set[str]:
    return {*trees}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files of the repository: tracked, or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def read_text(path: Path) -> str | None:
    """A file's text; None for a binary file."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


# Package layout


def test_imports_point_down_the_layers(trees, known):
    assert [fault for module, tree in trees.items() for fault in layer_faults(module, tree, known)] == []


def find_circle(trees: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle; empty when there are none.

    What is imported for annotations alone does not count: a contract and what it is about name each other.
    """
    graph = {
        module: {target for _, target in imports(without_annotations(tree), {*trees})} - {module}
        for module, tree in trees.items()
    }
    graph.pop("spar", None)  # its names are imported at their first use
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def without_annotations(tree: ast.Module) -> ast.Module:
    """A module without its blocks `if TYPE_CHECKING:`."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


def test_no_module_imports_itself_in_a_circle(trees):
    assert find_circle(trees) == []
    named = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spar.b import X")
    assert find_circle({"spar.a": named, "spar.b": ast.parse("from spar import a")}) == []
    planted = {"spar.a": ast.parse("from spar import b"), "spar.b": ast.parse("def late():\n    from spar.a import x")}
    assert set(find_circle(planted)) == {*planted}


def bound_names(tree: ast.Module) -> set[str]:
    """The names that a module has once it is imported."""
    found: set[str] = set()
    nodes: list[ast.AST] = [*tree.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update((name.asname or name.name).partition(".")[0] for name in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        nodes.extend(ast.iter_child_nodes(node))
    return found


def missing_imports(tree: ast.Module, trees: dict[str, ast.Module]) -> list[str]:
    """What a file imports out of the package's modules that they do not have, inside functions too."""
    wanted = [
        (node.module or "", name.name)
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
        for name in node.names
    ]  # fmt: skip
    return [
        f"{module}.{name}" for module, name in wanted
        if module.partition(".")[0] == "spar" and module != "spar" and f"{module}.{name}" not in trees
        and name not in (bound_names(trees[module]) if module in trees else ())
    ]  # fmt: skip


def test_scripts_and_tests_import_what_there_is(trees, files):
    """Scripts of the documents and benchmarks too, which no type checker reads and few tests run."""
    scripts = [path for path in files if path.suffix == ".py" and SOURCE not in path.parents]
    assert len(scripts) > 100
    found = {path.relative_to(ROOT).as_posix(): missing_imports(ast.parse(path.read_text()), trees) for path in scripts}
    assert {path: missing for path, missing in found.items() if missing} == {}


def test_an_import_of_what_there_is_not_would_be_found(trees):
    line = "def late():\n    from spar.evaluation.study import read_study, run_study, gone\nfrom spar.nowhere import x"
    assert missing_imports(ast.parse(line), trees) == [
        "spar.nowhere.x", "spar.evaluation.study.run_study", "spar.evaluation.study.gone"
    ]  # fmt: skip
    assert missing_imports(ast.parse("from spar.evaluation import study\nfrom spar import nothing"), trees) == []


def test_no_class_name_is_used_twice(trees):
    """One concept has one name, and one name is one concept: also where two modules would never meet."""
    classes = [node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name, count in Counter(classes).items() if count > 1] == []


def test_the_code_never_prints_loads_loosely_or_runs_what_it_reads(trees):
    assert [fault for module, tree in trees.items() for fault in forbidden(module, tree)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("spar.flow.path", "from spar.models.spar import SparModel"),
        ("spar.flow.path", "from spar.losses import alignment"),
        ("spar.models.spar", "from spar.inference import pipeline"),
        ("spar.models.spar", "from spar import SparPipeline"),
        ("spar.models.spar", "from ..training import loop"),
        ("spar.models.spar", "def late():\n    import spar.training.loop"),
        ("spar.attic", "from spar.common.errors import InputError"),
    ],
)
def test_an_import_that_points_up_would_be_found(module, line, known):
    assert layer_faults(module, ast.parse(line), known)


@pytest.mark.parametrize(
    "line",
    [
        "from spar import __version__",
        "from spar.common.errors import InputError",
        "from spar.models import router",
        "import torch",
    ],
)
def test_an_import_that_points_down_is_no_fault(line, known):
    assert layer_faults("spar.models.spar", ast.parse(line), known) == []


@pytest.mark.parametrize(
    "line",
    [
        "print('x')",
        "sys.stdout.write('x')",
        "from rich.table import Table",
        "assert x",
        "import pickle",
        "from pickle import load",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "model.load_state_dict(tensors, strict=False)",
        "model.load_state_dict(tensors, False)",
        "load(folder, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "Image.MAX_IMAGE_PIXELS = None",
        "eval(text)",
    ],
)
def test_what_the_code_never_does_would_be_found(line):
    assert forbidden("spar.models.spar", ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "zip(a, b, strict=False)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=PlainLoader)",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "Image.MAX_IMAGE_PIXELS < 10",
    ],
)
def test_what_the_code_may_do_is_no_fault(line):
    assert forbidden("spar.models.spar", ast.parse(line)) == []


def test_the_cli_prints():
    assert forbidden("spar.cli.main", ast.parse("from rich.console import Console; print('x', file=sys.stderr)")) == []


# The package


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, spar; print(*{'torch', 'numpy', 'transformers', 'diffusers', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_offers_the_names_it_lists():
    from spar.common.errors import InputError
    from spar.inference.pipeline import SparPipeline

    assert spar.InputError is InputError and spar.SparPipeline is SparPipeline
    assert {"InputError", "SparPipeline"} <= {*dir(spar)}
    with pytest.raises(AttributeError, match="attic"):
        spar.attic  # noqa: B018


# Dependencies


def declared() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]


def test_every_dependency_has_a_range_and_a_written_reason():
    lines = [line.strip() for line in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()]
    for requirement in declared():
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement
        places = [i for i, line in enumerate(lines) if re.match(rf'"{re.escape(requirement.name)}[<>=]', line)]
        for place in places:
            assert re.match(r"# .{15,}", lines[place - 1]), f"{requirement.name} has no reason in the line above it"
        assert places


def test_every_imported_library_is_declared(trees, known):
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    for module, tree in trees.items():
        for line, target in imports(tree, known):
            top = target.split(".")[0]
            if top != "spar" and top not in sys.stdlib_module_names:
                assert canonicalize_name(DISTRIBUTIONS.get(top, top)) in names, f"{module}:{line} imports {top}"


def test_the_tested_versions_are_pinned_within_the_ranges():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None for pin in pins)
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert len(versions) == len(pins)
    optional = {Requirement(line).name for line in PROJECT["optional-dependencies"]["gpu"]}
    for requirement in declared():
        if requirement.name not in optional:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_versions_are_the_lower_bounds_of_the_ranges():
    script = runpy.run_path(str(ROOT / ".ci" / "oldest.py"))
    bounds = script["oldest"](script["ranges"]((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert {*bounds} == {requirement.name for requirement in declared()}
    for requirement in declared():
        assert f">={bounds[requirement.name]}" in {str(specifier) for specifier in requirement.specifier}
    for unclear in (["numpy"], ["numpy>=2"], ["numpy<3,>=2"], ["numpy==2.1"], ["numpy>=2,<3", "numpy>=2.1,<3"]):
        with pytest.raises(SystemExit, match="expected"):
            script["oldest"](unclear)


# Files


def test_no_file_is_large_but_the_bundled_weights(files):
    others = set(files)
    for folder, most in MAX_WEIGHTS_BYTES.items():
        weights = [path for path in files if path.relative_to(ROOT).as_posix().startswith(folder)]
        assert weights and sum(path.stat().st_size for path in weights) <= most
        others -= {*weights}
    assert [path for path in others if path.stat().st_size > MAX_FILE_BYTES] == []


def test_no_file_names_a_path_of_one_machine(files):
    found = []
    for path in files:
        for number, line in enumerate((read_text(path) or "").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_a_path_of_one_machine_would_be_found():
    for folder in ("work", "root", "home", "Users"):
        assert MACHINE_PATH.search(f'open("/{folder}' + '/someone/model")')
    for harmless in ("https://example.org/home/page", "tests/work/x", "/usr/bin/env bash", "~/work/x"):
        assert not MACHINE_PATH.search(harmless)


def test_every_cited_version_is_the_packages_own():
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited == [spar.__version__]


# Documents


def file_map(readme: str) -> list[str]:
    """The paths of the README's section "File map": lines `| path in backticks | what it is |`."""
    section = re.search(r"^## File map\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    return re.findall(r"^\|\s*`([^`]+)`\s*\|\s*\w", section[1], re.M) if section else []


def test_the_file_map_of_the_readme_is_the_tree():
    listed = file_map((ROOT / "README.md").read_text(encoding="utf-8"))
    assert listed, 'README.md: expected a section "## File map" with lines "| `path` | what |"'
    assert len(set(listed)) == len(listed)
    assert [name for name in listed if not (ROOT / name).exists()] == []
    packages = {
        path.name
        for path in SOURCE.iterdir()
        if path.suffix == ".py" and path.name != "__init__.py" or (path / "__init__.py").is_file()
    }
    prefix = "src/spar/"
    named = {name.removeprefix(prefix).split("/")[0] for name in listed if name.startswith(prefix) and name != prefix}
    assert packages - named == set(), "missing in the file map of README.md"


def test_the_file_map_is_read_as_it_is_written():
    table = "| path | what |\n| --- | --- |\n| `a/b.py` | it |\n"
    readme = f"## Other\n| `no` | x |\n## File map\n\n{table}## Next\n| `c` | x |\n"
    assert file_map(readme) == ["a/b.py"]
    assert file_map("# Nothing\n") == []
