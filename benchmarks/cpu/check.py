"""`check` of 10,000 pictures: under 20 s, from headers and file ends, the HTML page with its thumbnails
included.

    python -m benchmarks.cpu.check [--pictures 10000] [--out FILE]

The set is real in what costs time: photographs of scikit-image in several sizes and formats, each file
different (a comment chunk of its own keeps pixels as they are), half with EXIF, captions beside, some files
damaged or doubled.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from io import BytesIO
from pathlib import Path

from benchmarks.paired import environment
from PIL import Image

LIMIT_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="check-"))
    try:
        total_bytes = make(folder / "set", given.pictures)
        runs = [measured(folder / "set", folder / "report.html") for _ in range(3)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "what": "check of a bare folder in a fresh process, page included",
        "pictures": given.pictures,
        "bytes": total_bytes,
        "seconds": [round(run["process_s"], 2) for run in runs],
        "inside_check_s": [round(run["check_s"], 2) for run in runs],
        "page_s": [round(run["page_s"], 2) for run in runs],
        "findings": runs[0]["findings"],
        "limit_s": LIMIT_S,
        "ok": max(run["process_s"] for run in runs) < LIMIT_S,
        **environment("pillow"),
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


def make(folder: Path, count: int) -> int:
    """Writes the pictures; returns their bytes."""
    from skimage import data

    folder.mkdir()
    source = random.Random(0)
    photos = [
        Image.fromarray(getattr(data, name)()).convert("RGB")
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    models = []
    for photo in photos:
        for width in (512, 900, 1400):
            shape = photo.resize((width, round(width * photo.height / photo.width)))
            for kind, options in (
                ("jpg", {"quality": 92}),
                ("jpg", {"quality": 92, "exif": exif.tobytes()}),
                ("webp", {"quality": 85}),
                ("png", {}),
            ):
                if kind == "png" and width > 900:
                    continue
                stream = BytesIO()
                shape.save(stream, "jpeg" if kind == "jpg" else kind, **options)
                models.append((kind, stream.getvalue()))
    total = 0
    for number in range(count):
        kind, raw = models[source.randrange(len(models))]
        # lengths differ as they do among photographs; every 500th file is a copy of the first
        text = f"number {number} " + "." * source.randrange(4000) if number % 500 else "copy"
        kind, raw = models[0] if text == "copy" else (kind, raw)
        unique = _unique(kind, raw, text.encode())
        if number % 1000 == 7:
            unique = unique[: len(unique) // 2]
        path = folder / f"picture {number:05}.{kind}"
        path.write_bytes(unique)
        path.with_suffix(".txt").write_text(f"a photograph, number {number}", encoding="utf-8")
        total += len(unique)
    return total


def _unique(kind: str, raw: bytes, text: bytes) -> bytes:
    """The same pixels in a file of its own content."""
    if kind == "jpg":
        return raw[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + raw[2:]
    if kind == "png":
        chunk = b"tEXt" + b"Comment\0" + text
        return (
            raw[:33]
            + struct.pack(">I", len(chunk) - 4)
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + raw[33:]
        )
    tail = b"note" + struct.pack("<I", len(text)) + text + b"\0" * (len(text) % 2)
    return b"RIFF" + struct.pack("<I", len(raw) - 8 + len(tail)) + raw[8:] + tail


def measured(folder: Path, page: Path) -> dict[str, float]:
    """One check in a process of its own, as the command line does it."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _ONE, str(folder), str(page)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    seconds = time.perf_counter() - began
    return {**json.loads(done.stdout), "process_s": seconds}


_ONE = """
import json, sys, time
from pathlib import Path
from whitetuner.data.check import check_sets
from whitetuner.data.check_page import write_check_html
from whitetuner.data.scan import SetOptions
report = check_sets([SetOptions(images=sys.argv[1])], 16)
began = time.perf_counter()
write_check_html(report, Path(sys.argv[2]))
kinds = {}
for one in report.problems:
    kinds[one.kind] = kinds.get(one.kind, 0) + 1
print(json.dumps({"check_s": report.seconds, "page_s": time.perf_counter() - began, "findings": kinds}))
"""


if __name__ == "__main__":
    raise SystemExit(main())
