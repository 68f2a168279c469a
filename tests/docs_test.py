"""README.md and docs/: links resolve, commands parse, and the README stays one page."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# placeholders such as [--config.key=value ...] end the part of a line that can be checked
END_OF_FLAGS = ("...", "--", ">", "&&", "#")


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page whose file, or whose heading in that file, does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(link)
        elif heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            broken += [link] * (heading not in slugs)
    return broken


def commands(text: str) -> list[str]:
    """Command lines in fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line for line in lines if re.match(r"(python -m (mert_jax|tests)\.|bash launch/)", line)
    ]


def config_of(flag: str) -> ConfigDict:
    """The config of `configs/NAME.py[:SIZE]`."""
    path, _, size = flag.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(*([size] if size else []))


def has_key(config: ConfigDict, name: str) -> bool:
    """Whether a config has the key `config.a.b`."""
    node = config
    for key in name.split(".")[1:]:
        if not isinstance(node, ConfigDict) or key not in node:
            return False
        node = node[key]
    return True


def problems(line: str) -> list[str]:
    """What is wrong with a command line: missing module or script, unknown flag or config key."""
    program, *words = shlex.split(line, comments=True)
    if program == "bash":
        return [] if (ROOT / words[0]).exists() else [f"no script {words[0]}"]
    module = words[1]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return [f"no module {module}"]
    if module.startswith("tests."):
        return []
    known = importlib.import_module(module).FLAGS
    arguments = []
    for word in words[2:]:
        if word in END_OF_FLAGS:
            break
        arguments.append(word)
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    wrong = []
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        if name.startswith("config."):
            if not has_key(config_of((chosen or ["configs/base.py"])[0]), name):
                wrong.append(f"no config key {name}")
        elif not word.startswith("--") or name not in known:
            wrong.append(f"{module} has no flag {word}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_shown_commands_parse():
    lines = [line for page in PAGES for line in commands(page.read_text())]
    assert len(lines) > 20
    assert {line: wrong for line in lines if (wrong := problems(line))} == {}


def test_the_readme_is_one_page():
    assert len(PAGES[0].read_text().splitlines()) <= 150


def test_broken_links_are_reported():
    text = "[a](docs/data.md) [b](docs/none.md) [c](README.md#nothing) [d](https://example.org)"
    assert broken_links(PAGES[0], text) == ["docs/none.md", "README.md#nothing"]


@pytest.mark.parametrize(
    "line",
    [
        "python -m mert_jax.nothing --input=a",
        "python -m mert_jax.prepare --inputs=a --output=b",
        "python -m mert_jax.prepare a",
        "python -m mert_jax.train --config=configs/base.py --config.data.folder=a",
        "python -m tests.benchmarks.nothing",
        "bash launch/nothing.sh",
    ],
)
def test_wrong_commands_are_reported(line):
    assert commands(f"```\n{line}\n```\n") == [line]
    assert len(problems(line)) == 1
