"""docs/troubleshooting.md and its Chinese half: what stands below their marks is every message of the source, by topic.

python tests/unit/troubles.py        writes both anew; what stands above the mark is written by hand and stays
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

from test_house import assignments, literals

from whitetuner.config import told
from whitetuner.gui.told import table

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "whitetuner"
PAGES = {"en": ROOT / "docs" / "troubleshooting.md", "zh": ROOT / "docs" / "zh" / "troubleshooting.md"}
MARK = "<!-- Below: written by `python tests/unit/troubles.py` from the messages of the source. -->\n"

#: The installer speaks before anything is there to look up; it says what to do itself, in English.
LEFT_OUT = ("install/",)
#: UserError and what is made of it (held by test_troubleshooting.py).
ERRORS = ("UserError", "NotFinite", "Elsewhere", "DamagedCheckpoint")
#: (English, Chinese) title -> the files whose messages belong there, by the beginning of their path; the longest one counts.
TOPICS: dict[tuple[str, str], tuple[str, ...]] = {
    ("Data sets and captions", "数据集与描述文件"): ("data/", "checks.py", "captioning.py", "encoding.py"),
    ("Models and their files", "模型与模型文件"): (
        "models.py", "single_files.py", "hub", "hub_names.py", "released.py", "family.py", "families/", "denoisers.py",
        "companions.py",
        "resolve.py", "checkpoint/", "nano/", "tiny.py", "memory/skeleton.py", "memory/weights.py", "memory/relaid.py",
        "memory/build.py",
    ),
    ("Adapters, export and other programs", "适配器、导出与其他程序"): (
        "adapters/", "learned.py", "checkpoint/export.py", "checkpoint/factor.py", "file_words.py", "file_commands.py",
        "final_files.py",
    ),
    ("Memory and speed", "显存、内存与速度"): ("errors.py", "memory/", "plan_view.py", "planning.py", "full_costs.py"),
    ("The config", "配置"): ("config/", "importers/"),
    ("The command line", "命令行"): (
        "cli.py", "portable/", "parser.py", "commands.py", "config_commands.py", "drawing.py", "demo.py",
        "doctor.py", "bug_report.py", "scenes.py", "diffusion/",
    ),
    ("A run: start, stop, resume, fork", "训练任务：开始、停止、继续、分支"): (
        "runs/", "train/", "recipe.py", "prepared.py", "rehearsal.py", "resuming.py", "forking.py", "checkpoint/store.py",
        "api.py",
    ),
    ("Several GPUs and machines", "多卡与多机"): (
        "sharing.py", "config/shard.py", "runs/place.py", "runs/devices.py", "train/joining.py", "train/team.py",
        "train/distributed.py", "train/whole_sharded.py",
    ),
    ("The page", "界面"): ("gui/",),
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """what: the template; mends: those that can stand beside it; file: where it is raised, under src/whitetuner"""

    what: str
    mends: tuple[str, ...]
    file: str


@cache
def messages() -> list[Message]:
    """Every message once, in the order of the source; what several files say alike counts where it stands first."""
    found: dict[str, Message] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for what, mends in (*_raised(tree), *(_checked(tree) if name.startswith("config/") else ())):
            known = found.setdefault(what, Message(what, (), name))
            found[what] = Message(what, tuple(dict.fromkeys((*known.mends, *mends))), known.file)
    return list(found.values())


def _raised(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(what, mends) of every UserError, and of every call of a shorthand: a function whose first argument is `what`."""
    names = assignments(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.args.args]
    shorthands = {node.name: node for node in functions if node.args.args[0].arg == "what"}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).split(".")[-1]
        if name not in ERRORS and name not in shorthands:
            continue
        order = [one.arg for one in shorthands[name].args.args] if name in shorthands else ["what"]
        given = dict(zip(order, call.args)) | {str(one.arg): one.value for one in call.keywords}
        whats = _texts(given.get("what"), names)
        mends = _texts(given.get("mend"), names)
        if name in shorthands and "mend" not in given:  # the one that the shorthand itself gives
            inner = [node for node in ast.walk(shorthands[name]) if isinstance(node, ast.keyword)]
            mends = [text for one in inner if one.arg == "mend" for text in _texts(one.value, names)]
        paired = isinstance(given.get("what"), ast.IfExp) and len(whats) == len(mends) == 2
        for index, what in enumerate(whats):
            yield what, (mends[index],) if paired else tuple(mends)


