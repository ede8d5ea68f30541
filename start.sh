#!/bin/sh
# Starts White Tuner on Linux and macOS: finds a Python that fits and hands everything to launch.py.
here=$(cd -- "$(dirname -- "$0")" && pwd -P) || exit 3
for python in "$here/python/bin/python3" python3.12 python3.13 python3.11 python3.10 python3.14 python3 python; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
        exec "$python" "$here/launch.py" "$@"
    fi
done
echo "error: White Tuner needs Python 3.10 to 3.14, and none was found" >&2
echo "错误：需要 Python 3.10 至 3.14" >&2
echo "  -> install Python 3.12 (your system's package manager, or python.org) and start again" >&2
echo "  -> 请安装 Python 3.12（系统的包管理器，或 python.org）后重新启动" >&2
exit 3
