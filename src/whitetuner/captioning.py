"""`caption`: writes missing captions with a vision-language model that lies on this machine.

Any model that transformers loads for pictures and text (AutoModelForImageTextToText), and the Qwen2.5-VL that is the text
encoder of a Qwen-Image folder. The weights go through the memory engine: what is larger than the card is streamed.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from whitetuner.data.captions import tidy, with_trigger, write_keeping
from whitetuner.data.folders import fold, list_folder, nothing_found
from whitetuner.data.media import OTHER_PICTURES, PICTURES, read
from whitetuner.errors import EXIT_ENVIRONMENT, UserError, require_text
from whitetuner.memory.build import Build
from whitetuner.memory.phases import PhaseBuild, device_budget
from whitetuner.resolve import choose_device, choose_dtype

INSTRUCTION = (
    "Describe this picture in one or two plain sentences for training an image model: what it shows, how it looks, and the "
    "setting. No introduction."
)
#: Pictures are made smaller than this for the reader: more pixels make more tokens, not better captions.
LONGEST_SIDE_PX = 1024
#: Model types whose processors want torchvision only for videos.
_QWEN = ("qwen2_vl", "qwen2_5_vl")
_QWEN_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{picture}<|vision_end|>{instruction}<|im_end|>\n<|im_start|>assistant\n"
)
_QWEN_PICTURE = "<|image_pad|>"
#: Longer shapes are drawn into a strip of this one: the reader refuses more than 200.
_LONGEST_SHAPE = 100


@dataclass
class Captioned:
    """written: caption files;  kept: those there were, left as they are;  replaced: where what was overwritten lies now;
    failed: pictures that cannot be read."""

    written: list[Path] = field(default_factory=list)
    kept: int = 0
    replaced: list[Path] = field(default_factory=list)
    failed: list[UserError] = field(default_factory=list)


#: (done, total, picture, its caption); it may raise to stop, what is written stays.
Progress = Callable[[int, int, Path, str], None]


def caption_folder(
    folder: Path,
    model: Path,
    *,
    instruction: str = INSTRUCTION,
    trigger: str = "",
    ending: str = ".txt",
    overwrite: bool = False,
    recursive: bool = False,
    most: int | None = None,
    max_tokens: int = 160,
    progress: Progress | None = None,
    tell: Callable[[str], None] = print,
) -> Captioned:
    """Writes PICTURE.txt beside every picture that has none. Stopped and started again it goes on where it was.

    overwrite: also where there is a caption; the old one is kept as PICTURE.txt.bak
    most: at most so many, to try the instruction;  max_tokens: length of a caption at most
    Raises UserError for a folder without pictures and for a model that cannot be read; nothing is written before.
    """
    _check_words(instruction, trigger, ending)
    listing = list_folder(folder, ending, recursive)
    if not listing.pictures:
        raise nothing_found(folder)
    found = Captioned()
    todo = []
    for picture, caption in zip(listing.pictures, listing.captions, strict=True):
        if caption is not None and caption.read_bytes().strip() and not overwrite:
            found.kept += 1
        else:
            todo.append((picture, caption or picture.with_suffix(ending)))
    shared = Counter(fold(str(target)) for _, target in todo)
    found.failed += [_shared(picture, target) for picture, target in todo if shared[fold(str(target))] > 1]
    todo = [(picture, target) for picture, target in todo if shared[fold(str(target))] == 1][:most]
    if not todo:
        return found
    reader = open_reader(model, tell)
    try:
        for done, (picture, target) in enumerate(todo, start=1):
            try:
                image = read(picture)
            except UserError as error:
                found.failed.append(error)
                continue
            text = with_trigger(tidy(reader.caption(image, instruction, max_tokens)), trigger)
            kept = write_keeping(target, text + "\n")
            found.written.append(target)
            if kept is not None:
                found.replaced.append(kept)
            if progress is not None:
                progress(done, len(todo), picture, text)
    finally:
        reader.close()
    return found


def _check_words(instruction: str, trigger: str, ending: str) -> None:
    """Raises UserError for what would break the model's prompt, or write over pictures."""
    if not re.fullmatch(r"\.[A-Za-z0-9_-]+", ending) or ending.lower() in (*PICTURES, *OTHER_PICTURES):
        raise UserError(
            "{ending} is no ending of caption files",
            where="--ext",
            mend="give letters and digits that are no picture's ending, e.g. .txt",
            ending=ending,
        )
    require_text(instruction, "--instruction")
    require_text(trigger, "--trigger")
    if "<|" in instruction:
        raise UserError(
            "'<|' begins a mark of the model's own",
            where="--instruction",
            mend="leave such marks out: they are put around the instruction",
        )


def _shared(picture: Path, caption: Path) -> UserError:
    return UserError(
        "several pictures have the same name up to the ending, and share the caption {caption}",
        where=str(picture),
        mend="rename one of them with a caption of its own, or delete it",
        caption=caption.name,
    )


