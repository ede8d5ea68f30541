"""The readers of strangers' files under a fuzzer that looks which lines of theirs an input reaches (atheris, libFuzzer).

    pip install -c constraints.txt -e .[fuzz]         Linux on x86-64
    python tests/fuzz                                 each reader for a minute
    python tests/fuzz events 600 [FOLDER]             one of them for ten; what reached new lines stays in FOLDER

Whatever is raised but a UserError ends it with exit code 77 and a file crash-HASH here. A mended one belongs to FOUND in
test_fuzz.py.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

#: Instrumented: ours, and what reads for us in Python. torch is left alone.
WATCHED = ["whitetuner", "tomllib", "tomlkit", "yaml", "json"]
NAMES = ("config", "importers", "safetensors", "checkpoint", "events", "run.json", "captions")


def fuzz(atheris: Any, name: str, seconds: int, kept: Path) -> None:
    """Does not come back: libFuzzer ends the process."""
    import torch  # outside of what is watched

    torch.set_num_threads(1)
    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=WATCHED):
        import targets
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["WHITETUNER_STATE"] = str(folder / "state")
    read, seeds = targets.TARGETS[name]
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (kept / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            "-timeout=20",
            "-max_len=4096",
            "-print_final_stats=1",
            str(kept),
        ],
        lambda raw: read(folder, raw),
    )
    atheris.Fuzz()


def main() -> int:
    words = sys.argv[1:]
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed: pip install -c constraints.txt -e .[fuzz]", file=sys.stderr)
        return 3
    if words:
        if words[0] not in NAMES:
            print(f"choose one of: {', '.join(NAMES)}", file=sys.stderr)
            return 2
        kept = Path(words[2]) if len(words) > 2 else Path(tempfile.mkdtemp(prefix="fuzz-kept-"))
        fuzz(atheris, words[0], int(words[1]) if len(words) > 1 else 60, kept)
    codes = {name: subprocess.run([sys.executable, __file__, name]).returncode for name in NAMES}
    print(codes)
    return max(codes.values())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
