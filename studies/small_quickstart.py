"""The quickstart's model and data, and the first thousand of its prompts, which a run sees several times."""

import subprocess
import sys
from pathlib import Path

QUICKSTART = Path("examples/quickstart/run.py")
DATA = Path(".cache/quickstart/data")

subprocess.run([sys.executable, QUICKSTART, "--prepare"], check=True)
lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
(DATA / "train_1000.jsonl").write_text("".join(lines[:1000]))
