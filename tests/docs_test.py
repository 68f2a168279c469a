"""README.md and docs/: links resolve, commands parse, and the README stays one page."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
END_OF_FLAGS = ("--", ">", "&&")


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
    """Command lines in fenced blocks and in `code` spans, with continued lines joined."""
    fence = r"^```\w*\n(.*?)^```"
    blocks = "\n".join(re.findall(fence, text, re.M | re.S)).replace("\\\n", " ")
    spans = re.findall(r"`([^`]+)`", re.sub(fence, "", text, flags=re.M | re.S))
    lines = [*blocks.splitlines(), *(" ".join(span.split()) for span in spans)]
    return [line for line in lines if re.search(r"python -m |(bash|sbatch) .*launch/", line)]


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


def source_of(module: str) -> Path:
    """The file that `python -m MODULE` runs."""
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def known_flags(module: str) -> set[str]:
    """The names of the flags of a command, or of a benchmark."""
    if module.startswith("tests."):
        source = source_of(module).read_text()
        return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))
    return set(importlib.import_module(module).FLAGS)


def flag_problems(words: list[str], known: set[str]) -> list[str]:
    """Unknown flags and config keys among the words of a command line."""
    configs = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    wrong = [f"no config {name}" for name in configs if not (ROOT / name.split(":")[0]).exists()]
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if name.startswith("config."):
            config = (configs or ["configs/base.py"])[0]
            if not wrong and not has_key(config_of(config), name):
                wrong.append(f"no config key {name}")
        elif word.startswith("--") and name not in known:
            wrong.append(f"no flag {word}")
    return wrong


def problems(line: str) -> list[str]:
    """Errors of a command line: missing module, script or test, unknown flag or config key."""
    words = [word for word in shlex.split(line, comments=True) if not word.endswith("...")]
    if "python" not in words:  # a script, which may hand flags on to train
        at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        script = ROOT / words[at]
        if not script.exists():
            return [f"no script {words[at]}"]
        own = set(re.findall(r"--([\w-]+)", script.read_text()))
        return flag_problems(words[at + 1 :], own | known_flags("mert_jax.train"))
    at = words.index("python") + 2
    module, arguments = words[at], words[at + 1 :]
    for end in END_OF_FLAGS:
        arguments = arguments[: arguments.index(end)] if end in arguments else arguments
    if module == "pytest":
        tests = [word for word in arguments if word.startswith("tests/")]
        return [f"no test {test}" for test in tests if not (ROOT / test).exists()]
    if not source_of(module).exists():
        return [f"no module {module}"]
    if module.startswith("mert_jax.") and (loose := [x for x in arguments if x[0] != "-"]):
        return [f"{module} takes no argument {loose[0]}"]
    return flag_problems(arguments, known_flags(module))


def missing_files(text: str) -> list[str]:
    """Files of the repository that a page names and that do not exist."""
    named = re.findall(r"`((?:configs|launch|tests|mert_jax|docs)/[\w./-]+)", text)
    tests = re.findall(r"`((?:\w+/)*\w+_test\.py)`", text)
    places = [(ROOT, name.rstrip(".")) for name in named]
    places += [(ROOT / "tests", name.removeprefix("tests/")) for name in tests]
    return [name for folder, name in places if not (folder / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_shown_commands_parse():
    lines = [line for page in PAGES for line in commands(page.read_text())]
    assert len(lines) > 20
    assert {line: wrong for line in lines if (wrong := problems(line))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    assert missing_files(page.read_text()) == []


def test_the_readme_is_one_page():
    assert len(PAGES[0].read_text().splitlines()) <= 150


def test_broken_links_are_reported():
    text = "[a](docs/data.md) [b](docs/none.md) [c](README.md#nothing) [d](https://example.org)"
    assert broken_links(PAGES[0], text) == ["docs/none.md", "README.md#nothing"]


def test_missing_files_are_reported():
    text = "`configs/tiny.py:small`, `configs/none.py`, `data/prepare_test.py` and `none_test.py`"
    assert missing_files(text) == ["configs/none.py", "none_test.py"]


@pytest.mark.parametrize(
    "line",
    [
        "python -m mert_jax.nothing --input=a",
        "python -m mert_jax.prepare --inputs=a --output=b",
        "python -m mert_jax.prepare a",
        "python -m mert_jax.train --config=configs/base.py --config.data.folder=a",
        "python -m mert_jax.train --config=configs/nothing.py",
        "python -m tests.benchmarks.nothing",
        "python -m tests.benchmarks --nothing=a",
        "python -m pytest tests/nothing_test.py",
        "bash launch/nothing.sh",
        "TPU=NAME bash launch/tpu_vm.sh --nothing",
    ],
)
def test_wrong_commands_are_reported(line):
    assert commands(f"```\n{line}\n```\n") == commands(f"Run `{line}`.") == [line]
    assert len(problems(line)) == 1