class Reader(ABC):
    """A vision-language model: picture and instruction -> text, always the most likely words."""

    def __init__(self, model: Any, build: PhaseBuild) -> None:
        self.model, self._build = model, build

    @abstractmethod
    def inputs(self, picture: Image.Image, instruction: str) -> dict[str, torch.Tensor]:
        """What the model is given of one RGB picture, a batch of one."""

    @abstractmethod
    def text(self, tokens: torch.Tensor) -> str:
        """tokens: (L,) what was generated."""

    @torch.no_grad()
    def caption(self, picture: Image.Image, instruction: str, max_tokens: int) -> str:
        """picture: RGB, any size."""
        picture = picture.copy()
        picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX))
        least = -(-max(picture.size) // _LONGEST_SHAPE)
        if min(picture.size) < least:
            picture = picture.resize((max(least, picture.width), max(least, picture.height)))
        device = self.model.get_input_embeddings().weight.device
        given = {name: tensor.to(device) for name, tensor in self.inputs(picture, instruction).items()}
        said = self.model.generate(**given, max_new_tokens=max_tokens, do_sample=False)
        return self.text(said[0, given["input_ids"].shape[1] :])

    def close(self) -> None:
        self._build.release()


class _Qwen(Reader):
    """Qwen2-VL and Qwen2.5-VL, told apart into text and pictures here: their processor class wants torchvision."""

    def __init__(self, model: Any, build: PhaseBuild, tokenizer: Any, looks: Any) -> None:
        super().__init__(model, build)
        self.tokenizer, self.looks = tokenizer, looks

    def inputs(self, picture: Image.Image, instruction: str) -> dict[str, torch.Tensor]:
        seen = self.looks(images=[picture], return_tensors="pt")
        count = int(seen["image_grid_thw"][0].prod()) // self.looks.merge_size**2
        prompt = _QWEN_PROMPT.format(picture=_QWEN_PICTURE * count, instruction=instruction)
        tokens = self.tokenizer(prompt, return_tensors="pt")
        kinds = (tokens["input_ids"] == self.model.config.image_token_id).to(torch.int32)
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": kinds,
            "pixel_values": seen["pixel_values"].to(self.model.dtype),
            "image_grid_thw": seen["image_grid_thw"],
        }

    def text(self, tokens: torch.Tensor) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class _Any(Reader):
    """Every other model, through its own processor."""

    def __init__(self, model: Any, build: PhaseBuild, processor: Any) -> None:
        super().__init__(model, build)
        self.processor = processor

    def inputs(self, picture: Image.Image, instruction: str) -> dict[str, torch.Tensor]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": instruction}]
        given = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return {
            name: tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
        }

    def text(self, tokens: torch.Tensor) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)


def open_reader(folder: Path, tell: Callable[[str], None]) -> Reader:
    """The model of a folder: a transformers one, or a Qwen-Image one in diffusers layout. Raises UserError if it is neither."""
    import transformers

    parts = _parts(folder)
    settings = _settings(parts["model"] / "config.json")
    kind, names = str(settings.get("model_type", "")), settings.get("architectures") or [""]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None or not hasattr(cls, "generate") or "vision_config" not in settings:
        raise UserError(
            "this is no model that looks at pictures and writes text ({name})",
            where=str(parts["model"]),
            mend="give the folder of a vision-language model (Qwen2.5-VL, ...), or of a Qwen-Image model",
            name=names[0] or "its config.json names no architecture",
        )
    device = choose_device("auto")
    build = PhaseBuild(Build(choose_dtype("auto", device), device), device_budget(device, None), tell=tell)
    if kind in _QWEN:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        looks: Any = Qwen2VLImageProcessorPil()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(parts["tokenizer"], local_files_only=True)
            if "processor" in parts:
                looks = Qwen2VLImageProcessorPil.from_pretrained(parts["processor"], local_files_only=True)
        except (ImportError, ValueError, OSError, TypeError, AttributeError, KeyError) as error:
            raise _no_tokenizer(parts["tokenizer"], str(error)) from error
        if len(tokenizer(_QWEN_PICTURE)["input_ids"]) != 1:
            raise _no_tokenizer(parts["tokenizer"], f"it does not know {_QWEN_PICTURE}")
        return _Qwen(build(cls, parts["model"]), build, tokenizer, looks)
    try:
        processor = transformers.AutoProcessor.from_pretrained(parts["tokenizer"], local_files_only=True)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            "the model's processor cannot be loaded ({reason})",
            where=str(parts["tokenizer"]),
            mend="install what it names; torchvision must be of the same release as torch",
            code=EXIT_ENVIRONMENT,
            reason=str(error).strip().splitlines()[0][:200],
        ) from error
    if not hasattr(processor, "image_processor"):
        raise UserError(
            "the folder has no image processor",
            where=str(parts["tokenizer"]),
            mend="download the whole model folder again (preprocessor_config.json is part of it)",
        )
    return _Any(build(cls, parts["model"]), build, processor)


def _no_tokenizer(folder: Path, reason: str) -> UserError:
    return UserError(
        "the model's tokenizer or image processor cannot be read ({reason})",
        where=str(folder),
        mend="download the whole model again; its tokenizer is part of it",
        reason=" ".join(reason.split())[:200],
    )


def _parts(folder: Path) -> dict[str, Path]:
    """Folders of the model, its tokenizer and, where it has one, its image processor. Raises UserError."""
    if not folder.is_dir():
        raise UserError(
            "there is no folder {path}", where="--model", mend="give the folder of a model", path=folder
        )
    if not (folder / "model_index.json").is_file():
        looks = (folder / "preprocessor_config.json").is_file() or (
            folder / "processor_config.json"
        ).is_file()
        return {"model": folder, "tokenizer": folder, **({"processor": folder} if looks else {})}
    found = {"model": folder / "text_encoder", "tokenizer": folder / "tokenizer"}
    if (folder / "processor").is_dir():
        found["processor"] = folder / "processor"
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "config.json cannot be read ({reason})",
            where=str(path),
            mend="give the folder of a vision-language model, or of a Qwen-Image model",
            reason=error.strerror if isinstance(error, OSError) else error,
        ) from error
    return document if isinstance(document, dict) else {}
