"""Makes every figure that the documentation quotes again: python -m benchmarks.all [--dry-run] [--older] [RESULT ...]

Runs the commands of benchmarks/README.md one after the other (about four hours on two cores); one that fails does not keep the
others from running. Afterwards: look at the differences (`git diff benchmarks/results docs`), put changed figures into the
pages that quote them, commit, and renew the marks (`python -m benchmarks.ages --write`).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time

from benchmarks.ages import ROOT, is_older, rows


def chosen(names: list[str], older: bool) -> list[tuple[str, str]]:
    """(result, command) of those asked for. Raises SystemExit for a name that is not there."""
    known = dict(rows())
    if wrong := sorted(set(names) - set(known)):
        raise SystemExit(f"no such result: {', '.join(wrong)}\n  -> one of: {', '.join(known)}")
    wanted = [name for name in known if not names or name in names]
    return [(name, known[name]) for name in wanted if not older or is_older(name)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="RESULT", help="e.g. step.json (none: all)")
    parser.add_argument("--older", action="store_true", help="only what is older than the code it measures")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    given = parser.parse_args(arguments)
    failed = []
    for name, command in chosen(given.names, given.older):
        print(f"{name}: {command}", flush=True)
        if given.dry_run:
            continue
        begun = time.monotonic()
        if subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - begun:.0f} s{' FAILED' if name in failed else ''}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
