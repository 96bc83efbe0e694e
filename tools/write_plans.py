"""Write what planning commands print into the pages that show it.

    python tools/write_plans.py          # rewrite
    python tools/write_plans.py --check  # exit status 1 when a page is out of date

A page has blocks of the form

    <!-- printed by: treepo-mcore plan CONFIG ... -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "120"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
BLOCK = re.compile(r"(<!-- printed by: (?P<command>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """With blocks."""
    found = [*ROOT.glob("examples/*/README.md"), *ROOT.glob("docs/*.md")]
    return sorted(page for page in found if BLOCK.search(page.read_text()))


def fresh(text: str) -> str:
    """The page with its blocks run again."""
    return BLOCK.sub(lambda found: f"{found[1]}```\n{output(found['command'])}\n```\n{found[3]}", text)


def output(command: str) -> str:
    """What the command prints, run in this process from the root of the repository."""
    words = shlex.split(command)
    if words[:2] == ["python", "tools/fit_planner.py"]:
        import fit_planner

        return _printed(fit_planner.print_table)
    if words[:3] == ["python", "tools/plot_scaling.py", "--table"]:
        import plot_scaling

        return _printed(plot_scaling.print_table)
    from treepo_mcore.cli.plan import app

    assert words[:2] == ["treepo-mcore", "plan"], command
    return _printed(lambda: app(words[2:], standalone_mode=False))


def _printed(run: Callable[[], Any]) -> str:
    text = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(text):
        run()
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def main() -> int:
    """Rewrite or check; returns the exit status."""
    stale = []
    for page in pages():
        text = page.read_text()
        new = fresh(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new)
    if "--check" in sys.argv and stale:
        print(f"out of date, run tools/write_plans.py: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
