"""Brings files from outside of docs/ into the manual: the README as its first page, the results, what pages link to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
NOTEBOOK = "examples/inspect_adapter"
_KINDS = {".md", ".py", ".sh", ".png", ".yaml", ".ipynb"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, CONTRIBUTING.md and examples/, at the paths that they have in the repository."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "README.md", content=readme.replace("](docs/", "](")))
    others = [ROOT / name for name in ("CONTRIBUTING.md", "LICENSE", ".ci/pinned.txt")]
    for path in [*others, *sorted((ROOT / "examples").rglob("*"))]:
        if path.is_file() and (path.suffix in _KINDS or path in others):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    notebook = json.loads((ROOT / f"{NOTEBOOK}.ipynb").read_text(encoding="utf-8"))
    page = "\n\n".join(part for cell in notebook["cells"] for part in _as_markdown(cell))
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=page))
    return files


def _as_markdown(cell: dict[str, Any]) -> Iterator[str]:
    """A notebook's cell with its outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f'<img alt="The figure that the cell draws" src="data:image/png;base64,{data["image/png"].strip()}">'
        elif "text/html" in data:
            yield "".join(data["text/html"])
        else:
            yield f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```"


def on_page_content(html: str, page: Page, **others: object) -> str:
    """Show the marks of Hugging Face's docstrings, as in "r (`int`)" and "[`ReftModel`]", as code."""
    if page.file.src_uri != "reference.md":
        return html
    return re.sub(r"\[(<code>\w+</code>)\]", r"\1", re.sub(r"<code>`([^`<]*)`</code>", r"<code>\1</code>", html))


def on_page_markdown(markdown: str, page: Page, **others: object) -> str:
    """Lead links out of docs/ to where `on_files` put their files."""
    if "/" in page.file.src_uri:
        return re.sub(r"\]\((?:\.\./)+docs/", "](" + "../" * page.file.src_uri.count("/"), markdown)
    return markdown.replace("](../", "](").replace(f"]({NOTEBOOK}.ipynb", f"]({NOTEBOOK}.md")
