"""Run the scripts, and keep what they print."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "elsewhere.json"


def main() -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in sys.argv[1:] or sorted(file.stem for file in HERE.glob("*_*.py") if not file.stem.startswith("__")):
        command = [sys.executable, "-m", f"benchmarks.elsewhere.{name}"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        kept[name] = json.loads(printed.splitlines()[-1])
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {kept[name]}", flush=True)


if __name__ == "__main__":
    main()
