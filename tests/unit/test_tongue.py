"""What a terminal tells a person exists in Chinese: a walk over the source finds every sentence, so none can be forgotten."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gui_told import SOURCE

from whitetuner import doctor, tongue
from whitetuner.cli import main
from whitetuner.doctor import Finding
from whitetuner.errors import UserError
from whitetuner.gui.told import table, translated
from whitetuner.install.environment import explain
from whitetuner.install.launch import chinese as of_installer
from whitetuner.runs import events
from whitetuner.runs.console import Console

#: Files and folders whose English is no message to anyone, or is translated elsewhere and held to it by another test.
ELSEWHERE = {
    "parser.py": "--help, which is English; docs and page are there in both",
    "gui": "words.json and words_zh.py (test_gui_fields); its messages by test_gui_told",
    "families": "names and sources of the registry; its messages by test_gui_told",
    "config/schema.py": "words_zh.py",
    "config/data_section.py": "words_zh.py",
    "config/learning_sections.py": "words_zh.py",
    "config/goals.py": "comments of a written config",
    "config/reference.py": "writes docs/config.md",
    "tiny.py": "comments of a written config",
    "data/samples.py": "captions of test data",
    "data/scenery.py": "captions of test data",
    "nano": "trains the embedded model for the project",
    "portable/build.py": "start.bat and the note beside it, in both languages",
    "runs/report.py": "one page in both languages (test_runs_report)",
    "runs/curves.py": "one page in both languages",
    "selftest.py": "names of proofs",
    "evidence.py": "names of proofs",
    "memory_proofs.py": "names of proofs",
}
#: Faults of ours, which end in a traceback.
FAULTS = re.compile(r"(Runtime|Value|Type|Key|Index|Assertion|Attribute|NotImplemented)Error|log\.warning")
#: Every text that one of these is given is told, however short it is.
TELLERS = {"say", "told", "Finding", "Message", "_message", "_warning"}
#: Text that is no sentence, with what it is.
NO_SENTENCE = {
    "install/environment.py": r"import sys, pip|No space left|No matching distribution",
    "install/steps.py": r"import torch, whitetuner|constraints.txt pins torch|DLL load failed",
    "install/machine.py": r"sudo |-m pip install|Library/",
    "install/launch.py": r"usage: ",
    "captioning.py": r"Describe this picture|im_start",
    "data/cache.py": r"Signature: ",
    "data/media.py": r"git-lfs pointer$",
    "data/scan.py": r"too many conditions$",
    "config/sources.py": r"Liu et al",  # a comment of a written config, as those of config/goals.py
    "data/mask_fields.py": r"^mask 1",
    "hub/huggingface.py": r"hf auth login",
    "errors.py": r"can't allocate",
    "runs/state.py": r"Library/",
    "runs/console.py": r"s/step",
    "runs/events.py": r"dict\[",
    "runs/follow.py": r"^import importlib",
    "runs/folder.py": r" --set run.steps=MORE",
    "runs/place.py": r"RANK / WORLD_SIZE",
    "demo.py": r"\[model\]|on a (white|yellow|black) background|^loss: each step|^put the red ball",
    "file_words.py": r"relative error",
    "config/load.py": r"arXiv",
    "config/told.py": r"Input should be",
    "checkpoint/store.py": r"No space left|os error",
    "memory/quantize.py": r"in_features",
    "importers/ai_toolkit.py": r"model_kwargs",
    "importers/musubi.py": r"a data set alone|fp8_base|musubi-tuner|(network|optimizer)_args",
    "importers/original.py": r"the original White Tuner|use_fp8",
    "importers/reading.py": r"^# ",
    "resolve.py": r"--gpus / memory.device",
    "tongue.py": r"-> ",
}


def shape(text: str) -> str:
    """A template whatever its placeholders are called."""
    return re.sub(r"\{[^{}]*\}", "{}", text)


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
    return None


def silent(tree: ast.AST) -> set[int]:
    """Nodes that are never shown as they stand: docstrings, assertions, faults of ours, pieces of f-strings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(id(body[0].value))
        whole = isinstance(node, ast.Assert) or (
            isinstance(node, (ast.Call)) and FAULTS.fullmatch(ast.unparse(node.func)) is not None
        )
        if whole or isinstance(node, ast.JoinedStr):
            found |= {
                id(one)
                for one in ast.walk(node)
                if whole or (one is not node and isinstance(one, ast.Constant))
            }
    return found


