#!/usr/bin/env python3
"""Starts White Tuner: installs it into .venv beside this file when needed, then runs `whitetuner WORDS`.

    python launch.py                   the page
    python launch.py WORDS             any word of whitetuner, e.g. `demo`, `train CONFIG`
    python launch.py setup             only installs
    python launch.py test [--all]      installs the development tools too and runs the tests (--all: the slow ones as well)
    python launch.py --help            the options of the installation

Needs nothing but Python's standard library; the work is done by src/whitetuner/install. This file alone stays readable for
Python 2.7 and 3.0-3.9, so that they get a sentence and not a SyntaxError.
"""

from __future__ import unicode_literals

import os
import platform
import sys

OLDEST, NEWEST = (3, 10), (3, 14)


def here():
    """The checkout's folder. Windows keeps a mapped drive's letter (realpath would turn it into a UNC path)."""
    return os.path.dirname((os.path.abspath if os.name == "nt" else os.path.realpath)(__file__))


def refusal(version, is_64_bit, implementation):
    """Why this Python cannot run White Tuner, as lines of text; empty when it can."""
    if implementation != "CPython":
        found = "this is " + implementation
    elif not OLDEST <= tuple(version[:2]) <= NEWEST:
        found = "this is Python %d.%d" % (version[0], version[1])
    elif not is_64_bit:
        found = "this Python is a 32-bit one, and PyTorch has none for it"
    else:
        return []
    wanted = "Python %d.%d to %d.%d (CPython, 64 bit)" % (OLDEST + NEWEST)
    return [
        "error: White Tuner needs %s; %s: %s" % (wanted, found, sys.executable),
        "\u9519\u8bef\uff1a\u9700\u8981 64 \u4f4d Python %d.%d \u81f3 %d.%d" % (OLDEST + NEWEST),
        "  -> " + mend(),
        "  -> \u8bf7\u5b89\u88c5 Python 3.12\uff08\u7cfb\u7edf\u7684\u5305\u7ba1\u7406\u5668\u6216 python.org\uff09"
        "\uff0c\u518d\u7528\u5b83\u8fd0\u884c launch.py",
    ]


def mend():
    """What to do about an unfit Python: name a fit one that is already on the PATH, or where to get one."""
    names = ["python%d.%d" % (OLDEST[0], minor) for minor in range(NEWEST[1] - 1, OLDEST[1] - 1, -1)]
    for name in names + ["python%d.%d" % NEWEST]:
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            if os.access(os.path.join(folder, name), os.X_OK) and "shims" not in folder:
                return "start it with the one you have: %s launch.py" % os.path.join(folder, name)
    if os.name == "nt":
        return "install Python 3.12 from python.org, then: py -3.12 launch.py"
    return "install Python 3.12 (your system's package manager, or python.org), then: python3.12 launch.py"


def main():
    lines = refusal(sys.version_info, sys.maxsize > 2**32, platform.python_implementation())
    if lines:
        encoding = "utf-8" if os.name != "nt" else sys.stderr.encoding or "utf-8"
        getattr(sys.stderr, "buffer", sys.stderr).write(("\n".join(lines) + "\n").encode(encoding, "replace"))
        return 3
    root = here()
    sys.path.insert(0, os.path.join(root, "src"))
    from whitetuner.install import launch

    return launch.main(root, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
