"""Tables in docs/performance.md, each between two markers of its name."""

import re
import shlex
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def this_command(module: str) -> str:
    """The command of this run, as it stands above its figures."""
    return f"`{shlex.join(['python', '-m', module, *sys.argv[1:]])}`"


def write_section(name: str, content: str) -> None:
    """Replace what stands between <!-- NAME --> and <!-- /NAME -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    text, count = pattern.subn(lambda match: f"{match[1]}{content}\n{match[2]}", PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} sections {name}; wanted one")
    PAGE.write_text(text, encoding="utf-8")