def _checked(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the schema's own checks say: `raise ValueError("...")`, which config/told.py makes a message of."""
    for node in ast.walk(tree):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(raised, ast.Call) and ast.unparse(raised.func) == "ValueError":
            yield from ((text, ()) for part in raised.args for text in _texts(part, {}))


def _texts(node: ast.expr | None, names: dict[str, list[ast.expr]]) -> list[str]:
    """All sentences that the expression can be; a bare word is a table's key, no message."""
    if node is None:
        return []
    if (
        isinstance(node, ast.Name) and node.id == "text" and "_FINDINGS" in names
    ):  # config/told.py: what pydantic finds
        return list(dict.fromkeys(text for text, _ in told._FINDINGS.values()))
    return [text for text in literals(node, names) or [] if " " in text or "{" in text]


def topic(file: str) -> tuple[str, str]:
    """Both titles. Raises KeyError for a file that no topic names."""
    fitting = [
        (len(start), titles)
        for titles, starts in TOPICS.items()
        for start in starts
        if file.startswith(start)
    ]
    if not fitting:
        raise KeyError(f"{file}: give it a topic in {Path(__file__).name}")
    return max(fitting)[1]


def shown(template: str) -> str:
    """A template in a cell of a table: values are slanted names, in `code` capitals; signs of Markdown are taken as they are."""
    parts = []
    for index, part in enumerate(re.split(r"`([^`]*)`", template)):
        code = bool(index % 2)
        text = ""
        for plain, name, _, _ in Formatter().parse(part):
            text += plain if code else re.sub(r"([\\*_\[\]<>#|])", r"\\\1", plain)
            text += "" if name is None else name.upper() if code else f"*{name}*"
        parts.append(f"`{text.replace('|', chr(92) + '|')}`" if code else text)
    text = re.sub(r"(?<=\w)\*\*(?=\w)", " ", "".join(parts))  # two values side by side
    return re.sub(r"\s*\n\s*", "<br>", text).strip()


def is_bare(message: Message) -> bool:
    """Whether it holds nothing but other messages, or what another library said."""
    return not re.sub(r"\{[^}]*\}|[^A-Za-z]", "", message.what)


@cache
def below(language: str) -> str:
    """What stands below the mark."""
    rows: dict[tuple[str, str], list[Message]] = {titles: [] for titles in TOPICS}
    for message in messages():
        if not is_bare(message):
            rows[topic(message.file)].append(message)
    lines = []
    for (english, chinese), found in rows.items():
        if language == "en":
            lines += ["", f"### {english}", "", "| it says | what to do |", "|---|---|"]
        else:
            lines += ["", f"### {chinese}", "", "| 终端里的英文 | 意思 | 怎么办 |", "|---|---|---|"]
        for one in found:
            mends = [mend for mend in one.mends if mend.strip("{}") not in ("help", "mend")]
            if language == "en":
                lines.append(f"| {shown(one.what)} | {'<br>or: '.join(map(shown, mends)) or 'as it says'} |")
            else:
                told_mends = [shown(table()[mend]) for mend in mends]
                lines.append(
                    f"| {shown(one.what)} | {shown(table()[one.what])} | {'<br>或：'.join(told_mends) or '按它说的做'} |"
                )
    return "\n".join(lines) + "\n"


def page(language: str) -> str:
    """The whole page: above the mark as it is written, below it from the source."""
    written, mark, _ = PAGES[language].read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGES[language]} has lost its mark: {MARK}"
    return written + MARK + below(language)


if __name__ == "__main__":
    for language, there in PAGES.items():
        there.write_text(page(language), encoding="utf-8", newline="\n")
        print(f"wrote {there.relative_to(ROOT)}")