def own_text(line: str) -> str:
    return shape(re.sub(r"^\s*(-> |error: |warning: |note: |info: )?", "", line)).strip()


def sentences() -> Iterator[tuple[str, str]]:
    """(file, a line of text) of what is shown."""
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        never, always = silent(tree), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in TELLERS:
                given = [*node.args, *(one.value for one in node.keywords)]
                always |= {id(part) for one in given for part in shown(one)}
        elsewhere = name in ELSEWHERE or name.split("/")[0] in ELSEWHERE
        for node in ast.walk(tree):
            text = None if id(node) in never else text_of(node)
            if text is None or (elsewhere and id(node) not in always):
                continue
            if re.search(NO_SENTENCE.get(name, r"(?!)"), text):
                continue
            for line in map(own_text, text.split("\n")):
                words = re.findall(r"[A-Za-z]{2,}", line.replace("{}", " "))
                told = id(node) in always and len(words) > 1
                if told or (len(words) > 2 and " " in line):
                    yield name, line


def shown(node: ast.expr) -> Iterator[ast.AST]:
    """The expression itself and what it may be, not what is inside of a placeholder or call."""
    if isinstance(node, ast.IfExp):
        yield from shown(node.body)
        yield from shown(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for one in node.values:
            yield from shown(one)
    elif isinstance(node, (ast.Constant, ast.JoinedStr)):
        yield node


def known() -> set[str]:
    return {
        own_text(line) for one in (table(), of_installer().table) for key in one for line in key.split("\n")
    }


def test_every_sentence_has_a_chinese_one() -> None:
    have = known()
    missing = sorted({f"{file}: {line}" for file, line in sentences() if line not in have})
    assert missing == [], "\n".join(missing)


def test_sentences_are_said_and_not_printed() -> None:
    """`print` goes past the translation: it is for JSON, configs and what is in the terminal's language already."""
    printed = []
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name in ELSEWHERE or name.split("/")[0] in ELSEWHERE or name in ("tongue.py", "install/steps.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                texts = [text_of(part) or "" for one in node.args for part in shown(one)]
                printed += [
                    f"{name}:{node.lineno}"
                    for text in texts
                    if len(re.findall(r"[A-Za-z]{2,}", shape(text))) > 2
                ]
    assert printed == [], "use whitetuner.tongue.say"


def test_no_entry_of_the_exceptions_is_left_over() -> None:
    for name in ELSEWHERE:
        assert (SOURCE / name).exists(), name
    for name, pattern in NO_SENTENCE.items():
        texts = [
            text_of(node) or "" for node in ast.walk(ast.parse((SOURCE / name).read_text(encoding="utf-8")))
        ]
        for one in re.split(r"\|(?![^(]*\))", pattern):
            assert any(re.search(one, text) for text in texts), f"{name}: {one}"


def test_both_have_the_same_places_for_values() -> None:
    names = re.compile(r"\{(\w*)(?:![rsa])?(?::[^}]*)?\}")
    of_both = of_installer().table
    assert [text for text in of_both if set(names.findall(of_both[text])) != set(names.findall(text))] == []


@pytest.mark.parametrize(
    "environment, language",
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "WHITETUNER_LANG": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "WHITETUNER_LANG": "zh"}, "zh"),
    ],
)
def test_the_language_is_the_systems_or_the_variables(environment: dict[str, str], language: str) -> None:
    assert tongue.language(environment) == language


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WHITETUNER_LANG", "zh")
    yield
    tongue.speak(None)


