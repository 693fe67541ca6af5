"""The layers of s4: who may import whom, and that every command is documented."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import S4

from s4 import server

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "s4"
NODE_ONLY = {"falcon", "waitress", "sh", "sqlite3", "sqlite_utils"}
# The lists of the document; each is of layers, and a layer of modules and packages.
SHARED, CLIENT, NODE = (
    [layer.split(", ") for layer in " ".join(found.split()).split(" ← ")]
    for found in re.findall(
        r"(?ms)^- (?:shared|the client|the node): (.+?)[;.]$", (TOP / "docs/architecture.md").read_text()
    )
)
COMMANDS = re.findall(
    r"(?m)^  ([a-z-]+) ", subprocess.run([S4, "--help"], capture_output=True, text=True).stdout
)


def _module(path: Path) -> str:
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node, apart from what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from _statements(child)


def _imports(module: str) -> set[str]:
    """The modules that one imports, also inside functions: those of s4 in full, of others the first name."""
    found: set[str] = set()
    for node in _statements(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: imports are absolute"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in below if name in MODULES]
            names = submodules if len(submodules) == len(below) else [node.module, *submodules]
        found |= {name if name.split(".")[0] == "s4" else name.split(".")[0] for name in names}
    return found


IMPORTS = {module: _imports(module) for module in MODULES}


def _reached(module: str) -> set[str]:
    """All that a module imports, directly or through others of s4."""
    found: set[str] = set()
    pending = [module]
    while pending:
        new = IMPORTS.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def _own(module: str) -> set[str]:
    return {name for name in IMPORTS[module] if name in MODULES}


def _package(name: str) -> list[str]:
    return [module for module in MODULES if module == name or module.startswith(name + ".")]


def _listed(module: str) -> str:
    """The name of a module, or of its package, in the lists."""
    return module.removeprefix("s4.").split(".")[0]


def test_every_import_of_the_package_exists() -> None:
    missing = {(module, name) for module in MODULES for name in IMPORTS[module] if name.startswith("s4.")}
    assert {(module, name) for module, name in missing if name not in MODULES} == set()


def test_there_are_no_cycles() -> None:
    assert [module for module in MODULES if module in _reached(module)] == []


def test_every_module_is_in_one_layer_of_the_document() -> None:
    listed = [name for layer in SHARED + CLIENT + NODE for name in layer]
    assert sorted(listed) == sorted({_listed(module) for module in MODULES})


@pytest.mark.parametrize("layers", [SHARED + CLIENT, SHARED + NODE], ids=["client", "node"])
def test_each_imports_only_what_stands_before_it(layers: list[list[str]]) -> None:
    before: set[str] = set()
    for layer in layers:
        for module in [module for module in MODULES if _listed(module) in layer]:
            imported = {_listed(name) for name in _own(module)} - {_listed(module)}
            assert imported - before == set(), module
        before |= set(layer)


@pytest.mark.parametrize("module", [*_package("s4.index"), "s4.storage"])
def test_index_and_storage_know_nothing_of_http(module: str) -> None:
    assert not _reached(module) & {"http", "s4.http"}


def test_only_the_surface_knows_http_servers() -> None:
    assert {module for module in MODULES if "falcon" in IMPORTS[module]} == {
        "s4.api",
        "s4.jobapi",
        "s4.parameters",
    }
    assert {module for module in MODULES if "waitress" in IMPORTS[module]} == {"s4.webserver"}


def test_http_resources_hold_no_sql_and_no_processes() -> None:
    assert not (IMPORTS["s4.api"] | IMPORTS["s4.jobapi"]) & {
        "sqlite3",
        "sqlite_utils",
        "subprocess",
        "multiprocessing",
        "sh",
        "s4.storage",
    }


def test_only_one_place_knows_sqlite_and_one_knows_sh() -> None:
    sqlite = {"sqlite3", "sqlite_utils"}
    assert {module for module in MODULES if sqlite & IMPORTS[module]} <= set(_package("s4.index"))
    assert {module for module in MODULES if "sh" in IMPORTS[module]} == {"s4.workers.shell"}


def test_a_running_client_has_loaded_nothing_of_a_node(folder: Path) -> None:
    (folder / "conf").write_text("here:1\n")
    command = [sys.executable, "-X", "importtime", "-m", "s4.cli", "servers", "-c", str(folder / "conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout == "here:1\n"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "s4.client" in loaded
    assert not loaded & (NODE_ONLY | {"asyncio", "ssl", "tqdm", "multiprocessing"})
    assert not loaded & {"s4.node", "s4.api", "s4.server", "s4.index", "s4.workers", "s4.jobs", "s4.storage"}
    assert not loaded & {"s4.jobcontrol", "s4.jobcommands", "s4.copying"}


def test_the_public_face_is_declared() -> None:
    import s4

    assert "Client" in s4.__all__ and "S4Error" in s4.__all__
    assert all(getattr(s4, name).__doc__ for name in s4.__all__ if not name.startswith("__"))
    assert set(s4.__all__) <= set(dir(s4))


def test_a_type_checker_knows_the_public_face_and_no_other_name(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import s4\n\ns4.Client, s4.JobError, s4.S4Error\ns4.Clinet\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and "Clinet" in errors[0], done.stdout


def test_the_commands_are_those_of_the_specification() -> None:
    assert sorted(COMMANDS) == sorted(
        [
            *("cp", "ls", "rm", "eval", "map", "map-to-n", "map-from-n", "health", "servers", "config"),
            *("jobs", "job", "wait", "cancel", "retry", "joblog", "stat", "sql"),
        ]
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    for arguments in ([command, "--help"], [command, "-h"]):
        done = subprocess.run([S4, *arguments], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"s4 {command}" in done.stdout and len(done.stdout.splitlines()) > 4, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_table_of_the_readme(command: str) -> None:
    rows = [line for line in (TOP / "README.md").read_text().splitlines() if line.startswith("| `")]
    first_columns = [row.split("|")[1] for row in rows]
    assert [column for column in first_columns if re.search(rf"`{command}(?![-\w])", column)]


@pytest.mark.parametrize("option", [setting.name for setting in server._PLACE + server._LIMITS])
def test_every_option_of_the_server_is_in_the_readme(option: str) -> None:
    assert re.search(rf"^\|.* `--{option}\b", (TOP / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("option", [setting.name for setting in server._LOCAL])
def test_every_option_of_local_is_in_the_readme(option: str) -> None:
    assert re.search(rf"`s4-server local .*--{option} ", (TOP / "README.md").read_text())


def test_every_error_says_what_it_means() -> None:
    tree = ast.parse(MODULES["s4.errors"].read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 10
    assert [node.name for node in classes if not ast.get_docstring(node)] == []
    bases = {node.name: ast.unparse(node.bases[0]) for node in classes}
    assert {name for name, base in bases.items() if base not in bases} == {"S4Error"}
