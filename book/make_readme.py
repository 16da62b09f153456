"""Fill the blocks of README.md, `<!-- begin: python … -->` to `<!-- end -->`, with what the command prints."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- begin: python ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(match: re.Match) -> str:
    printed = subprocess.run([sys.executable, *match[2].split()], capture_output=True, text=True, check=True,
                             cwd=README.parent).stdout
    return f"{match[1]}\n{printed.strip()}\n\n{match[3]}"


if __name__ == "__main__":
    README.write_text(BLOCK.sub(filled, README.read_text(encoding="utf-8")), encoding="utf-8")
