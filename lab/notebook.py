"""The walkthrough as a notebook: docs/walkthrough.ipynb, made from walkthrough.md, which stays the one source.

    python -m lab.notebook      # after each edit of walkthrough.md

A Python block becomes a code cell, the text block below it becomes the output of that cell, and all else is Markdown.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, NOTEBOOK = ROOT / "walkthrough.md", ROOT / "docs" / "walkthrough.ipynb"
BLOCK = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)  # what to run, and what it prints
SET_UP = """\
# On Colab there is no copy of the repository yet. Put its address here, and this cell fetches it.
REPO = "https://github.com/OWNER/nano-agentflow"

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

if os.path.exists("../agent.py"):  # Jupyter starts in docs/
    os.chdir("..")
elif not os.path.exists("agent.py"):
    subprocess.run(["git", "clone", "--depth", "1", REPO, "nano-agentflow"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "torch", "tqdm", "TRANSFORMERS"], check=True)
    os.chdir("nano-agentflow")
sys.path.insert(0, os.getcwd())

# Jupyter runs an event loop in this thread. A second one, for the rollouts, needs a thread of its own.
asyncio.run = lambda coroutine: ThreadPoolExecutor(1).submit(asyncio.runners.run, coroutine).result()
"""


def cell(kind: str, number: int, text: str, **more: object) -> dict:
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines(text.strip("\n")), **more}


def code_cell(number: int, code: str, printed: str) -> dict:
    output = {"name": "stdout", "output_type": "stream", "text": lines(printed)}
    return cell("code", number, code, execution_count=None, outputs=[output] if printed else [])


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def notebook() -> str:
    """The JSON of the notebook, as Jupyter itself would write it."""
    page = PAGE.read_text().replace("](docs/", "](")  # links, as seen from docs/
    pin = re.search(r"^transformers==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    cells = [code_cell(0, SET_UP.replace("TRANSFORMERS", pin), "")]
    texts, codes, prints = (BLOCK.split(page)[start::3] for start in range(3))
    for text, code, printed in zip(texts, [*codes, ""], [*prints, ""]):
        cells.append(cell("markdown", len(cells), text))
        if code:
            cells.append(code_cell(len(cells), code, printed))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
