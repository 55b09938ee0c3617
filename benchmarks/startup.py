"""From the shell's prompt to an image: `spar generate` as a new process, against a bare `import torch`.

The last line is JSON; `ratio` is the wall time of the whole command over that of the import.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spar.checkpoints.model_header import versions
from spar.training.bundle import hardware_info

PROMPT = "a large red circle to the left of a small blue star"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.png")
        generate = [str(Path(sys.executable).with_name("spar")), "generate", PROMPT, "-o", out, "--overwrite"]
        generate += ["--seed", "0"]
        whole = [seconds(generate) for _ in range(repeats + 1)][1:]  # the first fills the disk cache
        bare = [seconds([sys.executable, "-c", "import torch"]) for _ in range(repeats)]
    print(f"generate {min(whole):.2f} s, import torch {min(bare):.2f} s")
    result = {"benchmark": "startup", "generate_s": whole, "import_torch_s": bare, "ratio": min(whole) / min(bare)}
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
