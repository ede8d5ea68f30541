"""Caption files: UTF-8 text beside the picture. What is not UTF-8 is told with the likely encoding, and can be converted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from whitetuner.errors import UserError

#: Appended to the name of what a conversion replaces; files that end so are never captions.
KEPT_AS = ".bak"

#: Endings that other programs give to captions; looked at only to say which `caption_ext` is probably meant.
CAPTION_ENDINGS = (".txt", ".caption", ".cap", ".captions", ".prompt")


def read_caption(path: Path) -> str:
    """Text of a caption file without byte-order mark and outer blanks. Raises UserError when it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return tidy(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(
            "the caption is not UTF-8 (it looks like {encoding})",
            where=str(path),
            mend='convert: whitetuner check "{folder}" --convert-captions   (originals are kept as *.bak)',
            encoding=guess_encoding(raw),
            folder=path.parent,
        ) from None


def tidy(text: str) -> str:
    """One kind of line end, no outer blanks."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def with_trigger(caption: str, trigger: str) -> str:
    """The trigger word stands before the caption unless it is in there already (as a word of its own, case ignored)."""
    if not trigger:
        return caption
    # Letters of the alphabet end a word; Chinese has no blanks, so \b would never find one there
    alone = rf"(?<![A-Za-z0-9_]){re.escape(trigger)}(?![A-Za-z0-9_])"
    if re.search(alone, caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def guess_encoding(raw: bytes) -> str:
    """The likely encoding of text that is not UTF-8, by a name that Python's codecs know.

    Chinese first, since that is what reaches this program (Korean and Chinese bytes cannot be told apart).
    Only a guess: a conversion shows what came out and keeps the original.
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if raw[:512].count(0) > len(raw[:512]) // 4:
        return "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    high = re.findall(rb"[\x80-\xff]+", raw)
    if all(len(run) == 1 for run in high):  # single accented letters between plain ones
        return "cp1252"
    scores = {name: _readable(raw, name) for name in _COMMON}
    best = max(scores, key=lambda name: scores[name])  # dict order settles ties: gb18030 first
    return best if scores[best] > 0 else "cp1252"


def _readable(raw: bytes, encoding: str) -> float:
    """Share of the non-ASCII characters that are frequent in texts of that encoding; 0 when it cannot be decoded."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    foreign = [char for char in text if ord(char) > 127]
    return sum(map(_COMMON[encoding], foreign)) / max(1, len(foreign))


def _gb2312_frequent(char: str) -> bool:
    """First level of GB 2312 (the 3755 frequent characters) or its punctuation."""
    code = char.encode("gb18030")
    return len(code) == 2 and (0xB0 <= code[0] <= 0xD7 or 0xA1 <= code[0] <= 0xA3) and code[1] >= 0xA1


def _big5_frequent(char: str) -> bool:
    """First level of Big5 (5401 frequent characters) or its punctuation; a little less than sure, since GBK overlaps it."""
    code = char.encode("big5")
    return 0xA1 <= code[0] <= 0xC6


_COMMON = {
    "gb18030": _gb2312_frequent,
    "shift_jis": lambda char: "\u3040" <= char <= "\u30ff",
    "big5": _big5_frequent,
}


@dataclass(frozen=True)
class Converted:
    """One caption brought to UTF-8; `kept` is the original."""

    path: Path
    encoding: str
    kept: Path
    text: str


def convert_captions(paths: Iterable[Path], encoding: str | None = None) -> list[Converted]:
    """Rewrites the files that are not UTF-8 as UTF-8; each original stays beside it as NAME.bak.

    encoding: of the originals; None: guessed for each. Files that are UTF-8 already are left alone.
    Raises UserError when a file cannot be read in that encoding; the files before it are converted by then.
    """
    done = []
    for path in paths:
        raw = path.read_bytes()
        try:
            raw.decode("utf-8-sig")
            continue
        except UnicodeDecodeError:
            name = encoding or guess_encoding(raw)
        try:
            text = raw.decode(name)
        except (UnicodeDecodeError, LookupError):
            raise UserError(
                "the caption cannot be read as {encoding}",
                where=str(path),
                mend="name it: --convert-captions --encoding NAME (gb18030, big5, shift_jis, euc_kr, cp1252)",
                encoding=name,
            ) from None
        done.append(Converted(path, name, _replace_keeping(path, text), text))
    return done


def write_keeping(path: Path, text: str) -> Path | None:
    """Writes a caption, whole or not at all; what was there stays beside it as NAME.bak, whose path is returned."""
    if path.is_file() and path.read_bytes().strip():
        return _replace_keeping(path, text)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(tidy(text) + "\n", encoding="utf-8", newline="\n")
    temporary.replace(path)
    return None


def _replace_keeping(path: Path, text: str) -> Path:
    kept = path.with_name(path.name + KEPT_AS)
    number = 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}{number}{KEPT_AS}")
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(tidy(text) + "\n", encoding="utf-8", newline="\n")
    path.rename(kept)
    temporary.replace(path)
    return kept
