"""Run the benchmarks whose results are recorded and that a CPU can run, as they were recorded.

Each writes its last line to benchmarks/results/NAME.json when it ends. `docs/performance.py` then makes the tables
(`docs/evidence.py` that of early exit); figures that a guide quotes in its text are compared with the files by the
tests.

    python benchmarks/all.py                    # all of them
    python benchmarks/all.py approximations     # these alone
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# By the name of the result: the script and its arguments.
RECORDED: dict[str, tuple[str, ...]] = {
    "approximations": ("approximations.py",),
    "attention": ("attention.py",),
    "busy_cpu": ("busy_cpu.py",),
    "cost_of_parts": ("cost_of_parts.py", "--batch", "16", "--rounds", "9"),
    "cost_of_parts_1b": ("cost_of_parts.py", "--recipe", "spar-1b", "--dtype", "native", "--batch", "1"),
    "data_loader": ("data_loader.py", "--images", "1536"),
    "decode_tiles": ("decode_tiles.py",),
    "early_exit": ("early_exit.py",),
    "full_size_inference": ("full_size_inference.py",),
    "growth": ("growth.py",),
    "growth_1b": ("growth.py", "--recipe", "spar-1b", "--counted"),
    "inference_memory_cpu": (
        "inference_memory.py", "--device", "cpu", "--way", "float32", "--way", "dtype", "--steps", "20",
    ),
    "joining_policies": ("joining_policies.py",),
    "serve_joining": ("serve_joining.py",),
    "serve_load": ("serve_load.py", "--minutes", "10", "--seconds", "60"),
    "startup": ("startup.py",),
    "text_tokens": ("text_tokens.py",),
    "train_step": ("train_step.py", "--device", "cpu", "--batch", "1"),
    "two_systems": ("two_systems.py",),
}  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or [*RECORDED]
    if unknown := [name for name in names if name not in RECORDED]:
        sys.exit(f"expected some of {', '.join(RECORDED)}, got {unknown[0]}")
    for name in names:
        script, *arguments = RECORDED[name]
        print(f"{name}: {script} {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, str(FOLDER / script), *arguments], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{name}: {script} ended with status {done.returncode}; its result stays as it was")
        last = done.stdout.splitlines()[-1]
        json.loads(last)
        (FOLDER / "results" / f"{name}.json").write_text(last + "\n", "utf-8")


if __name__ == "__main__":
    main()
