"""The floors of the house, held against the code: who may import whom, late and type-only imports included.

words < workshops < trades < recipe and gui < command line. Arrows only go down, and never to a neighbour on the same
floor. docs/architecture.md says why.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src/whitetuner"

FLOORS = [
    {"version", "errors", "tongue", "paths", "hub_names", "records", "family", "diffusion"},
    {"config", "runs", "adapters", "memory", "install"},
    {"families", "data", "train", "checkpoint", "nano", "importers"},
    {
        "recipe",
        "assemble",
        "encoding",
        "rehearsal",
        "full_costs",
        "planning",
        "released",
        "plan_view",
        "captioning",
        "companions",
        "between",
        "final_files",
        "final_notes",
        "resolve",
        "resuming",
        "learned",
        "validating",
        "forking",
        "checks",
        "models",
        "single_files",
        "hub",
        "denoisers",
        "file_words",
        "prepared",
        "scenes",
        "sharing",
        "signals",
        "tiny",
        "drawing",
        "gui",
    },
    {
        "api",
        "cli",
        "file_commands",
        "parser",
        "commands",
        "config_commands",
        "demo",
        "doctor",
        "bug_report",
        "evidence",
        "memory_proofs",
        "portable",
        "selftest",
        "__main__",
        "__init__",
    },
]
#: Words explain words; rooms on the two upper floors are steps of one thing. The page knows none of its neighbours.
NEIGHBOURS_MAY = {0: FLOORS[0], 3: FLOORS[3] - {"gui"}, 4: FLOORS[4]}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}
#: Answers in the blink of an eye, since it never loads torch (type-only imports are free).
LIGHT = [
    "__init__",
    "__main__",
    "version",
    "errors",
    "tongue",
    "records",
    "family",
    "cli",
    "parser",
    "importers",
    "config",
    "runs",
    "install",
    "gui",
]

STALE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "tools"}


@dataclass(frozen=True)
class Import:
    """One import statement. target: e.g. "whitetuner.data.scan"; names: what is taken from it."""

    file: Path
    line: int
    target: str
    names: tuple[str, ...]
    late: bool
    type_only: bool

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(SOURCE.parent)}:{self.line}"


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), -1)


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def walk(node: ast.AST, late: bool = False, type_only: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, late, type_only
            continue
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from walk(child, late or is_function, type_only or is_typing)


def imports() -> Iterator[Import]:
    for file in files():
        for node, late, type_only in walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name, (), late, type_only)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports by dots; write the whole name"
                names = tuple(alias.name for alias in node.names)
                yield Import(file, node.lineno, node.module or "", names, late, type_only)


def arrows() -> Iterator[tuple[str, str, Import]]:
    """(from room, to room, import) of every import within the house, except inside a room."""
    for one in imports():
        parts = one.target.split(".")
        if parts[0] != "whitetuner":
            continue
        targets = [parts[1]] if len(parts) > 1 else list(one.names)
        for target in targets:
            to = target if floor_of(target) >= 0 or (SOURCE / target).exists() else "__init__"
            if to == "__init__" and (SOURCE / f"{target}.py").exists():
                to = target
            if to != room_of(one.file):
                yield room_of(one.file), to, one


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(file) for file in files()}
    assert rooms - set(itertools.chain(*FLOORS)) == set(), "put the new module on a floor of FLOORS"


def test_arrows_only_go_down() -> None:
    wrong = []
    for here, there, one in arrows():
        is_registry = one.late and one.target in ("whitetuner.families", "whitetuner.families.registry")
        is_version = there == "__init__" and set(one.names) <= {"__version__"}
        below = floor_of(there) < floor_of(here)
        neighbours = floor_of(there) == floor_of(here) and {here, there} <= NEIGHBOURS_MAY.get(
            floor_of(here), set()
        )
        if not (below or neighbours or is_registry or is_version or here == "__init__"):
            wrong.append(f"{one.place}: {here} imports {there}")
    assert wrong == []


def test_there_are_no_circles() -> None:
    """Between modules at load time: each can be imported first."""
    graph: dict[str, set[str]] = {}
    for one in imports():
        if one.late or one.type_only or not one.target.startswith("whitetuner"):
            continue
        name = ".".join(one.file.relative_to(SOURCE.parent).with_suffix("").parts)
        ends = {one.target} | {f"{one.target}.{part}" for part in one.names}
        graph.setdefault(name, set()).update(ends)
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*path, name))
        if state.get(name) == 2:
            return
        state[name] = 1
        for end in sorted(graph.get(name, ())):
            visit(end, (*path, name))
        state[name] = 2

    for name in sorted(graph):
        visit(name, ())


def test_families_know_only_the_words() -> None:
    wrong = [
        f"{one.place}: {here} imports {there}"
        for here, there, one in arrows()
        if here == "families" and floor_of(there) > 0
    ]
    assert wrong == []


def test_families_do_not_know_each_other() -> None:
    wrong = []
    for one in imports():
        parts = one.file.relative_to(SOURCE).parts
        if parts[0] == "families" and len(parts) > 2 and one.target.startswith("whitetuner.families."):
            other = one.target.split(".")[2]
            if (SOURCE / "families" / other).is_dir() and other != parts[1]:
                wrong.append(f"{one.place}: {parts[1]} imports {other}")
    assert wrong == []


def is_light(file: Path) -> bool:
    return room_of(file) in LIGHT or (room_of(file) == "families" and file.name in ("spec.py", "registry.py"))


def test_light_rooms_never_import_torch() -> None:
    wrong = [
        f"{one.place}: {one.target}"
        for one in imports()
        if is_light(one.file) and not one.type_only and one.target.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_importing_the_light_rooms_loads_no_torch() -> None:
    """The same, through everything that they import in turn."""
    names = [
        ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in files()
        if is_light(file) and file.name != "__main__.py"
    ]
    code = f"import sys\nfor name in {names!r}:\n    __import__(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_installer_needs_nothing_installed() -> None:
    allowed = sys.stdlib_module_names | {"whitetuner"}
    wrong = [
        f"{one.place}: {one.target}"
        for one in imports()
        if room_of(one.file) in ("install", "errors", "tongue", "version")
        and one.target.split(".")[0] not in allowed
    ]
    assert wrong == []
    assert {there for here, there, _ in arrows() if here == "install"} <= {"errors", "tongue", "version"}


def test_nothing_below_the_recipe_gets_the_whole_config() -> None:
    wrong = [
        one.place
        for one in imports()
        if room_of(one.file) != "config" and floor_of(room_of(one.file)) < 3 and "Config" in one.names
        if one.target.startswith("whitetuner.config")
    ]
    assert wrong == []


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_file_is_short_well_named_and_catches_only_what_it_can_answer(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert not STALE_NAMES & {file.stem, *file.relative_to(SOURCE).parts}
    if file.name == "__init__.py" and file.parent != SOURCE:
        assert text == ""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "" if node.type is None else ast.unparse(node.type)
        passed_on = isinstance(node.body[-1], ast.Raise)
        assert caught not in ("", "Exception"), f"{file}:{node.lineno}"
        assert caught != "BaseException" or passed_on, f"{file}:{node.lineno}"


def test_the_page_of_the_architecture_names_every_room_on_its_floor() -> None:
    page = (SOURCE.parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("| floor | rooms |")[2].partition("## ")[0]
    rows = [set(re.findall(r"`(\w+)`", line)) for line in table.splitlines() if line.startswith("| ")]
    unseen = {"__main__", "__init__"}
    words = {"sample"}  # of the command line
    assert [rooms - words for rooms in rows] == [rooms - unseen for rooms in FLOORS]


def test_what_the_seeds_names_became_is_there() -> None:
    page = (SOURCE.parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (.*) \|$", page.partition("| the seed | here |")[2], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
    assert len(named) > 20
    assert [
        name for name in named if not any((place / name).exists() for place in (SOURCE, SOURCE.parents[1]))
    ] == []
