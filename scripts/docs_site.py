"""What MkDocs cannot know of this repository: a hook of the documentation site (`make docs`).

The navigation of the API reference comes from the modules in the tree, that of decision records
from their folder. Links to files outside docs/ become names of these files, and a link to a module
leads to its page of the reference. A page that would fetch anything from elsewhere is an error.
"""

from __future__ import annotations

import posixpath
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("worldmodel", "policy", "sepsis_jax")
OPENING = "<!-- the opening of README.md -->"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
)


def public_modules(root: Path = ROOT) -> dict[str, Path]:
    """Modules and packages by dotted name, without those whose name begins with an underscore."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") for part in parts):
                found[".".join(parts)] = path
    return found


def page_of(module: str, path: Path) -> str:
    """The page of a module, relative to docs/."""
    folder = "api/" + module.replace(".", "/")
    return f"{folder}/index.md" if path.name == "__init__.py" else f"{folder}.md"


def api_nav(modules: dict[str, Path]) -> list[Any]:
    """The navigation of the reference: a section for each package, its own page first."""

    def section(package: str) -> list[Any]:
        entries: list[Any] = []
        for name, path in modules.items():
            if name == package:
                entries.insert(0, page_of(name, path))
            elif name.rpartition(".")[0] == package:
                inside = section(name) if path.name == "__init__.py" else page_of(name, path)
                entries.append({name.rpartition(".")[2]: inside})
        return entries

    return [{package: section(package)} for package in PACKAGES]


def full_nav(nav: list[Any], docs: Path, modules: dict[str, Path]) -> list[Any]:
    """The navigation of mkdocs.yml with all that the tree adds to it."""
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    others = [path.name for path in sorted(docs.glob("*.md")) if path.name not in named]
    decisions = sorted((docs / "decisions").glob("*.md"), key=lambda path: path.name != "index.md")
    guide = next(entry["Guide"] for entry in nav if "Guide" in entry)
    guide += others
    return [
        *nav,
        {"API reference": api_nav(modules)},
        {"Decisions": [f"decisions/{path.name}" for path in decisions]},
        {"Changelog": "changelog.md"},
    ]


def opening(readme: str) -> str:
    """What README.md says before its first section, with links as docs/index.md needs them."""
    text = re.split(r"^## ", readme, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", text)  # sections of README.md stay there
    return re.sub(r"\]\(docs/", "](", text).strip()


def relinked(markdown: str, page: str, modules: dict[str, Path]) -> str:
    """A page whose links outside docs/ are names of files, or lead into the reference.

    Raises:
      FileNotFoundError: a file that is linked to does not exist.
    """
    here = posixpath.dirname(page)
    pages = {
        path.relative_to(ROOT).as_posix(): page_of(name, path) for name, path in modules.items()
    }

    def replace(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = posixpath.normpath(posixpath.join("docs", here, link.partition("#")[0]))
        if "://" in link or link.startswith(("#", "mailto:")) or target.startswith("docs/"):
            return match.group()
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"docs/{page} links to {target}, which does not exist")
        if target in pages:
            return f"[{text}]({posixpath.relpath(pages[target], here or '.')})"
        return text if target in text else f"{text} (`{target}`)"

    return _LINK.sub(replace, markdown)


def on_config(config: Any) -> Any:
    """Completes the navigation."""
    config.nav = full_nav(config.nav, Path(config.docs_dir), public_modules())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each module, and the changelog."""
    from mkdocs.structure.files import File

    for name, path in public_modules().items():
        files.append(
            File.generated(
                config, page_of(name, path), content=f"---\ntitle: {name}\n---\n\n::: {name}\n"
            )
        )
    changelog = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=changelog))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Takes README.md's opening in, and mends links to files outside docs/."""
    if OPENING in markdown:
        markdown = markdown.replace(OPENING, opening((ROOT / "README.md").read_text()))
    return relinked(markdown, page.file.src_uri, public_modules())


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses pages that fetch anything from elsewhere.

    Raises:
      ValueError: a script, style sheet or picture comes from another address.
    """
    found = _FETCHED.search(output)
    if found:
        raise ValueError(f"{page.file.src_uri} fetches from elsewhere: {found.group()}")
    return output


with suppress(ImportError):  # tests import this module without the tools of the site
    import griffe

    class FieldComments(griffe.Extension):
        """Shows the comment behind a field or constant, such as a shape, as its docstring."""

        def on_attribute_instance(self, *, attr: Any, **_: Any) -> None:
            """Gives an attribute without a docstring that of its comment."""
            if attr.docstring or attr.lineno is None or not isinstance(attr.filepath, Path):
                return
            lines = attr.lines_collection[attr.filepath][attr.lineno - 1 : attr.endlineno]
            comment = re.search(r"\s#(?!\s*(?:type:|noqa))\s*([^\n]+)$", "\n".join(lines))
            if comment:
                attr.docstring = griffe.Docstring(comment[1], parent=attr)
