"""Files of torch.save: reading torch's and fairseq's, refusing code, and writing."""

import os
import pickle
import random
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mert_jax.checkpoints import fairseq
from mert_jax.errors import UserError
from mert_jax.tensors import torch_pickle

# written by torch 2.13: state_dict.pt of x = torch.arange(12.).reshape(3, 4); fairseq_*.pt with the
# settings as omegaconf 2.0.6 and 2.3.0 (enum, List, Optional, structured) and argparse keep them
FILES = Path(__file__).parents[1] / "torch_files"
X = np.arange(12, dtype=np.float32).reshape(3, 4)
STATE = {
    "float": X,
    "transposed": X.T,
    "slice": X[1:, 1:3],
    "half": X.astype(np.float16),
    "bfloat16": X.astype(ml_dtypes.bfloat16),
    "double": X.astype(np.float64),
    "long": np.arange(3),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": X + 1,
}


def test_files_of_torch():
    read = torch_pickle.read_pickle(FILES / "state_dict.pt")
    assert list(read) == list(STATE)
    for key, x in STATE.items():
        assert read[key].dtype == x.dtype
        np.testing.assert_array_equal(read[key], x)


@pytest.mark.parametrize("missing", [1, 100, 700, 1500, 1790])
def test_a_file_cut_short(tmp_path, missing):
    content = (FILES / "state_dict.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:-missing])
    with pytest.raises(UserError, match=r"cut\.pt"):
        torch_pickle.read_pickle(tmp_path / "cut.pt")


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{", b"not a file of tensors at all"])
def test_files_of_something_else(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pt"):
        torch_pickle.read_pickle(tmp_path / "model.pt")
    with pytest.raises(UserError, match="elsewhere"):
        torch_pickle.read_pickle(tmp_path / "elsewhere" / "model.pt")


@pytest.mark.parametrize("file", sorted(FILES.glob("*.pt")), ids=lambda file: file.stem)
def test_a_garbled_file_is_read_or_refused(tmp_path, file):
    rng, content, refused = random.Random(0), file.read_bytes(), 0
    for _ in range(300):
        garbled = bytearray(content)
        for _ in range(rng.choice([1, 2, 5])):
            garbled[rng.randrange(len(garbled))] = rng.randrange(256)
        (tmp_path / "garbled.pt").write_bytes(garbled)
        try:
            torch_pickle.read_pickle(tmp_path / "garbled.pt")
        except UserError:
            refused += 1
    assert refused > 100


# pickles that ask for more than tensors ----------------------------------------------------------


def save(path: str, pickled: bytes) -> str:
    """Write a torch file with the given pickle, and return its path."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


def text(x: str) -> bytes:
    return b"X" + len(x).to_bytes(4, "little") + x.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Return opcodes that push module.name(*arguments)."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x0ctQ"
STUB = b"cfairseq.data\nDictionary\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, in which code that ran would leave a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_refused_by_name(here, protocol):
    with pytest.raises(UserError, match=r"mkdir.*refused"):
        torch_pickle.read_pickle(save("bad.pt", pickle.dumps({"x": RunsCode()}, protocol)))
    assert os.listdir(here) == ["bad.pt"]


FUNCTIONS = [
    *("os.system", "posix.system", "nt.system", "subprocess.Popen", "shutil.rmtree", "pty.spawn"),
    *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.setattr", "builtins.open"),
    *("builtins.__import__", "builtins.compile", "__builtin__.eval", "__builtin__.getattr"),
    *("builtins.object", "builtins.bytearray", "builtins.map", "builtins.super"),
    *("operator.attrgetter", "operator.methodcaller", "_operator.itemgetter", "operator.getitem"),
    *("functools.partial", "functools.reduce", "importlib.import_module", "runpy.run_path"),
    *(
        "types.FunctionType",
        "types.CodeType",
        "marshal.loads",
        "pickle.loads",
        "copyreg.__newobj__",
    ),
    *("copyreg._reconstructor", "collections.namedtuple", "_codecs.decode", "codecs.encode"),
    *("numpy.load", "numpy.fromfile", "numpy.memmap", "numpy.core.multiarray._reconstruct"),
    *("numpy.ndarray", "numpy.distutils.exec_command.exec_command", "torch.load", "torch.hub.load"),
    *("torch.storage._load_from_bytes", "torch._utils._rebuild_tensor", "torch.jit.load"),
    *(
        "mert_jax.tensors.torch_pickle.read_pickle",
        "mert_jax.tensors.torch_pickle.Stub",
        "enum.Enum",
        "fairseqs.x",
    ),
    *("typing_extensions.get_type_hints", "argparser.x", "torch.FloatStorage.__class__"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_other_function_or_class_is_admitted(here, name):
    module, _, function = name.rpartition(".")
    if name.startswith("torch.Float"):
        module, function = "torch", "FloatStorage.__class__"
    asked = text(module) + text(function) + b"\x93"  # STACK_GLOBAL, whose names may have dots
    for opcodes in (asked, call(module, function, text("x"))):
        with pytest.raises(UserError, match=f"{function}.*refused"):
            torch_pickle.read_pickle(save("bad.pt", pickled(opcodes)))


@pytest.mark.parametrize(
    "opcodes",
    {
        "numbers of objects": call(
            "numpy", "_core.multiarray.scalar", call("numpy", "dtype", text("O8")), text("x" * 8)
        ),
        "defaults of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}"
        + text("__defaults__")
        + b")s\x86b",
        "attributes of a stub's class": STUB + b"}" + text("x") + b"K\x01sb",
        "slots of a stub's class": STUB + b"N}" + text("__call__") + STUB + b"s\x86b",
        "state of a dtype": b"ctorch\nFloatStorage\n(K\x03X\x01\0\0\0<NNNK\x08K\x08K\x3ftb",
        "state of a class": b"ccollections\nOrderedDict\n}" + text("x") + b"K\x01sb",
    }.items(),
    ids=lambda item: item[0],
)
def test_admitted_names_cannot_be_misused(here, opcodes):
    with pytest.raises(UserError, match=r"bad\.pt"):
        torch_pickle.read_pickle(save("bad.pt", pickled(opcodes[1])))
    assert torch_pickle._tensor.__defaults__ is None


@pytest.mark.parametrize(
    "opcodes",
    [
        call("__builtin__", "type", text("X"), b")", b"}"),
        call("builtins", "type", b"c__builtin__\nstr\n"),
        call("_operator", "getitem", b"}", b"K\x01"),
        call("_operator", "getitem", b"c__builtin__\nlist\n", b"N"),
    ],
)
def test_types_of_settings_are_inert(here, opcodes):
    assert type(torch_pickle.read_pickle(save("x.pt", pickled(opcodes)))) is torch_pickle.Stub


def members_of(file: Path) -> tuple[dict[str, bytes], str]:
    """Return the members of a zip, and the name of its pickle."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    return members, pickled


def zip_of(path: str | Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_the_memory_of_a_storage_cannot_be_swapped_below_its_tensors(here):
    members, name = members_of(FILES / "state_dict.pt")
    state = b"(K\x01K\x01\x85ctorch\nFloatStorage\n\x89" + text("\0" * 4) + b"t"
    zip_of("bad.pt", members | {name: pickled(STORAGE, state, b"b")})
    with pytest.raises(UserError, match="state of a ndarray; refused"):
        torch_pickle.read_pickle("bad.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    """Such a file could read memory outside of its tensors."""
    members, name = members_of(FILES / "state_dict.pt")
    shape = b"K\x03K\x04\x86"  # the tuple (3, 4)
    assert shape in members[name]
    members[name] = members[name].replace(shape, b"K\x63K\x04\x86", 1)
    zip_of(tmp_path / "forged.pt", members)
    with pytest.raises(UserError, match=r"forged\.pt"):
        torch_pickle.read_pickle(tmp_path / "forged.pt")


def test_big_endian_files_are_refused(here):
    with zipfile.ZipFile("big.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(UserError, match="byte order b'big'"):
        torch_pickle.read_pickle("big.pt")


# fairseq's objects -------------------------------------------------------------------------------

TRAP = """
open("ran", "w").close()

class Dictionary:
    def __new__(cls, *args):
        open("ran", "w").close()
        return super().__new__(cls)

    __init__ = __setstate__ = __call__ = __new__
"""


@pytest.mark.parametrize("package", ["fairseq", "mert_fairseq", "omegaconf"])
def test_nothing_of_an_installed_fairseq_is_run(here, monkeypatch, package):
    (here / f"{package}.py").write_text(TRAP)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, package, raising=False)
    class_ = f"c{package}\nDictionary\n".encode()
    state = b"}" + text("symbols") + b"]" + text("<s>") + b"asb"
    spellings = {
        "called": class_ + b"(K\x07tR" + state,
        "new": class_ + b")\x81" + state,
        "old": b"(" + f"i{package}\nDictionary\n".encode() + state,
    }
    for how, opcodes in spellings.items():
        stub = torch_pickle.read_pickle(save("run.pt", pickled(opcodes)))
        assert isinstance(stub, torch_pickle.Stub)
        assert type(stub).__name__ == "Dictionary"
        assert stub.symbols == ["<s>"]
        assert stub.args == ((7,) if how == "called" else ())
    assert package not in sys.modules
    assert sorted(os.listdir(here)) == sorted([f"{package}.py", "run.pt"])


def test_a_dotted_name_in_an_admitted_package_leads_nowhere(here):
    asked = text("argparse") + text("_sys.modules") + b"\x93"
    content = torch_pickle.read_pickle(save("x.pt", pickled(asked, b")R")))
    assert isinstance(content, torch_pickle.Stub)


SETTINGS = {
    "_name": "mert",
    "extractor_mode": "default",
    "encoder_layers": 1,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 4,
    "layer_norm_first": True,
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)]",
    "final_dim": 4,
    "untie_final_proj": True,
    "latent_temp": [2.0, 0.5],
}


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_settings_of_omegaconf(version):
    content = torch_pickle.read_pickle(FILES / f"fairseq_omegaconf_{version}.pt")
    assert isinstance(content["cfg"], torch_pickle.Stub)
    assert content["args"] is None
    assert fairseq.plain(content["cfg"]) == {
        "model": SETTINGS,
        "task": {
            "_name": "mert_pretraining",
            "labels": ["encodec_0", "encodec_1"],
            "sample_rate": 24000,
            "normalize": False,
            "max_keep_size": None,
        },
        "extra": {},
    }
    assert content["extra_state"] == {"best": 3.5, "epoch": 2}
    (dictionary,) = content["task_state"]["dictionaries"]
    assert dictionary.symbols == "<s> <pad> </s> <unk> 2 0 1".split()
    np.testing.assert_array_equal(content["model"]["x"], [0, 1, 2])


def test_settings_of_argparse():
    content = torch_pickle.read_pickle(FILES / "fairseq_namespace.pt")
    expected = SETTINGS | {"sample_rate": 24000, "normalize": False}
    assert fairseq.plain(content["args"]) == expected
    assert fairseq.plain(content["cfg"]) is None


# writing -----------------------------------------------------------------------------------------


def there_and_back(path, content):
    torch_pickle.write_pickle(path, content)
    return torch_pickle.read_pickle(path)


@pytest.mark.parametrize("name", torch_pickle.STORAGES)
def test_tensors_of_every_dtype_and_layout_come_back(tmp_path, name):
    x = np.arange(24).reshape(2, 3, 4).astype(torch_pickle.STORAGES[name])
    tensors = {
        "all": x,
        "transposed": x.T,
        "swapped": x.swapaxes(0, 1),
        "slice": x[:, ::2, 1:3],
        "backwards": x[::-1],
        "broadcast": np.broadcast_to(x[0, 0, :1], (5, 3)),
        "number": np.array(x[1, 2, 3]),
        "empty": x[:0],
        "twice": x,
    }
    read = there_and_back(tmp_path / "x.pt", tensors)
    assert list(read) == list(tensors)
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert read[key].shape == tensor.shape
        np.testing.assert_array_equal(read[key], tensor)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(TEXT | st.integers(0, 2**40), inner)
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    """Return True if values and types are equal at every level: 1 is neither True nor 1.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and str(a) == str(b)


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_containers_and_values_come_back(tmp_path_factory, content):
    assert same(there_and_back(tmp_path_factory.getbasetemp() / "plain.pt", content), content)


def test_similar_values_stay_distinct(tmp_path):
    content = {
        "ints": [0, 1, -1, 255, 256, 2**31, -(2**31) - 1, 2**63, -(2**63), 5_000_000_000],
        "bools": (True, False),
        "floats": [0.0, -0.0, 1.0, 1e300, float("inf"), 0.1],
        1: {True: None, "": "ünï → 音", "nested": [[], {}, (), ([{}],)]},
    }
    assert same(there_and_back(tmp_path / "x.pt", content), content)


def test_equal_content_gives_equal_bytes(tmp_path, monkeypatch):
    content = {"a": X, "b": [1, {"c": X.T}], "d": "e"}
    torch_pickle.write_pickle(tmp_path / "one.pt", content)
    monkeypatch.setattr("time.time", lambda: 2e9)
    copied = {"a": X.copy(), "b": [1, {"c": np.ascontiguousarray(X.T)}], "d": "e"}
    torch_pickle.write_pickle(tmp_path / "two.pt", copied)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize(
    "x", [{1, 2}, object(), b"bytes", 1j, np.float32(1), Path("x"), len, np.zeros(2, np.uint16)]
)
def test_other_types_cannot_be_written(tmp_path, x):
    with pytest.raises(TypeError, match="no place in a torch file"):
        torch_pickle.write_pickle(tmp_path / "x.pt", {"a": [x]})


@pytest.mark.peers
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_written_files(tmp_path, mmap):
    torch = pytest.importorskip("torch", reason="torch is missing; pip install mert_jax[peers]")
    values = {"n": [5_000_000_000, -1, True, None, 0.1, "音"], "t": (1, {"a": []}), 0: {}}
    torch_pickle.write_pickle(tmp_path / "x.pt", {"state": STATE, "values": values})
    read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert same(read["values"], values)
    assert list(read["state"]) == list(STATE)
    for key, x in STATE.items():
        tensor = read["state"][key]
        assert str(tensor.dtype) == f"torch.{x.dtype.name}"
        assert tensor.shape == x.shape
        np.testing.assert_array_equal(tensor.double().numpy(), x.astype(np.float64))
