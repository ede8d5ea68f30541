"""Wrong configs."""

from __future__ import annotations

from case import ENVIRONMENT, Case, Place, Typed

AREA = "config"


def _set(fault: str, setting: str, *says: str, code: int = 2) -> Case:
    """A value given with --set, to check and to train alike."""

    def make(place: Place) -> list[Typed]:
        config = place.config("c")
        return [["check", config, "--set", setting], ["train", config, "--set", setting]]

    return Case(AREA, fault, make, says, code)


def _text(fault: str, text: str | bytes, *says: str) -> Case:
    """A file with this text, after a right beginning ({model} and {data} stand for the folders)."""

    def make(place: Place) -> list[Typed]:
        if isinstance(text, bytes):
            return [["train", place.file("c.toml", text)]]
        filled = text.replace("{model}", str(place.folder / "model")).replace(
            "{data}", str(place.folder / "data")
        )
        return [["train", place.file("c.toml", filled)]]

    return Case(AREA, fault, make, says)


_GOOD = "[model]\nfamily = 'flux2-klein'\npath = '{model}'\n[data]\nimages = '{data}'\nresolution = 64\n"

CASES = [
    Case(
        AREA,
        "the file is not there",
        lambda p: [[w, p.folder / "nope.toml"] for w in ("train", "check", "cache")],
        ("no such file", "nope.toml"),
    ),
    Case(
        AREA,
        "a folder is given for the file",
        lambda p: [[w, p.folder / "data"] for w in ("train", "cache")],
        ("this is a folder", "config.toml"),
    ),
    Case(
        AREA,
        "a picture is given for the file",
        lambda p: [["train", p.folder / "data" / "0.png"]],
        ("not UTF-8",),
    ),
    _text("the file is empty", "", "model.family"),
    _text("zero bytes in the file", b"[model]\n\0\0\0", "c.toml"),
    _text("UTF-16, as Notepad saves it", "[run]\n".encode("utf-16"), "not UTF-8"),
    _text("Chinese text in GBK", "[run]\nname = '红色的狗坐在草地上'".encode("gbk"), "not UTF-8"),
    _text("a bracket is not closed", _GOOD + "[data.x\n", "c.toml", "line 7"),
    _text("a quote is not closed", "[model]\nfamily = 'flux2-klein\n", "c.toml", "not TOML"),
    _text("a word without quotes", "[model]\nfamily = flux2-klein\n", "line 2"),
    _text("a key twice", _GOOD + "resolution = 65\n", "line 7", "resolution"),
    _text("a section twice", _GOOD + "[model]\n", "model"),
    _text("YAML in place of TOML", "model:\n  family: flux2-klein\n", "line 1"),
    _text("JSON in place of TOML", '{"model": {"family": "x"}}', "line 1"),
    _text("a number where a section belongs", "model = 3\n", "model"),
    _text("a list where a section belongs", "[[model]]\nfamily = 'flux2-klein'\n", "model"),
    _text("a table where a value belongs", _GOOD + "[run.steps]\na = 1\n", "run.steps"),
    _text(
        "Windows folders in double quotes, no escape",
        '[model]\nfamily = "flux2-klein"\npath = "C:\\Users\\me"\n',
        "backslash",
        "line 3",
        "single quotes",
    ),
    _text(
        "Windows folders in double quotes, by chance escapes",
        '[model]\nfamily = "flux2-klein"\npath = "C:\\train\\new"\n',
        "backslash",
        "line 3",
        "'C:\\",
    ),
    _text("no model family", "[data]\nimages = '{data}'\n", "model.family"),
    _text(
        "no model path", "[model]\nfamily = 'flux2-klein'\n[data]\nimages = '{data}'\n", "model.transformer"
    ),
    _text(
        "a hub that is not known",
        _GOOD.replace("{model}", "modelscop:Qwen/Qwen-Image"),
        "huggingface, modelscope",
    ),
    _text("no data", "[model]\nfamily = 'flux2-klein'\npath = '{model}'\n", "data.images"),
    _text("a value and sets of the same", _GOOD + "[[data.sets]]\nimages = 5\n", "data.sets[0].images"),
    _text(
        "a set without pictures",
        _GOOD.replace("images = '{data}'\n", "") + "[[data.sets]]\nrepeats = 2\n",
        "[[data.sets]]",
    ),
    _text("steps and epochs", _GOOD + "[run]\nsteps = 3\nepochs = 2\n", "run.steps or run.epochs"),
    _text("an integer of five thousand digits", _GOOD + f"[run]\nseed = {'9' * 5000}\n", "c.toml"),
    _text("brackets five thousand deep", _GOOD + f"[run]\nseed = {'[' * 5000}{']' * 5000}\n", "c.toml"),
    _text("a date where a number belongs", _GOOD + "[run]\nsteps = 2024-01-01\n", "run.steps"),
    _set("a number in quotes", 'run.steps="100"', "run.steps", "without quotes"),
    _set("zero steps", "run.steps=0", "run.steps", "at least 1"),
    _set("a negative number of steps", "run.steps=-5", "run.steps", "at least 1"),
    _set("half a step", "run.steps=1.5", "run.steps", "whole number"),
    _set("a misspelt option", "run.stepz=3", "run.stepz", "did you mean run.steps?"),
    _set("a misspelt section", "modle.path=x", "modle", "did you mean model?"),
    _set("another trainer's word", "optimizer.learning_rate=1e-4", "optimizer.lr"),
    _set("a misspelt method", "method.kind=lockr", "method.kind", 'did you mean "lokr"?'),
    _set("a misspelt family", "model.family=flux2-kline", "model.family", "flux2-klein"),
    _set("a misspelt task", "model.task=edti", "model.task", "edit"),
    _set("a task that the family does not have", "model.task=t2v", "model.task"),
    _set("a misspelt option of the family", "model.options.varient=base-4b", "variant"),
    _set(
        "a variant that the family does not have",
        "model.options.variant=base-99b",
        "model.options.variant",
        "base-4b",
    ),
    _set("a learning rate that is no number", "optimizer.lr=nan", "optimizer.lr", "finite"),
    _set("an endless learning rate", "optimizer.lr=inf", "optimizer.lr"),
    _set("a negative learning rate", "optimizer.lr=-1e-4", "optimizer.lr"),
    _set("an optimizer that is not there", "optimizer.name=adamv", "optimizer.name", "adamw"),
    _set(
        "an optimizer of a module that is not there",
        "optimizer.name=nomodule:X",
        "optimizer.name",
        "nomodule",
    ),
    _set("an optimizer that its module lacks", "optimizer.name=math:Adam", "optimizer.name", "math"),
    _set("an argument that the optimizer does not take", "optimizer.args={foo=1}", "optimizer.args", "foo"),
    _set("zero accumulated batches", "optimizer.gradient_accumulation=0", "optimizer.gradient_accumulation"),
    _set("a schedule that is not there", "optimizer.schedule=cosin", "optimizer.schedule", "cosine"),
    _set("a folder in the run's name", "run.name=a/b", "run.name", "folder name"),
    _set("a run's name that ends with a dot", "run.name=a.", "run.name", "folder name"),
    _set("a zero byte in a folder", 'run.output_dir="a\\u0000b"', "run.output_dir"),
    _set("a device that is none", "memory.device=bogus", "memory.device"),
    _set("a negative card", "memory.vram_gb=-4", "memory.vram_gb"),
    _set("a number format that is not there", "memory.base=int3", "memory.base", "int8"),
    _set("a true or false that is neither", "memory.compile=perhaps", "memory.compile"),
    _set("targets that match no layer", "method.targets=['nothing.*']", "method.targets", "matches no layer"),
    _set("rank zero", "method.rank=0", "method.rank"),
    _set("a factor that is no number", "method.factor=many", "method.factor"),
    _set("a resolution between the model's sizes", "data.resolution=65", "resolution 65", "64 or 80"),
    _set("a negative resolution", "data.resolution=-64", "data.resolution"),
    _set("no resolution at all", "data.resolution=[]", "data.resolution"),
    _set("more pictures in a batch than there are", "data.batch_size=64", "data.batch_size", "at most 4"),
    _set("an empty batch", "data.batch_size=0", "data.batch_size"),
    _set("a dropout above one", "data.caption_dropout=1.5", "data.caption_dropout"),
    _set("noise levels turned round", "noise={min_timestep=900, max_timestep=100}", "noise"),
    _set("a shift of zero", "noise.shift=0", "noise.shift"),
    _set("noise levels by a method that is not there", "noise.timesteps=gauss", "noise.timesteps"),
    _set(
        "a preview of an odd size",
        "preview.prompts=[{text='x', size=[65, 64]}]",
        "preview.prompts[0].size",
        "[64, 64]",
    ),
    _set("a preview without a text", "preview.prompts=[{seed=1}]", "preview.prompts[0].text"),
    _set(
        "a preview of a size that is a word",
        "preview.prompts=[{text='x', size='big'}]",
        "preview.prompts[0].size",
    ),
    _set("all pictures held out", "validation.share=1.0", "validation.share"),
    _set("a setting without a value", "run.steps", "--set", "section.key=value"),
    _set("a setting without a section", "steps=3", "run.steps"),
    _set("a setting inside a number", "run.steps.more=3", "run.steps"),
    _set("a row that the list does not have", "data.sets[3].repeats=2", "data.sets"),
    Case(
        AREA,
        "a GPU that is not there",
        lambda p: [["train", p.config("c"), "--gpus", "97"]],
        ("GPU 97", "'cpu'"),
        ENVIRONMENT,
    ),
    Case(
        AREA, "a device list that mixes", lambda p: [["train", p.config("c"), "--gpus", "0,cpu"]], ("--gpus",)
    ),
]
