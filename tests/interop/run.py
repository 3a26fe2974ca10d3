"""Checks Titer against transformers, peft, tokenizers, safetensors and pandas.

    python tests/interop/run.py --titer target/release/titer

Prints a line for each check, and fails if there is any difference.
"""

import argparse
import importlib
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import Results, Titer

PARTS = ["models", "peft", "tokens", "templates", "results"]
CLIENTS = ["transformers", "peft", "tokenizers", "safetensors", "torch", "pandas"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titer", type=Path, required=True, help="the binary")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be repeated")
    parser.add_argument("--matching", default="", help="only checks with this in their name")
    parser.add_argument("--table", type=Path, help="the file to write the table to")
    parser.add_argument("--old-peft", type=Path, help="a folder that keeps old versions of peft between runs")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="titer-interop-") as folder:
        results = Results(str(Path(folder).resolve()))
        old_peft = (arguments.old_peft or Path(folder) / "old").resolve()
        old_peft.mkdir(parents=True, exist_ok=True)
        for part in arguments.only or PARTS:
            # Files are called `check_peft` and so on, since a `peft.py` here would hide the library.
            module = importlib.import_module(f"check_{part}")
            home = Path(folder).resolve() / part
            home.mkdir()
            more = [old_peft] if part == "peft" else []
            for name, function in module.checks(Titer(arguments.titer.resolve()), home, *more):
                if arguments.matching in name:
                    results.check(part, name, function)
    failed = results.failed()
    print(f"{len(results.entries)} checks, {len(failed)} failed, in {time.monotonic() - begun:.0f} s")
    if not results.entries:
        sys.exit("no check ran")
    if arguments.table:
        arguments.table.write_text(table(results.entries))
    sys.exit(1 if failed else 0)


def table(entries):
    clients = ", ".join(f"{name} {version(name)}" for name in CLIENTS)
    lines = [
        "# Checked with the real clients",
        "",
        "<!-- written by `.ci/interop --table docs/measurements/interop.md`: do not edit -->",
        "",
        f"Titer against {clients}, on tiny models with random weights, in f32 on the CPU. Adapters were also written "
        "and read by older versions of peft, which are named in front of the check. A difference of losses is the "
        "largest of all steps or rows, and one of logits the largest of all tokens and words.",
        "",
        "| part | check | result | figure |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(map(cell, entry)) + " |" for entry in entries]
    return "\n".join(lines) + "\n"


def cell(text):
    """A text as a cell of a table. Answers of random models may hold anything."""
    text = " ".join(text.encode("ascii", "backslashreplace").decode().split())
    text = text if len(text) <= 160 else text[:160] + " ..."
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "'")):
        text = text.replace(sign, written)
    return text


if __name__ == "__main__":
    main()
