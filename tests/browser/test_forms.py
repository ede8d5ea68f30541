"""The forms and the data page in a real browser: errors while typing, drafts, import, tiny things, paths, pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from page_server import Server
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from whitetuner.config.load import load_config
from whitetuner.gui.training_tabs import tabs

pytestmark = pytest.mark.browser
TAB = "flux2-klein-t2i"


def open_form(server: Server, page: Page, language: str = "en", tab: str = TAB) -> Locator:
    server.ready()
    page.goto(f"{server.url}/{language}/#tab={tab}")
    form = page.locator(f"#form-{tab}")
    expect(form.locator(".wt-basic input").first).to_be_visible()
    return form


def field(form: Locator, key: str) -> Locator:
    return form.locator(f'[data-key="{key}"]')


def start_over(form: Locator) -> None:
    form.locator(".wt-buttons button").nth(3).click()
    expect(form.locator(".wt-toml")).to_have_value(
        re.compile(r'^\[model\]\nfamily = "[a-z0-9-]+"\n(task = "\w+"\n)?$')
    )
    expect(form.locator(".wt-field.wt-set")).to_have_count(0)


def draft(server: Server, tab: str = TAB) -> Path:
    return server.folder / "state" / "drafts" / f"{tab}.toml"


@pytest.mark.parametrize(
    "language, wrong, count",
    [("zh", "太小，必须大于 0", "有 2 处需要修改"), ("en", "must be above 0", "2 things to mend")],
)
def test_a_wrong_value_is_marked_at_its_option_while_typing(
    server: Server, watched: Any, language: str, wrong: str, count: str
) -> None:
    form = open_form(server, watched().page, language)
    start_over(form)
    rate = field(form, "optimizer.lr")
    rate.locator("input").press_sequentially("0")
    expect(rate.locator(".wt-error")).to_contain_text(wrong)
    assert rate.locator("input").get_attribute("aria-invalid") == "true"
    field(form, "run.steps").locator("input").press_sequentially("many")
    expect(form.locator(".wt-problems")).to_contain_text(count)
    rate.locator("input").press("End")
    rate.locator("input").press_sequentially(".0003")
    expect(rate.locator(".wt-error")).to_have_count(0)
    assert rate.locator("input").input_value() == "0.0003"
    assert "lr = 0.0003" in draft(server).read_text(encoding="utf-8")


def test_the_form_the_editor_and_the_draft_are_one_document(server: Server, watched: Any) -> None:
    page = watched().page
    form = open_form(server, page)
    start_over(form)
    field(form, "run.steps").locator("input").fill("123")
    form.locator("[data-tier=expert]").click()
    editor = form.locator(".wt-toml")
    expect(editor).to_have_value(re.compile("steps = 123"))
    editor.fill(editor.input_value() + "\n# mine\n[optimizer]\nlr = 2e-4\nnam = 1\n")
    expect(field(form, "optimizer.lr").locator("input")).to_have_value("2e-4")
    expect(form.locator('[data-section="optimizer"]')).to_contain_text("did you mean optimizer.name?")
    editor.fill(editor.input_value().replace("nam = 1\n", "[oops\n"))
    expect(form.locator(".wt-expert .wt-error")).to_contain_text("this is not TOML")
    editor.fill(editor.input_value().replace("[oops\n", ""))
    expect(form.locator(".wt-expert .wt-error")).to_have_count(0)
    field(form, "optimizer.lr").locator("input").fill("3e-4")
    expect(editor).to_have_value(re.compile(r"# mine\n\[optimizer\]\nlr = 0.0003"))
    page.reload()
    expect(field(form, "optimizer.lr").locator("input")).to_have_value("3e-4")
    assert "# mine" in draft(server).read_text(encoding="utf-8")


def test_every_option_is_reachable_on_every_tab_in_both_languages(server: Server, watched: Any) -> None:
    for language in ("zh", "en"):
        page = watched().page
        for tab in tabs():
            form = open_form(server, page, language, tab.key)
            form.locator("[data-tier=basic]").click()
            own = '[data-key^="model.options."]'
            assert form.locator(f".wt-basic > .wt-field:not({own})").count() <= 8
            form.locator("[data-tier=expert]").click()
            hidden = form.locator(".wt-field").evaluate_all("all => all.filter((one) => one.hidden).length")
            assert hidden == 0
            text = form.inner_text()
            assert "undefined" not in text and "{" not in text.replace("{}", "")
            form.locator("[data-tier=basic]").click()


def test_a_tab_with_two_tasks_shows_what_the_chosen_one_learns_from(server: Server, watched: Any) -> None:
    tab = next(one for one in tabs() if one.tasks[:2] == ("t2i", "edit"))
    form = open_form(server, watched().page, "en", tab.key)
    start_over(form)
    expect(form.locator('.wt-basic [data-key="data.images"]')).to_be_visible()
    form.locator('.wt-tasks input[value="edit"]').check()
    expect(form.locator('.wt-basic [data-key="data.conditions"]')).to_be_visible()
    expect(form.locator(".wt-problems")).to_contain_text("Condition folders")
    assert 'task = "edit"' in draft(server, tab.key).read_text(encoding="utf-8")
    form.locator('.wt-tasks input[value="t2i"]').check()
    expect(form.locator('.wt-basic [data-key="data.images"]')).to_be_visible()


def test_rows_of_prompts_and_sets_come_and_go(server: Server, watched: Any) -> None:
    form = open_form(server, watched().page)
    start_over(form)
    form.locator("[data-tier=advanced]").click()
    form.locator('[data-section="preview"] > summary').click()
    prompts = field(form, "preview.prompts")
    for number, text in enumerate(("a cat", "一只猫")):
        prompts.locator("> .wt-add").click()
        field(form, f"preview.prompts[{number}].text").locator("textarea").fill(text)
    expect(prompts.locator("fieldset")).to_have_count(2)
    prompts.locator(".wt-remove").first.click()
    expect(prompts.locator("fieldset")).to_have_count(1)
    expect(field(form, "preview.prompts[0].text").locator("textarea")).to_have_value("一只猫")
    assert draft(server).read_text(encoding="utf-8").count("[[preview.prompts]]") == 1


def test_from_nothing_to_a_config_that_trains(server: Server, watched: Any) -> None:
    """The embedded model, sample data, and the command that does the same."""
    page = watched().page
    form = open_form(server, page)
    start_over(form)
    expect(form.locator(".wt-problems")).to_contain_text("Still needed: Model, Picture folder")
    field(form, "model.path").get_by_text("Built-in model").click()
    field(form, "data.images").get_by_text("Sample data").click()
    expect(field(form, "data.images")).to_contain_text("8 pictures, 8 with a .txt caption", timeout=120_000)
    expect(form.locator(".wt-problems")).to_contain_text("Ready to train")
    assert load_config(draft(server)).config.model.path == "builtin:nano"
    form.get_by_text("Command", exact=True).click()
    expect(page.locator(".wt-dialog")).to_contain_text("python launch.py train flux2-klein-t2i.toml")
    page.keyboard.press("Escape")
    expect(page.locator(".wt-dialog")).to_have_count(0)


@pytest.mark.slow
def test_a_tiny_model_is_made_and_planned_for(server: Server, watched: Any) -> None:
    form = open_form(server, watched().page)
    start_over(form)
    field(form, "data.images").get_by_text("Sample data").click()
    field(form, "model.path").get_by_text("Make a tiny model").click()
    expect(field(form, "model.path").locator("input")).to_have_value(
        re.compile("tiny-flux2"), timeout=180_000
    )
    config = load_config(draft(server)).config
    assert Path(str(config.model.path), "model_index.json").is_file() and config.data.resolution == 64
    form.locator(".wt-plan > summary").click()
    form.get_by_text("12 GB", exact=True).click()
    expect(form.locator(".wt-plans:not(.wt-stale) .wt-choice").first).to_contain_text(
        "bf16 base", timeout=180_000
    )
    expect(form.locator(".wt-card")).to_have_count(1)
    form.locator(".wt-choice button").first.click()
    expect(field(form, "memory.blocks_to_swap").locator("input")).to_have_value("0")


def test_a_preset_is_taken_and_taken_back(server: Server, watched: Any) -> None:
    page = watched().page
    form = open_form(server, page)
    start_over(form)
    field(form, "run.name").locator("input").fill("kept")
    form.locator(".wt-preset").select_option('["flux2-klein-lokr",false]')
    expect(field(form, "run.name").locator("input")).to_have_value("my-lokr")
    page.locator(".wt-toast").get_by_text("Undo").last.click()
    expect(field(form, "run.name").locator("input")).to_have_value("kept")
    form.get_by_text("Save as preset").click()
    page.locator(".wt-dialog input").fill("我的 preset")
    page.locator(".wt-dialog .wt-main").click()
    expect(form.locator(".wt-preset")).to_contain_text("我的 preset")
    assert (server.folder / "state/presets/我的 preset.toml").is_file()


def test_a_config_is_imported_where_it_belongs(server: Server, watched: Any, tmp_path: Path) -> None:
    other = next(tab for tab in tabs() if tab.key != TAB)
    file = tmp_path / "theirs.toml"
    file.write_text(
        f'[model]\nfamily = "{other.family}"\ntask = "{other.tasks[0]}"\n[run]\nsteps = 77 # theirs\n',
        encoding="utf-8",
    )
    page = watched().page
    form = open_form(server, page)
    form.locator("input[type=file]").set_input_files(file)
    there = page.locator(f"#form-{other.key}")
    expect(field(there, "run.steps").locator("input")).to_have_value("77")
    expect(there).to_be_visible()
    assert "# theirs" in draft(server, other.key).read_text(encoding="utf-8")


def test_folders_are_chosen_in_the_pages_own_list(server: Server, watched: Any) -> None:
    pictures = server.folder / "my pictures"
    pictures.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(pictures / "one.png")
    page = watched().page
    form = open_form(server, page)
    start_over(form)
    field(form, "data.images").get_by_text("Browse").click()
    box = page.locator(".wt-dialog")
    expect(box.locator(".wt-path")).to_have_value(str(server.folder))
    box.get_by_text("my pictures").click()
    expect(box).to_contain_text("1 pictures")
    box.locator(".wt-main").click()
    expect(field(form, "data.images").locator("input")).to_have_value(str(pictures))
    field(form, "data.images").locator("input").fill(f'"{pictures}"')
    expect(form.locator(".wt-problems")).not_to_contain_text("Picture folder")
    expect(field(form, "data.images").locator(".wt-error")).to_have_count(0)


def test_data_is_looked_at_from_the_form_and_captions_change(server: Server, watched: Any) -> None:
    data = server.folder / "cats"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (128, 128), (80 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"cat {number}", encoding="utf-8")
    (data / "2.txt").unlink()
    page = watched().page
    form = open_form(server, page)
    start_over(form)
    field(form, "data.images").locator("input").fill(str(data))
    field(form, "data.resolution").locator("input").fill("64")
    field(form, "data.images").get_by_text("Look at the data").click()
    grid = page.locator(".wt-data")
    expect(grid.locator(".wt-item")).to_have_count(3)
    grid.locator(".wt-chip", has_text="no caption").click()
    expect(grid.locator(".wt-item")).to_have_count(1)
    text = grid.locator(".wt-item textarea")
    text.fill("a new cat")
    text.blur()
    expect(grid.locator(".wt-item")).to_contain_text("Kept")
    assert (data / "2.txt").read_text(encoding="utf-8") == "a new cat\n"
    grid.locator(".wt-under button").click()
    expect(grid.locator(".wt-item")).to_contain_text("The caption is as it was")
    assert not (data / "2.txt").exists()


def test_five_thousand_pictures_scroll(server: Server, watched: Any) -> None:
    many = server.folder / "many"
    many.mkdir()
    Image.new("RGB", (64, 64), "green").save(many / "p0.jpg")
    one = (many / "p0.jpg").read_bytes()
    for number in range(1, 5000):
        (many / f"p{number}.jpg").write_bytes(one + b"%d" % number)
    server.ready()
    page = watched().page
    page.goto(f"{server.url}/en/#tab=data")
    page.locator("#data-folder").fill(str(many))
    page.locator(".wt-data .wt-main").click()
    expect(page.locator('.wt-item[data-n="0"]')).to_be_visible(timeout=60_000)
    page.evaluate("document.querySelectorAll('.wt-chunk')[90].scrollIntoView()")
    far = page.locator('.wt-item[data-n="4320"]')
    expect(far).to_be_visible()
    expect(far.locator("img")).to_have_js_property("complete", True)
    assert far.locator("img").evaluate("image => image.naturalWidth") == 64
    assert page.locator(".wt-item").count() <= 5 * 48, "only what is near is held"


def test_on_a_phone_nothing_is_wider_than_the_screen(server: Server, watched: Any) -> None:
    page = watched("zh-CN", 390, 844, color_scheme="dark").page
    form = open_form(server, page, "zh")
    form.locator("[data-tier=advanced]").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = form.locator("input:visible, select:visible, textarea:visible").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])"
    )
    assert boxes and all(left >= 0 and right <= 390 for left, right in boxes)
