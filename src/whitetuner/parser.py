"""The words of the command line and their arguments. Nothing heavy is imported: `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from whitetuner.gui.settings import add_arguments
from whitetuner.version import __version__

GROUPS = {
    "Try": ("demo", "selftest", "tiny", "testdata"),
    "Train": ("init", "check", "plan", "cache", "train", "stop", "fork", "gui"),
    "Look": ("sample", "watch", "jobs", "families", "doctor"),
    "Files": ("fetch", "export", "merge", "extract", "resize", "inspect", "caption", "portable"),
}


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        """The top help lists the words in four groups; each word's own help is argparse's."""
        words = getattr(self, "word_help", None)
        if words is None:
            return super().format_help()
        lines = ["usage: whitetuner WORD ...      (whitetuner WORD --help tells more)", ""]
        for group, names in GROUPS.items():
            lines.append(f"{group}:")
            lines += [f"  {name:<10} {words[name]}" for name in names if name in words]
            lines.append("")
        return "\n".join([*lines, f"White Tuner {__version__}", ""])


def make_parser() -> argparse.ArgumentParser:
    """All words with their arguments; also read by the tests that hold the docs against it."""
    parser = _Parser(prog="whitetuner", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"White Tuner {__version__}")
    parser.word_help = {}  # type: ignore[attr-defined]
    words = parser.add_subparsers(dest="word", parser_class=argparse.ArgumentParser, metavar="WORD")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        parser.word_help[name] = text  # type: ignore[attr-defined]
        one = words.add_parser(name, help=text, description=text, allow_abbrev=False)
        return one

    demo = add("demo", "teach the embedded model a new word and prove it (3 minutes, no GPU)")
    demo.add_argument(
        "family", nargs="?", metavar="FAMILY[:VARIANT]", help="a random tiny model of that family instead"
    )
    demo.add_argument("--task", help="t2i, edit, ... (default: the family's first)")
    demo.add_argument("--method", default="lokr", choices=("lokr", "lora", "full"))
    demo.add_argument(
        "--out", type=Path, default=Path("output/demo"), help="folder of the results (default: %(default)s)"
    )

    selftest = add("selftest", "prove the equalities on this machine (3 minutes)")
    selftest.add_argument("family", nargs="?", help="only this family")
    selftest.add_argument("--json", action="store_true", help="print the table as JSON")

    tiny = add("tiny", "write a random tiny model of a family as a diffusers folder")
    tiny.add_argument("family")
    tiny.add_argument("dir", type=Path)
    tiny.add_argument("--variant")
    tiny.add_argument("--seed", type=int, default=0)

    testdata = add("testdata", "write a small data set to try things with")
    testdata.add_argument("kind", choices=("t2i", "edit", "video"))
    testdata.add_argument("dir", type=Path)
    testdata.add_argument("--count", type=int, default=8)
    testdata.add_argument("--seed", type=int, default=0)

    init = add("init", "write a commented config from a preset")
    init.add_argument("preset", nargs="?", help="preset name (none: list them)")
    init.add_argument(
        "--tiny",
        type=Path,
        metavar="DIR",
        help="a config that trains the tiny or embedded model on this folder",
    )
    init.add_argument(
        "--from",
        dest="foreign",
        type=Path,
        metavar="FILE",
        help="from a config of ai-toolkit, musubi-tuner, kohya or the original White Tuner (or a script with the command line)",
    )
    init.add_argument(
        "--data", type=Path, metavar="FILE", help="--from: musubi-tuner's or kohya's data set file"
    )
    init.add_argument("--family", help="--from: where the file does not tell the model's family")
    init.add_argument(
        "--goal", help="what is taught: character, object, style, composition, edit, motion, general"
    )
    init.add_argument("--vram", type=float, metavar="GB", help="how much of the card may be used")
    init.add_argument("-o", "--out", type=Path, help="file to write (none: to the screen)")

    check = add("check", "look a config or a picture folder over: every problem at once")
    check.add_argument("what", type=Path, metavar="CONFIG|DATA_DIR")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.add_argument("--deep", action="store_true", help="decode every picture")
    check.add_argument("--no-model", action="store_true", help="do not look at the model folder")
    check.add_argument(
        "--migrate",
        action="store_true",
        help="rewrite a config of an earlier version in today's words (keeps NAME.toml.bak)",
    )
    check.add_argument(
        "--convert-captions",
        action="store_true",
        help="rewrite captions that are not UTF-8 (keeps NAME.txt.bak)",
    )
    check.add_argument(
        "--encoding", metavar="NAME", help="of the captions to convert (gb18030, ...); else guessed"
    )
    _settings(check)

    train = add("train", "train")
    train.add_argument("config", type=Path)
    train.add_argument(
        "--resume",
        metavar="latest|best|DIR",
        help="go on from the newest checkpoint, from the one of the least held-out loss, or from this one",
    )
    train.add_argument(
        "--gpus",
        help="which devices: 0 or cpu; several: 0,1 or cpu,cpu, a process for each; free ones: any or any:2",
    )
    train.add_argument("--wait", action="store_true", help="wait for the GPU while another run is on it")
    _settings(train)

    fork = add("fork", "begin another run at a checkpoint of a run, with changed settings")
    fork.add_argument("run_folder", type=Path, metavar="RUN")
    fork.add_argument(
        "--at",
        type=_step_or_name,
        metavar="STEP|latest|best",
        help="one of its checkpoints (default: the newest)",
    )
    fork.add_argument("--gpus", help="as for train")
    fork.add_argument("--no-start", action="store_true", help="make the folder, do not train yet")
    _settings(fork)

    plan = add("plan", "how a model fits a card: before anything is downloaded or loaded")
    plan.add_argument("what", metavar="CONFIG|FAMILY[:VARIANT]")
    plan.add_argument(
        "--vram", type=float, metavar="GB", help="memory of the card (else: this machine's, or 8 to 32)"
    )
    plan.add_argument("--size", metavar="WIDTHxHEIGHT[xFRAMES]", help="of what is trained (FAMILY only)")
    plan.add_argument("--task", help="t2i, edit, ... (FAMILY only)")
    plan.add_argument(
        "--host", type=float, metavar="GB", help="memory of the machine itself (else: this one's)"
    )
    plan.add_argument("--measure", action="store_true", help="take the speeds of the GPU that is here")
    plan.add_argument("-v", "--verbose", action="store_true", help="the bytes of every part too")
    plan.add_argument("--json", action="store_true")
    _settings(plan)

    cache = add("cache", "encode pictures and captions only")
    cache.add_argument("config", type=Path)
    _settings(cache)

    stop = add("stop", "ask a run to save and stop")
    stop.add_argument("run_folder", type=Path, metavar="RUN")
    stop.add_argument("--now", action="store_true", help="leave without saving")

    watch = add("watch", "follow a run")
    watch.add_argument("run_folder", type=Path, metavar="RUN")
    watch.add_argument("--once", action="store_true", help="print where it is and return")

    sample = add("sample", "draw with a model, a model and an adapter file, or a run")
    sample.add_argument("model", metavar="RUN_OR_MODEL", help="run folder, model folder or builtin:nano")
    sample.add_argument("--adapter", type=Path)
    sample.add_argument(
        "--checkpoint",
        type=_step_or_name,
        metavar="best|latest|STEP",
        help="of a run, instead of its final files",
    )
    sample.add_argument("--strength", type=float, default=1.0)
    sample.add_argument("--prompt", default="")
    sample.add_argument("--negative", default="")
    sample.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="reference picture (edit tasks; may be repeated)",
    )
    sample.add_argument("--out", type=Path, default=Path("sample.png"))
    sample.add_argument("--family", help="needed only when the model folder does not tell")
    sample.add_argument("--size", help="WIDTHxHEIGHT")
    sample.add_argument("--frames", type=int, help="of a clip (video models): 4 n + 1")
    sample.add_argument("--steps", type=int)
    sample.add_argument("--cfg", type=float)
    sample.add_argument("--seed", type=int, default=0)

    families = add("families", "list the model families")
    families.add_argument("--json", action="store_true")

    _files(add)

    jobs = add("jobs", "list the runs on this machine")
    jobs.add_argument("--json", action="store_true")

    gui = add("gui", "open the page in the browser")
    add_arguments(gui)

    caption = add("caption", "write missing captions with a vision-language model of yours")
    caption.add_argument("dir", type=Path, metavar="DIR")
    caption.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of Qwen2.5-VL, of another such model, or of Qwen-Image",
    )
    caption.add_argument("--instruction", help="what to ask of each picture")
    caption.add_argument("--trigger", default="", help="word that begins every caption")
    caption.add_argument("--ext", default=".txt", help="ending of caption files (default: %(default)s)")
    caption.add_argument(
        "--overwrite", action="store_true", help="also where there is one (kept as NAME.txt.bak)"
    )
    caption.add_argument("--recursive", action="store_true", help="sub-folders too")
    caption.add_argument("--most", type=int, metavar="N", help="at most N, to try the instruction")
    caption.add_argument("--max-tokens", type=int, default=160, help="length at most (default: %(default)s)")

    portable = add("portable", "build a folder for Windows with its own Python, to unpack and start anywhere")
    portable.add_argument("dest", type=Path, metavar="DEST")
    portable.add_argument(
        "--python",
        required=True,
        metavar="FILE|URL",
        help="a Python for Windows x86-64: python.org's embeddable .zip, or python-build-standalone's install_only .tar.gz",
    )
    portable.add_argument(
        "--torch",
        default="cu130",
        metavar="NAME|URL",
        help="where PyTorch is taken from: cpu, cu126, cu130, an address, or pip (as pip is configured) (default: %(default)s)",
    )

    doctor = add("doctor", "check this machine: what stands in the way, and what to do")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument(
        "--out", type=Path, default=Path("output"), help="where runs will be (default: %(default)s)"
    )
    doctor.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.zip",
        help="write a file for bug reports, without captions or pictures",
    )
    doctor.add_argument("--run", type=Path, metavar="RUN", help="for --bundle: the run it is about")
    return parser


def _files(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The words about files of adapters and models."""
    fetch = add("fetch", "fetch a model by its hub name: only what is needed, with its size told before")
    fetch.add_argument(
        "name",
        metavar="ORG/MODEL",
        help="of Hugging Face (HF_ENDPOINT names a mirror, HF_HOME the place of the files), or modelscope:ORG/MODEL "
        "(MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE); WHITETUNER_HUB=modelscope: whatever has no hub before it",
    )
    fetch.add_argument("--family", help="needed only when the name does not tell")

    namings, kinds = ("comfyui", "diffusers", "lycoris"), ("fp32", "bf16", "fp16")

    export = add("export", "write an adapter or a whole model in the names of another program")
    export.add_argument(
        "source",
        type=Path,
        metavar="IN",
        help="adapter file, model file or model folder; a run's folder: what it has learned",
    )
    export.add_argument(
        "--checkpoint",
        type=_step_or_name,
        metavar="best|latest|STEP",
        help="of a run, instead of its final files",
    )
    export.add_argument(
        "target", type=Path, metavar="OUT", help="file; --to diffusers: for a model a folder, too"
    )
    export.add_argument("--to", required=True, choices=namings)
    export.add_argument("--family", help="needed only when an adapter file does not tell")
    export.add_argument(
        "--dtype", choices=kinds, help="of a model's numbers (default: as they are, fp8 as bf16)"
    )

    merge = add("merge", "add an adapter to a model's weights")
    merge.add_argument("base", type=Path, metavar="BASE", help="model file or folder")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="LoKr or LoRA file of any naming")
    merge.add_argument(
        "target", type=Path, metavar="OUT", help="file in BASE's layout, or a diffusers folder"
    )
    merge.add_argument("--strength", type=float, default=1.0)
    merge.add_argument("--dtype", choices=kinds, help="of the numbers (default: BASE's, fp8 as bf16)")
    merge.add_argument(
        "--part",
        default="transformer",
        choices=("transformer", "transformer_2"),
        help="of a WAN 2.2 folder: the expert for much noise, or for little",
    )

    extract = add("extract", "make an adapter of what two models differ in, and say how exact it is")
    extract.add_argument("tuned", type=Path, metavar="TUNED", help="the trained model: file or folder")
    extract.add_argument("base", type=Path, metavar="BASE", help="what it was trained from")
    extract.add_argument("target", type=Path, metavar="OUT")
    extract.add_argument("--kind", choices=("lora", "lokr"), default="lora")
    extract.add_argument("--rank", type=int, default=32)
    extract.add_argument("--factor", type=int, default=8, help="LoKr only (default: %(default)s)")
    extract.add_argument("--full-matrix", action="store_true", help="LoKr only: W2 whole")
    extract.add_argument("--to", default="comfyui", choices=namings)

    resize = add("resize", "write an adapter in another rank or kind, and say how exact it is")
    resize.add_argument("source", type=Path, metavar="IN")
    resize.add_argument("target", type=Path, metavar="OUT")
    resize.add_argument("--rank", type=int, required=True)
    resize.add_argument("--kind", choices=("lora", "lokr"), help="default: as it is")
    resize.add_argument("--factor", type=int, help="LoKr only (default: as it is)")
    resize.add_argument("--family", help="needed only when the file does not tell")

    inspect = add("inspect", "say what a safetensors file is, and which programs load it")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true")


def _step_or_name(text: str) -> int | str:
    """Of a checkpoint: a step, or a word for one."""
    if text in ("latest", "best"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor latest nor best") from None


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change a setting (may be repeated)",
    )
