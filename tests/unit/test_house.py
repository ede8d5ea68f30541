"""The repository as a stranger finds it: its files, its pins, its words."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8")

#: The same by name as PEP 503 says it.
canonical = re.compile(r"[-_.]+")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:8000]:
            found.append((path.relative_to(ROOT), content.decode("utf-8")))
    return found


def pinned_names(version: tuple[int, int] | None = None) -> set[str]:
    """Names with a pin; for one Python version (on any system) when given."""
    names = set()
    for line in PINS.splitlines():
        requirement, _, marker = line.partition(";")
        if "==" not in requirement or line.startswith("#"):
            continue
        if version is not None and "python_version" in marker:
            found = re.search(r"python_version (<|>=|==) '3\.(\d+)'", marker)
            assert found, line
            minor = int(found[2])
            if not {"<": version[1] < minor, ">=": version[1] >= minor, "==": version[1] == minor}[found[1]]:
                continue
        names.add(canonical.sub("-", requirement.partition("==")[0].strip().lower()))
    return names


def direct_requirements() -> dict[str, str]:
    """Name -> requirement, of the project and all its extras."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = {}
    for requirement in (line for lines in lists for line in lines):
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        if name != "whitetuner":
            found[canonical.sub("-", name.lower())] = requirement
    return found


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "pyproject.toml",
        "constraints.txt",
        "req.txt",
        "release.txt",
        "launch.py",
        "gui.py",
        "start.sh",
        "start.bat",
        ".ci/run",
        ".gitignore",
        ".pre-commit-config.yaml",
    ],
)
def test_the_house_has_its_files(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    for part in (
        "Apache License",
        "Version 2.0, January 2004",
        "9. Accepting Warranty",
        "END OF TERMS AND CONDITIONS",
    ):
        assert part in text


#: Import name -> name of the package, where they differ.
PACKAGES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "lycoris": "lycoris-lora",
    "pillow_heif": "pillow-heif",
    "huggingface_hub": "huggingface-hub",
}


def test_everything_imported_is_declared() -> None:
    """In src, tests and benchmarks; what only another package brings along can go away with it."""
    known = sys.stdlib_module_names | {"whitetuner", "tomllib"} | set(direct_requirements())
    known |= {"comfy", "nodes", "torchvision"}  # of the checkout that COMFYUI_DIR names: tests/comfyui
    # of the checkouts that benchmarks/learning/peers.py is told of
    known |= {"modules", "toolkit", "extensions_built_in", "musubi_tuner"}
    folders = [ROOT / name for name in ("src", "tests", "benchmarks")]
    own = {path.stem for folder in folders for path in folder.rglob("*")} | {"tests", "benchmarks"}
    wrong = set()
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {name.partition(".")[0] for name in names}
            wrong |= {
                (str(file.relative_to(ROOT)), top)
                for top in tops
                if PACKAGES.get(top, top) not in known | own
            }
    assert wrong == set()


@pytest.mark.parametrize("minor", range(10, 15))
def test_every_direct_dependency_is_pinned_for_every_python(minor: int) -> None:
    names = pinned_names((3, minor))
    missing = [
        name
        for name, requirement in direct_requirements().items()
        if name not in names and not ("python_version" in requirement and minor >= 11)
    ]
    assert missing == []


def test_a_pin_is_exact_and_unique() -> None:
    lines = [line for line in PINS.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"^[A-Za-z0-9._-]+==[^;\s]+( ; .+)?$", line) for line in lines)
    keys = [(line.partition("==")[0], line.partition(";")[2]) for line in lines]
    assert len(keys) == len(set(keys))


def test_pins_satisfy_the_ranges_of_pyproject() -> None:
    lowest = {}
    for line in PINS.splitlines():
        if match := re.match(r"^([A-Za-z0-9._-]+)==([0-9.]+)", line):
            version = tuple(int(part) for part in match[2].strip(".").split("."))
            name = canonical.sub("-", match[1].lower())
            lowest[name] = min(version, lowest.get(name, version))
    for name, requirement in direct_requirements().items():
        if match := re.search(r">=([0-9.]+)", requirement):
            assert lowest[name] >= tuple(int(part) for part in match[1].split(".")), requirement


def test_the_pythons_of_pyproject_are_those_of_launch_py() -> None:
    text = (ROOT / "launch.py").read_text(encoding="utf-8")
    oldest, newest = re.search(r"OLDEST, NEWEST = \(3, (\d+)\), \(3, (\d+)\)", text).groups()  # type: ignore[union-attr]
    assert PROJECT["requires-python"] == f">=3.{oldest},<3.{int(newest) + 1}"
    for script in ("start.sh", "start.bat"):
        assert f"(3, {oldest}) <= sys.version_info[:2] <= (3, {newest})" in (ROOT / script).read_text(
            encoding="utf-8"
        )


