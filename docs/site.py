"""For mkdocs: README.md is the start page, and files of the repository that pages link to are part of the site."""

from __future__ import annotations

import posixpath
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from trimtab import ReftConfig

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")
BESIDE = "repository"
"""The folder of the site for what is not in docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, and every file that a page links to outside docs/."""
    home = LINK.sub(lambda link: f"{link[1]}({_from_docs(link[2])}{link[3] or ''})", (ROOT / "README.md").read_text())
    files.append(File.generated(config, "index.md", content=home))
    pages = [file for file in list(files) if file.src_uri.endswith(".md")]
    for page in pages:
        for _, target, _ in LINK.findall(page.content_string):
            path = _outside(target, page.src_uri)
            if path and (ROOT / path).is_file() and not files.get_file_from_path(f"{BESIDE}/{_plain(path)}"):
                text = (ROOT / path).read_bytes()
                files.append(File.generated(config, f"{BESIDE}/{_plain(path)}", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside docs/ lead to those of the site; links to folders there are words alone."""

    def moved(link: re.Match[str]) -> str:
        path = _outside(link[2], page.file.src_uri)
        if path is None:
            return link[0]
        if (ROOT / path).is_dir():
            return link[1].strip("[]")
        here = posixpath.dirname(page.file.src_uri)
        return f"{link[1]}({posixpath.relpath(f'{BESIDE}/{_plain(path)}', here or '.')})"

    return LINK.sub(moved, markdown).replace("<!-- the fields of ReftConfig -->", _fields())


def on_post_build(config: Any) -> None:
    """Put each page's Markdown beside it, to which llms.txt leads who reads no HTML."""
    site, pages = Path(config.site_dir), [ROOT / "README.md", *Path(config.docs_dir).rglob("*.md")]
    for page in pages:
        name = "index.md" if page.name == "README.md" else page.relative_to(config.docs_dir)
        (site / name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")


def _fields() -> str:
    """A table of the fields of `ReftConfig` that PEFT's configs do not have; their help is known when it runs."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for one in fields(ReftConfig):
        if one.name in ReftConfig.__annotations__ and one.metadata:
            lines.append(f"| `{one.name}` | `{one.default!r}` | {one.metadata['help']} |")
    return "\n".join(lines)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def _outside(target: str, page: str) -> str | None:
    """The path within the repository of what a page links to, where that is not in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def _plain(path: str) -> str:
    """Markdown there is shown as it is, and no page of the site."""
    return f"{path}.txt" if path.endswith((".md", ".py")) else path
