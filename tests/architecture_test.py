"""The directions of imports between rooms: an import goes down `LAYERS`, never up or sideways."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mert_jax"
# from the ground up; modules and rooms of one layer do not import each other
LAYERS = (
    ("errors", "constants", "hardware", "progress"),
    ("files", "sharding", "kernels"),
    ("tensors", "models"),
    ("teachers",),
    ("data", "checkpoints", "runtime"),
    ("pretraining", "extraction"),
    ("reporting", "synthetic"),
    ("tasks",),
    ("planning", "fitting", "probing"),
    ("cli",),
)
COMMANDS = (
    *("train", "prepare", "fit_teacher", "convert", "extract", "probe", "plan"),
    *("report", "make_tasks", "__main__", "__init__"),
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}


def imports() -> list[tuple[str, str, str]]:
    """Every import of the package: the file it stands in, that file's room, the room imported."""
    rows = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        room = path.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            for name in names:
                if name.startswith("mert_jax."):
                    rows.append((str(path), room, name.split(".")[1]))
    return rows


def test_every_room_has_a_place():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert rooms == set(HEIGHT) | set(COMMANDS)


def test_imports_go_down():
    wrong = [
        f"{file}: {room} imports {other}"
        for file, room, other in imports()
        if room not in COMMANDS and other != room and HEIGHT.get(other, 99) >= HEIGHT[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_are_imported_by_none_and_cli_by_commands_only():
    wrong = [
        f"{file}: {room} imports {other}"
        for file, room, other in imports()
        if room != "__main__" and (other in COMMANDS or (other == "cli" and room not in COMMANDS))
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mert_jax"):
                module = node.module.removeprefix("mert_jax").lstrip(".")
                for each in node.names:
                    inner = f"{module}.{each.name}".lstrip(".")
                    path = PACKAGE / inner.replace(".", "/")
                    is_module = path.with_suffix(".py").exists() or path.is_dir()
                    graph[name].add(inner if is_module else module)
    remaining = dict(graph)
    while leaves := [
        name for name, used in remaining.items() if not used & remaining.keys() - {name}
    ]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"circle among {sorted(remaining)}"
