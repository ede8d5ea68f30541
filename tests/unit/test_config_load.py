"""A config file: what wins, where values come from, and every mistake told once with its place and mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from whitetuner.config.load import Loaded, load_config, setting_value
from whitetuner.errors import EXIT_USE, UserError, UserErrors
from whitetuner.families import registry

Write = Callable[..., Path]
MODEL = '[model]\nfamily = "flux2-klein"\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def made(text: str | bytes, name: str = "my.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return made


def refused(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert caught.value.code == EXIT_USE
    return str(caught.value)


# -- what wins ---------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_over_the_preset_over_the_family_over_the_defaults(
    write: Write,
) -> None:
    path = write(MODEL + "[method]\nrank = 5\nfactor = 4\n[save]\nevery = 7\n")
    loaded = load_config(path, ["method.rank=6"], preset="flux2-klein-lokr")
    config = loaded.config
    assert (config.method.rank, config.method.factor, config.optimizer.warmup_steps) == (6, 4, 50)
    assert loaded.origins["method.rank"] == "--set"
    assert loaded.origins["method.factor"] == "my.toml line 5"
    assert loaded.origins["optimizer.warmup_steps"] == "preset flux2-klein-lokr"
    assert loaded.origins["save.every"] == "my.toml line 7"
    assert loaded.origins["save.keep"] == "default"
    setting = registry.spec("flux2-klein").settings["optimizer.max_grad_norm"]
    assert config.optimizer.max_grad_norm == setting.value
    assert loaded.origins["optimizer.max_grad_norm"] == f"family default ({setting.source})"


def test_every_value_has_an_origin(write: Write) -> None:
    loaded = load_config(write(MODEL + "[[data.sets]]\nimages = 'a'\n[[preview.prompts]]\ntext = 'b'\n"))
    missing = [
        key for key in loaded.document()["data"] if key != "sets" and f"data.{key}" not in loaded.origins
    ]
    assert not missing
    assert loaded.origins["data.sets[0].images"] == "my.toml line 4"
    assert loaded.origins["preview.prompts[0].text"] == "my.toml line 6"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.lr", "2e-4", 2e-4),
        ("data.resolution", "[512, 768]", [512, 768]),
        ("run.name", "cat", "cat"),
        ("run.name", "2024", "2024"),
        ("run.name", '"2024"', "2024"),
        ("data.trigger", "true", "true"),
        ("data.trigger", "", ""),
        ("data.images", "C:\\new folder\\cat", "C:\\new folder\\cat"),
        ("memory.device", "0", "0"),
        ("memory.vram_gb", "12", 12),
        ("memory.vram_gb", "auto", "auto"),
        ("memory.gradient_checkpointing", "true", True),
        ("optimizer.args.momentum", "0.9", 0.9),
        ("model.options.variant", "base-4b", "base-4b"),
    ],
)
def test_a_value_on_the_command_line_is_toml_first_and_plain_text_else(
    key: str, text: str, value: object
) -> None:
    assert setting_value(key, text) == value


def test_a_setting_reaches_into_a_list(write: Write) -> None:
    path = write(MODEL + "[[data.sets]]\nimages = 'a'\n[[data.sets]]\nimages = 'b'\n")
    loaded = load_config(path, ["data.sets[1].repeats=3"])
    assert [one.repeats for one in loaded.config.data.sets] == [1, 3]
    assert loaded.origins["data.sets[1].repeats"] == "--set"
    assert "data.sets has 2 entries" in refused(path, "data.sets[2].repeats=3")


def test_steps_and_epochs_are_one_choice_that_the_later_word_makes(write: Write) -> None:
    assert load_config(write(MODEL + "[run]\nsteps = 10\n"), ["run.epochs=2"]).config.run.steps is None
    assert load_config(write(MODEL + "[run]\nepochs = 2\n"), ["run.steps=10"]).config.run.epochs is None
    assert load_config(write(MODEL)).config.run.steps == 2000
    text = refused(write(MODEL + "[run]\nsteps = 10\nepochs = 2\n"))
    assert "give run.steps or run.epochs, not both" in text
    assert "my.toml line 3" in text


def test_prodigy_has_its_own_learning_rate(write: Write) -> None:
    loaded = load_config(write(MODEL), ["optimizer.name=prodigy"])
    assert loaded.config.optimizer.lr == 1.0
    assert "prodigy" in loaded.origins["optimizer.lr"]
    assert (
        load_config(write(MODEL), ["optimizer.name=prodigy", "optimizer.lr=0.5"]).config.optimizer.lr == 0.5
    )


def test_sets_take_from_data_what_they_do_not_say(write: Write) -> None:
    path = write(
        MODEL
        + "[data]\nresolution = 512\ntrigger = 'zorp'\n[[data.sets]]\nimages = 'a'\nresolution = 256\n"
        + "[[data.sets]]\nimages = 'b'\ntrigger = ''\n"
    )
    first, second = load_config(path).config.data_sets()
    assert (first.resolution, first.trigger, first.images) == (256, "zorp", "a")
    assert (second.resolution, second.trigger, second.images) == (512, "", "b")


def test_data_alone_is_one_set(write: Write) -> None:
    (only,) = load_config(write(MODEL + "[data]\nimages = 'cat'\nresolution = 512\n")).config.data_sets()
    assert (only.images, only.resolution, only.repeats, only.weight) == ("cat", 512, 1, None)
    with pytest.raises(UserError, match="nothing to learn from"):
        load_config(write(MODEL)).config.data_sets()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("images = 'a/my cat'", "my cat"),
        (r"images = 'C:\data\cat.'", "cat"),
        ("", "run"),
        ("images = '照片 😀'", "照片 😀"),
    ],
)
def test_a_run_without_a_name_is_named_after_family_and_folder(write: Write, data: str, name: str) -> None:
    assert load_config(write(MODEL + f"[data]\n{data}\n")).config.run.name == f"flux2-klein-{name}"


# -- files as people have them -----------------------------------------------------------------------------------------


def test_byte_order_mark_and_windows_line_ends_are_read(write: Write) -> None:
    loaded = load_config(
        write(b"\xef\xbb\xbf" + (MODEL + "[run]\nsteps = 5\n").replace("\n", "\r\n").encode())
    )
    assert loaded.config.run.steps == 5
    assert loaded.origins["run.steps"] == "my.toml line 4"


def test_lines_are_counted_right_after_a_text_of_several_lines(write: Write) -> None:
    path = write(MODEL + '[data]\nprompt = """\n[run]\nsteps = 1\n"""\n[run]\nsteps = 0\n')
    assert "run.steps (my.toml line 9)" in refused(path)


def test_a_config_that_is_missing_a_folder_or_no_utf8(write: Write, tmp_path: Path) -> None:
    write(MODEL, "there.toml")
    text = refused(tmp_path / "their.toml")
    assert "no such file" in text and "there.toml" in text
    assert "this is a folder" in refused(tmp_path)
    text = refused(write("[data]\ntrigger = '猫咪照片'\n".encode("gbk")))
    assert "not UTF-8" in text and "line 2" in text and "save it as UTF-8" in text


@pytest.mark.parametrize("line", [r'images = "C:\Users\cat"', r'conditions = ["D:\x", "D:\a"]'])
def test_a_backslash_in_double_quotes_shows_the_single_quotes(write: Write, line: str) -> None:
    text = refused(write(MODEL + f"[data]\n{line}\n"))
    assert "my.toml line 4" in text
    assert "single quotes: 'C:\\Users\\cat'" in text or "single quotes: 'D:\\x'" in text


def test_a_backslash_that_toml_understands_wrongly_is_told_too(write: Write) -> None:
    text = refused(write(MODEL + '[data]\nimages = "C:\\new"\n'))  # TOML reads a line break here
    assert "data.images (my.toml line 4)" in text
    assert "single quotes" in text


def test_broken_toml_names_the_line(write: Write) -> None:
    text = refused(write(MODEL + "[run]\nsteps =\n"))
    assert "my.toml line 4" in text and "steps =" in text


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(
        MODEL
        + 'task = "t2v"\n[run]\nsteps = 0\nbatchsize = 2\n[optimizer]\nlr = "1e-4"\nschedule = "cosin"\n'
        + "[memory]\nvram_gb = -1\n[model.options]\nvarian = 'x'\n"
    )
    with pytest.raises(UserErrors) as caught:
        load_config(path)
    places = [error.where for error in caught.value.errors]
    assert places == [
        "run.steps (my.toml line 5)",
        "run.batchsize (my.toml line 6)",
        "optimizer.lr (my.toml line 8)",
        "optimizer.schedule (my.toml line 9)",
        "memory.vram_gb (my.toml line 11)",
        "model.options.varian (my.toml line 13)",
    ]
    assert all(error.mend for error in caught.value.errors)


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("[optimizer]\nlrr = 1", "optimizer.lr"),
        ("[run]\nlr = 1", "optimizer.lr"),
        ("[run]\nlearning_rate = 1", "optimizer.lr"),
        ("[run]\nbatchsize = 1", "data.batch_size"),
        ("[dat]\nimages = 'x'", "data"),
        ("[[data.sets]]\nimages = 'x'\nrepeat = 2", "data.sets.repeats"),
        ("[[preview.prompts]]\ntxt = 'x'", "preview.prompts.text"),
        ("[network]\nnetwork_dim = 4", "method"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write: Write, line: str, near: str) -> None:
    text = refused(write(MODEL + line + "\n"))
    assert "there is no option" in text
    if near != "method":  # nothing is near to that table's name; its keys cannot be guessed at
        assert f"did you mean {near}?" in text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[run]\nsteps = 0", "0 must be at least 1"),
        ("[run]\nsteps = 2.5", "2.5 is not a whole number"),
        ("[run]\nsteps = '2.5'", "without quotes: steps = 2.5"),
        ("[run]\nsteps = true", "does not take true or false"),
        ("[run]\nname = 'a/b'", "folder name"),
        ("[run]\nname = 5", "5 is not a text in quotes"),
        ("[optimizer]\nlr = inf", "finite number"),
        ("[optimizer]\nbetas = [0.9]", "betas"),
        ("[method]\nkind = 'lorka'", 'did you mean "lora"?'),
        ("[method]\nfactor = 0", "-1 or at least 1"),
        ("[method]\ntargets = 'x'", "not a list"),
        ("[memory]\nvram_gb = 'lots'", "'auto' or a number"),
        ("[memory]\nvram_gb = '12'", "without quotes: vram_gb = 12"),
        ("[memory]\ngradient_checkpointing = 'true'", "without quotes"),
        ("[noise]\nmin_timestep = 900\nmax_timestep = 100", "min_timestep must be below max_timestep"),
        ("[data]\nresolution = 5", "between 32 and 8192"),
        ("[data]\nimages = 'a'\ntarget = 'b'", "different kinds"),
        ("[data]\nimages = 'a'\n[[data.sets]]\nimages = 'b'", "stands beside"),
        ("[[data.sets]]\nrepeats = 2", "needs a folder"),
        ("[[data.sets]]\nimages = 'a'\nweight = 1\n[[data.sets]]\nimages = 'b'", "weight in all"),
        ("[data]\nimages = ''", "path is empty"),
        ("[[preview.prompts]]\nseed = 1", "preview.prompts[0].text is not given"),
        ("[[preview.prompts]]\ntext = 'x'\nsize = [64]", "2 entries"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_place(write: Write, line: str, told: str) -> None:
    text = refused(write(MODEL + line + "\n"))
    assert told in text
    assert "my.toml line" in text
    assert "Value error" not in text and "pydantic" not in text
    assert text.count("\n  -> ") == 1, "one mistake is told once"


def test_a_family_that_is_missing_or_misspelt(write: Write) -> None:
    assert "model.family is not given" in refused(write("[model]\npath = 'x'\n"))
    text = refused(write("[model]\nfamily = 'flux2-klien'\n[run]\nsteps = 0\n"))
    assert "did you mean flux2-klein?" in text and "run.steps" in text


def test_the_familys_own_options_are_checked(write: Write) -> None:
    path = write(MODEL + "[model.options]\nmax_sequence_length = 64\n")
    assert load_config(path).config.model_options().model_dump()["max_sequence_length"] == 64
    text = refused(path, "model.options.max_sequence_length=5")
    assert "model.options.max_sequence_length (--set)" in text and "at least 16" in text


def test_a_setting_without_a_sign_is_told(write: Write) -> None:
    assert "--set section.key=value" in refused(write(MODEL), "run.steps")
    assert "run.stepps (--set)" in refused(write(MODEL), "run.stepps=3")


def test_quotes_around_a_pasted_path_are_taken_off(write: Write) -> None:
    assert (
        load_config(write(MODEL + "[data]\nimages = '\"C:\\my cat\"'\n")).config.data.images == "C:\\my cat"
    )


def test_what_goes_into_files_says_nothing_of_this_machine(write: Write, tmp_path: Path) -> None:
    def of(folder: Path) -> Loaded:
        run = f"path = '{folder / 'klein'}'\n[run]\nname = 'a'\noutput_dir = '{folder}'\n"
        return load_config(write(f"{MODEL}{run}[data]\nimages = '{folder / 'cat'}'\n"))

    one, two = of(tmp_path / "one").metadata(), of(tmp_path / "two").metadata()
    assert one == two
    assert '"images": "cat"' in one["whitetuner_config"] and str(tmp_path) not in one["whitetuner_config"]
    assert one != load_config(write(MODEL + "[run]\nname = 'a'\n")).metadata()
