"""A SentencePiece model, which ComfyUI's file of UMT5 carries as bytes, as the tokenizer folder that transformers reads.

Format: github.com/google/sentencepiece sentencepiece_model.proto, in protobuf's wire format; read here, so that neither
library is needed. As transformers makes it (tokenization_t5.py, convert_slow_tokenizer.py): a letter that no piece spells
is <unk>, also where the model could spell its bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from whitetuner.errors import UserError

#: Kinds of pieces (sentencepiece_model.proto, SentencePiece.Type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_UNIGRAM = 1
#: Extra words that transformers numbers behind UMT5's own (its pull request 24477), from the last to the first.
_EXTRA = 300


@dataclass
class Pieces:
    """What a model says. pieces: (text, log probability, kind) by id; charsmap: its table of letters that are the same."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    charsmap: bytes = b""
    unigram: bool = True


def read_pieces(model: bytes, where: str) -> Pieces:
    """Raises UserError for what is no SentencePiece model of whole pieces with log probabilities (Unigram)."""
    try:
        found = _read(model)
    except (ValueError, LookupError, struct.error) as error:
        raise UserError(
            "the tokenizer inside the file is damaged ({reason})",
            where=where,
            mend="download the file again, or give the tokenizer's folder as model.tokenizer",
            reason=error,
        ) from error
    kinds = [kind for _, _, kind in found.pieces]
    if not found.unigram or kinds.count(_UNKNOWN) != 1:
        raise UserError(
            "the tokenizer inside the file is of a kind that is not read here",
            where=where,
            mend="give the tokenizer's folder as model.tokenizer",
        )
    return found


def write_tokenizer(folder: Path, model: bytes, rows: int, where: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a folder that is there.

    model: SentencePiece's file; rows: of the encoder's embedding, more words than which there are not; where: for messages.
    Raises UserError as `read_pieces`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    found = read_pieces(model, where)
    ids = {text: number for number, (text, _, _) in enumerate(found.pieces)}
    unknown = next(number for number, piece in enumerate(found.pieces) if piece[2] == _UNKNOWN)
    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": found.pieces[unknown][0]}
    if missing := [word for word in words.values() if word not in ids]:
        raise UserError(
            "the tokenizer inside the file has no {word}",
            where=where,
            mend="give the tokenizer's folder as model.tokenizer",
            word=missing[0],
        )
    made = Tokenizer(Unigram([piece[:2] for piece in found.pieces], unk_id=unknown, byte_fallback=False))
    if found.charsmap:
        made.normalizer = normalizers.Precompiled(found.charsmap)
    words_apart = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words_apart])
    made.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", ids["</s>"])]
    )
    special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    made.add_tokens(
        [
            AddedToken(text, normalized=False, special=special[kind])
            for text, _, kind in found.pieces
            if kind in special
        ]
    )
    extra = range(min(_EXTRA, rows - len(found.pieces)) - 1, -1, -1)
    made.add_special_tokens(
        [AddedToken(f"<extra_id_{number}>", normalized=False, special=True) for number in extra]
    )
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **words, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read(model: bytes) -> Pieces:
    found = Pieces()
    for number, value in _fields(model):
        if number == 1:  # pieces
            parts = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(parts.get(2, bytes(4))))
            if not math.isfinite(score):
                raise ValueError("a piece of no likelihood")
            found.pieces.append((_bytes(parts[1]).decode("utf-8"), score, _number(parts.get(3, 1))))
        elif number == 2:  # trainer_spec: model_type
            found.unigram = _number(dict(_fields(_bytes(value))).get(3, _UNIGRAM)) == _UNIGRAM
        elif number == 3:  # normalizer_spec: precompiled_charsmap
            found.charsmap = _table(_bytes(dict(_fields(_bytes(value))).get(2, b"")))
    return found


def _table(charsmap: bytes) -> bytes:
    """As it is: the size of a trie of whole numbers, the trie, and the texts that it leads to. Raises ValueError."""
    if charsmap:
        (size,) = struct.unpack_from("<I", charsmap)
        if size % 4 or size > len(charsmap) - 4:
            raise ValueError("its table of letters")
        charsmap[4 + size :].decode("utf-8")
    return charsmap


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field: whole numbers as int, all else as bytes. Raises ValueError."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(message, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + size > len(message):
            raise ValueError("it is cut off")
        yield key >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for count in range(10):
        byte = message[place + count]
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, place + count + 1
    raise ValueError("a number without an end")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in place of a text")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a text in place of a number")
    return value
