"""The launcher, and how many bytes of weights it read: not a test, but started by one."""

from __future__ import annotations

import sys
from typing import Any

from jaxtune import launch
from jaxtune.weights import hf

if __name__ == "__main__":
    read, total_bytes = hf.Folder.read, 0

    def counted(*arguments: Any) -> Any:
        global total_bytes
        found = read(*arguments)
        total_bytes += found.nbytes
        return found

    hf.Folder.read = counted  # type: ignore[method-assign]
    code = launch.main()
    print(f"read {total_bytes} bytes of weights")
    sys.exit(code)
