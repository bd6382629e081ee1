"""The gain of distillation in the quickstart over fresh seeds: ``python .ci/gain.py [SEEDS...]``, 1 minute a seed.

Runs the quickstart with each seed, measures the students of the last epoch on the test pictures, and prints mean and
sample standard deviation. Nothing is chosen on these pictures.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def measure(seed: int) -> dict[str, float]:
    run = Path("runs") / "gain" / f"seed_{seed}"
    if not (run / "test.json").exists():
        base = [sys.executable, "-m", "kdlit"]
        where = ["--config", str(CONFIG), "--run_dir", str(run), "--ckpt_path", "last"]
        subprocess.run([*base, "fit", *where, f"--seed_everything={seed}"], check=True)
        subprocess.run([*base, "test", *where], check=True)
    return json.loads((run / "test.json").read_text())


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or [11, 12, 13, 14, 15]
    results = [measure(seed) for seed in seeds]
    rows = {
        "teacher": "test/teacher_top1",
        "student trained alone": "test/plain_top1",
        "student, distilled": "test/top1",
    }
    columns = {name: [100 * result[key] for result in results] for name, key in rows.items()}
    columns["gain"] = [
        distilled - alone
        for distilled, alone in zip(columns["student, distilled"], columns["student trained alone"], strict=True)
    ]
    print(f"\nTest top-1 %, last epoch, seeds {seeds}")
    for name, values in columns.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"  {name:24s}{statistics.mean(values):6.2f}{spread}   ({', '.join(f'{value:.2f}' for value in values)})")


if __name__ == "__main__":
    main()
