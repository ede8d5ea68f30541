"""Every message that a user can meet on the page has a Chinese one with the same values in it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from test_house import assignments, literals

from whitetuner.config import landed
from whitetuner.config import told as config_told
from whitetuner.config.load import load_config
from whitetuner.config.schema import Config
from whitetuner.config.told import keys_of
from whitetuner.errors import UserError, UserErrors
from whitetuner.gui.told import each, parts, table, told, translated, where

SOURCE = Path(__file__).parents[2] / "src/whitetuner"
#: The installer speaks in the terminal, before there is a page.
NOT_ON_THE_PAGE = {"install"}


@cache
def templates() -> dict[str, str]:
    """Template -> the file where it stands: of UserError itself, and of shorthands, whose first argument is `what`."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        if file.relative_to(SOURCE).parts[0] in NOT_ON_THE_PAGE:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = assignments(tree)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.args.args]
        makers = {node.name: node for node in functions if node.args.args[0].arg == "what"}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1]
            if name not in makers and name != "UserError":
                continue
            words = [one.arg for one in makers[name].args.args] if name in makers else ["what"]
            given = [part for word, part in zip(words, node.args) if word in ("what", "mend")]
            given += [one.value for one in node.keywords if one.arg in ("what", "mend")]
            for part in given:
                texts = [
                    text for text in literals(part, names) or () if " " in text or "{" in text
                ]  # no table's keys
                found.update(dict.fromkeys(texts, str(file.relative_to(SOURCE))))
    found.update(dict.fromkeys((text for text, _ in config_told._FINDINGS.values()), "config/told.py"))
    found.update(dict.fromkeys((feature for _, feature in landed._REFUSED.values()), "config/landed.py"))
    return found


def test_every_message_has_a_chinese_one() -> None:
    missing = [f"{file}: {text!r}" for text, file in templates().items() if text not in table()]
    assert not missing, "add them to gui/static/errors_zh.toml"


def test_both_have_the_same_places_for_values() -> None:
    names = re.compile(r"\{(\w*)(?:![rsa])?(?::[^}]*)?\}")
    wrong = [text for text in table() if set(names.findall(table()[text])) != set(names.findall(text))]
    assert not wrong


def test_a_message_is_told_with_its_place_in_the_pages_language() -> None:
    with pytest.raises(UserErrors) as caught:
        load_config(
            None, ['model.family="flux2-klein"', "optimizer.lr=0", "run.stepz=3", 'memory.base="fp4"']
        )
    chinese, english = told(caught.value, "zh"), told(caught.value, "en")
    assert "学习率 (LR)（optimizer.lr）：0 太小，必须大于 0" in chinese
    assert "没有选项“run.stepz”" in chinese and "是不是 run.steps？" in chinese
    assert "is none of" not in chinese and "底模精度" in chinese
    assert english == "\n".join(str(one) for one in each(caught.value))
    assert where("optimizer.lr (my.toml line 7)", "zh") == "学习率 (LR)（optimizer.lr，第 7 行）"


def test_values_that_are_our_own_sentences_are_translated_too() -> None:
    error = UserError(
        "{value} is not {message}",
        mend="{help}",
        value=3,
        message="'auto' or a whole number",
        help="learning rate; prodigy: 1",
    )
    assert parts(error, "zh") == ("3 不是 'auto' 或 整数", "每步学多少；prodigy 填 1")


def test_what_a_child_said_inside_another_message_is_translated() -> None:
    error = UserError("it could not be made: {reason}", reason="/a/b: the file is empty (0 bytes)")
    assert told(error, "zh") == "没能生成：/a/b: 文件是空的（0 字节）"


@pytest.mark.parametrize(
    "english, chinese",
    [
        ("no caption file (same name, ending in .txt) beside the picture", "旁边没有同名的 .txt 描述文件"),
        (
            "error: /a/b.png: the file is empty (0 bytes)\n  -> copy or download it again, or delete it",
            "error: /a/b.png: 文件是空的（0 字节）\n  -> 请重新复制或下载，或删掉它",
        ),
        ("something that nobody wrote a template for", "something that nobody wrote a template for"),
    ],
)
def test_what_a_child_process_printed_is_recognised(english: str, chinese: str) -> None:
    assert translated(english, "zh") == chinese
    assert translated(english, "en") == english


def test_what_the_schemas_own_checks_say_is_chinese_too() -> None:
    """`raise ValueError("...")` in the config's sections becomes the {message} of "{value}: {message}"."""
    said = {
        text: file.name
        for file in sorted((SOURCE / "config").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if ast.unparse(node.exc.func) == "ValueError"
        for part in node.exc.args
        for text in literals(part, {}) or [ast.unparse(part)]
    }
    assert len(said) > 8
    assert [f"{file}: {text!r}" for text, file in said.items() if text not in table()] == []


def test_whatever_the_schema_can_find_wrong_has_words_of_ours() -> None:
    """pydantic's kinds of findings that the config's types can have; one without an entry would be told in its own English."""
    bad: list[object] = [None, "", "x", -1, 0.5, 10**9, float("nan"), True, [], ["x", "x"], {}, {"a": 1}]
    english: set[str] = set()
    for key in sorted(keys_of(Config)):
        for value in bad:
            try:
                load_config(None, base={"model.family": "flux2-klein", key: value})
            except UserError as error:
                for one in each(error):
                    english |= {
                        f"{key} = {value!r}: {text}"
                        for text in parts(one, "zh")
                        if text and not re.search("[\\u4e00-\\u9fff]", text)
                    }
    assert english == set()


def test_words_of_the_page_are_filled_where_they_are_looked_up() -> None:
    """`w(name)` leaves nothing where it is given no value: filling its text afterwards showed "of keys known to"."""
    scripts = sorted((Path(config_told.__file__).parents[1] / "gui" / "static").glob("*.js"))
    assert scripts and [one.name for one in scripts if 'replace("{' in one.read_text(encoding="utf-8")] == []
