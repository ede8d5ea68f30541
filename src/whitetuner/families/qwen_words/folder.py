"""The tokenizer of Qwen2.5 and Qwen3, written as the folder that transformers reads: single files come without one.

Licence and source: NOTICE.md beside this file. Qwen2.5's has the same words, without the last four added tokens.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Literal

_HERE = Path(__file__).parent
#: Added tokens from 151643 on; the first fourteen are special, as their tokenizer_config.json says.
_ADDED = (
    *(f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")),
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    *(f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    "<tool_call>",
    "</tool_call>",
    *(
        f"<|{name}|>"
        for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ),
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_SPECIAL = 14
Release = Literal["qwen2.5", "qwen3"]


def write_tokenizer(folder: Path, release: Release) -> None:
    """Writes vocab.json, merges.txt, tokenizer_config.json and chat_template.jinja into a folder that is there."""
    merges = lzma.decompress((_HERE / "merges.txt.xz").read_bytes()).decode("utf-8").splitlines()
    words = [*_byte_letters(), *(merge.replace(" ", "") for merge in merges)]
    added = _ADDED if release == "qwen3" else _ADDED[:-4]
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(len(words) + index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": index < _SPECIAL,
            }
            for index, token in enumerate(added)
        },
        "additional_special_tokens": list(_ADDED[1:_SPECIAL]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }
    texts = {
        "vocab.json": json.dumps({word: index for index, word in enumerate(words)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "chat_template.jinja": (_HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _byte_letters() -> list[str]:
    """The letters that stand for bytes in byte-level BPE, in the order of the vocabulary (Radford et al. 2019, GPT-2):
    printable bytes first, as themselves; the others take letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sum(1 for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