def test_errors_of_the_command_line_are_chinese(
    chinese: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "no.toml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "没有这个文件" in said and "用 `whitetuner init` 可以写一个" in said
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[model]\nfamily = "flux2-klein"\n[optimizer]\nlr = 0\n')
    assert main(["check", str(wrong)]) == 2
    assert "学习率 (LR)（optimizer.lr，第 4 行）：0 太小，必须大于 0" in capsys.readouterr().err


def test_what_programs_read_stays_english(
    chinese: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    main(["check", str(tmp_path), "--json"])
    assert "the file is empty" in capsys.readouterr().out
    main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    assert "文件是空的" in said and "先要处理" in said and "张图片中 0 张可用" in said
    assert "the file is empty" not in said


def test_doctor_speaks_chinese_in_straight_columns(chinese: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["families", "--json"])  # takes the language up
    capsys.readouterr()
    found = [
        Finding("memory", "31.2 GB, 8.1 GB free; 16.0 GB of them for this container"),
        Finding(
            "GPU 0",
            "NVIDIA RTX, 24.0 GB, 3.0 GB free; held by python (process 7)",
            "look",
            "a screen or a browser holds it",
        ),
        Finding("output folder", "/data cannot be written", "bad", "set run.output_dir to a folder of yours"),
    ]
    assert doctor.as_text(found).split("\n") == [
        "ok    内存                  31.2 GB，空闲 8.1 GB；其中 16.0 GB 给这个容器",
        "look  GPU 0                 NVIDIA RTX，24.0 GB，空闲 3.0 GB；正被 python (process 7) 占用",
        "                            -> 被屏幕或浏览器占用",
        "BAD   输出目录              /data 不能写入",
        "                            -> 请把 run.output_dir 设为你自己的文件夹",
        "",
        "妨碍训练的：输出目录",
    ]


def test_a_run_is_told_in_chinese(chinese: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["families", "--json"])
    capsys.readouterr()
    console = Console(plain=True)
    error = UserError("{path} is there already", mend="give another name, or remove it first", path="/a/b")
    for event in (
        events.RunStarted(name="cats", resumed_from=40),
        events.Phase(name="cache vae"),
        events.Message(level="warning", text="no previews of step 20: the card has no memory for their size"),
        events.Message(
            level="info",
            text="7 blocks wait on the host; weights that are away wait in pinned memory (3.10 GB)",
        ),
        events.Saved(step=20, path="checkpoints/checkpoint-20", seconds=1.0),
        events.Failed(reason=str(error)),
        events.Ended(status="stopped", step=20),
    ):
        console(event)
    assert capsys.readouterr().out.rstrip().split("\n") == [
        "cats：从第 40 步继续",
        "正在编码：vae",
        "warning: 第 20 步没有样图：显存放不下这个尺寸",
        "info: 7 块在内存等候；不在场的权重在锁页内存里等候（3.10 GB）",
        "第 20 步：已保存 checkpoints/checkpoint-20",
        f"failed: {translated(str(error), 'zh').split(chr(10))[0]}",
        f"  -> {translated(str(error), 'zh').split(chr(10))[1].removeprefix('  -> ')}",
        "在第 20 步停止",
    ]


def test_the_installer_speaks_before_anything_is_installed() -> None:
    said = of_installer().text(f"error: {explain('OSError: No space left on device', Path('/x/pip.log'))}")
    assert said.startswith("error: /x/pip.log: 磁盘已满\n  -> 请腾出空间")
    built = of_installer().text("  PyTorch    2.13.0 (NVIDIA driver for CUDA 12.8: CUDA 12.6)")
    assert built == "  PyTorch    2.13.0（支持 CUDA 12.8 的 NVIDIA 驱动：CUDA 12.6）"