def test_the_extras_of_launch_py_are_those_of_pyproject() -> None:
    from whitetuner.install.steps import EXTRAS

    extras = PROJECT["optional-dependencies"]
    assert {*EXTRAS, "dev"} <= set(extras)
    assert set(re.split(r"[\[\],]", extras["all"][0])[1:-1]) == set(extras) - {"all", "dev", "docs", "fuzz"}


def test_the_seeds_words_install_the_pinned_project() -> None:
    lines = (ROOT / "req.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == ["-c constraints.txt", "-e .[all]"]


def test_windows_batch_lines_end_as_windows_wants_and_shell_lines_do_not() -> None:
    batch = (ROOT / "start.bat").read_bytes()
    assert batch.count(b"\r\n") == batch.count(b"\n") > 10
    assert b"\r" not in (ROOT / "start.sh").read_bytes()
    assert not batch.startswith(b"\xef\xbb\xbf")


#: Words that would tie the repository to one machine, one package mirror or one workplace.
FOREIGN = {
    "a machine's folder": re.compile(r"(?<![\w.])/(?:work|root|opt|home/[a-z]+|Users/[a-z]+)/"),
    "a registry's host": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|tuna\.tsinghua|aliyun\.com|deb\.debian\.org)"
    ),
}


def test_no_word_ties_the_repository_to_one_machine() -> None:
    here = Path(__file__).relative_to(ROOT)
    wrong = [
        f"{path}:{text[: found.start()].count(chr(10)) + 1}: {what}: {found[0]}"
        for path, text in texts()
        if path != here
        for what, pattern in FOREIGN.items()
        for found in pattern.finditer(text)
    ]
    assert wrong == []


def test_no_file_is_large_by_accident() -> None:
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for path in tracked()
        if path.stat().st_size > 9_000_000
    }
    assert large == {}


def assignments(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """Name -> what is assigned to it anywhere in the file; `a, b = TABLE[key]` gives both names the table."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target, value in itertools.product(targets, [node.value]):
                pairs = itertools.zip_longest(
                    target.elts if isinstance(target, ast.Tuple) else [target],
                    value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value],
                    fillvalue=value,
                )
                for one, given in pairs:
                    if isinstance(one, ast.Name):
                        found.setdefault(one.id, []).append(given)
    return found


def literals(node: ast.expr, names: dict[str, list[ast.expr]]) -> list[str] | None:
    """All texts that the expression can be; None when it is computed. Constants, `a if b else c`, tables of literals."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    parts: list[ast.expr] = []
    if isinstance(node, ast.IfExp):
        parts = [node.body, node.orelse]
    elif isinstance(node, ast.Name):
        parts = names.get(node.id, [])
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        tables = names.get(node.value.id, [])
        if tables and all(isinstance(table, ast.Dict) for table in tables):
            constants = [
                part for table in tables for part in ast.walk(table) if isinstance(part, ast.Constant)
            ]
            return [part.value for part in constants if isinstance(part.value, str)]
    found = [literals(part, names) for part in parts]
    return None if not found or None in found else [text for texts in found for text in texts or []]


def test_messages_are_literals_so_that_they_can_be_translated() -> None:
    """`what` and `mend` of every UserError; each placeholder in them is given a value, each value is used."""
    wrong = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = assignments(tree)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.args.args]
        shorthands = {node.name for node in functions if node.args.args[0].arg == "what"}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).split(".")[-1]
            place = f"{file.relative_to(ROOT)}:{call.lineno}"
            if name in shorthands and (not call.args or literals(call.args[0], names) is None):
                wrong.append(f"{place}: {name}(...) without a literal")
            # `**values`: a shorthand's inside, or a message told once more for several files.
            if name != "UserError" or any(keyword.arg is None for keyword in call.keywords):
                continue
            given = {str(keyword.arg): keyword.value for keyword in call.keywords}
            parts = [
                given.pop("what", call.args[0] if call.args else ast.Constant(0)),
                given.pop("mend", ast.Constant("")),
            ]
            for name in ("where", "code"):
                given.pop(name, None)
            told = [literals(part, names) for part in parts]
            if None in told:
                wrong.append(f"{place}: what or mend is not a literal")
                continue
            asked = {
                name for texts in told for text in texts or [] for name in re.findall(r"(?<!\{)\{(\w+)", text)
            }
            from_table = not all(isinstance(part, (ast.Constant, ast.IfExp)) for part in parts)
            if not (asked <= set(given) if from_table else asked == set(given)):
                wrong.append(f"{place}: placeholders {sorted(asked)}, values {sorted(given)}")
    assert wrong == []
