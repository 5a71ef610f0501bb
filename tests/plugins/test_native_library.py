"""The installed plugin library, and what its sources declare: the contract's names, TensorRT's binary interface."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import shuntyard
from shuntyard.errors import EngineError
from shuntyard.plugins import contract
from shuntyard.plugins.library import build_info, library_path
from tests.plugins.native_build import NATIVE, CMakeBuild, find_tool


@pytest.fixture(scope="module")
def library() -> Path:
    return library_path()


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the installed library


def test_says_what_it_was_built_from(library: Path) -> None:
    info = build_info(library)
    assert info.version == shuntyard.__version__
    header = library.with_name("shuntyard_plugins.h").read_text()
    assert header == (NATIVE / "shuntyard_plugins.h").read_text()
    (abi_version,) = re.findall(r"^#define SHUNTYARD_ABI_VERSION (\d+)$", header, re.M)
    assert info.abi_version == int(abi_version)
    assert info.cuda_source in {"machine", "pip", "off"}
    assert (info.cuda is None) == (info.cuda_source == "off") == (info.architectures == ())


def test_something_else_is_no_plugin_library(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(EngineError, match="no plugin library of shuntyard"):
        build_info(other)


def test_exports_its_interface_only(library: Path) -> None:
    nm = find_tool("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    names = {line.split()[-1].partition("@")[0] for line in run(nm, "-D", "--defined-only", str(library)).splitlines()}
    declared = re.findall(r"^SHUNTYARD_API .*?(shuntyard_\w+)\(", (NATIVE / "shuntyard_plugins.h").read_text(), re.M)
    assert len(declared) == 10
    assert {"getCreators", "setLoggerFinder", *declared} <= names
    assert all(re.fullmatch(r"getCreators|setLoggerFinder|shuntyard_\w+", name) for name in names), names


def test_loads_without_cuda_and_tensorrt(library: Path) -> None:
    """In a process of its own: what has been loaded with it shows in the memory map."""
    script = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], os.RTLD_NOW); print(open('/proc/self/maps').read())"
    maps = run(sys.executable, "-c", script, str(library))
    assert library.name in maps
    assert not re.findall(r"lib(?:cuda|cudart|nvinfer|nvrtc|tensorrt)\S*", maps)


def fatbin_code(content: bytes) -> tuple[set[int], set[int]]:
    """Compute capabilities of the machine code and of the PTX in a library, from the fatbins that nvcc embeds.

    A fatbin is a header (magic, version, size of the header, size of what follows) and entries, each with a header
    (kind: 1 PTX, 2 machine code; its own size at 4, the payload's at 8, the compute capability at 28) and a payload.
    """
    found: tuple[set[int], set[int]] = (set(), set())
    for match in re.finditer(re.escape(struct.pack("<IH", 0xBA55ED50, 1)), content):
        header_size, size = struct.unpack_from("<HQ", content, match.end())
        place = match.start() + header_size
        end = place + size
        while place < end:
            kind, _, header_size, payload_size = struct.unpack_from("<HHIQ", content, place)
            (architecture,) = struct.unpack_from("<I", content, place + 28)
            assert kind in {1, 2} and header_size >= 32, (kind, header_size)
            found[kind == 1].add(architecture)
            place += header_size + payload_size
    return found


def test_holds_code_for_each_of_its_architectures(library: Path) -> None:
    info = build_info(library)
    if info.cuda is None:
        pytest.skip("the library was built without CUDA kernels")
    machine_code, ptx = fatbin_code(library.read_bytes())
    assert machine_code >= set(info.architectures)  # CUDA's runtime may bring code of its own
    assert info.architectures[-1] in ptx
    if cuobjdump := find_tool("cuobjdump"):
        listed = run(cuobjdump, "--list-elf", str(library))
        assert {int(number) for number in re.findall(r"sm_(\d+)", listed)} == machine_code


# -- the ops, as the plugins and the contract have them


class Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Fields(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field)))


class Creator(NamedTuple):
    """What a plugin creator says of itself."""

    name: str
    version: str
    namespace: str
    attributes: tuple[str, ...]


def creators_of(path: Path) -> list[Creator]:
    """Asks the creators of a library through their vtables, as TensorRT would; slots as in abi/plugin.h."""
    library = ctypes.CDLL(str(path))
    library.getCreators.restype = ctypes.POINTER(ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
    count = ctypes.c_int32()
    objects = library.getCreators(ctypes.byref(count))

    def ask(creator: Any, slot: int, result: Any) -> Any:
        return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(creator[0][slot])(ctypes.cast(creator, ctypes.c_void_p))

    creators = []
    for creator in objects[: count.value]:
        fields = ask(creator, 5, ctypes.POINTER(Fields)).contents
        attributes = tuple(fields.fields[i].name.decode() for i in range(fields.count))
        name, version, namespace = (ask(creator, slot, ctypes.c_char_p).decode() for slot in (6, 7, 8))
        creators.append(Creator(name, version, namespace, attributes))
    return creators


def test_creators_are_the_contracts_plugins(library: Path) -> None:
    version, namespace = contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE
    assert creators_of(library) == [
        Creator(op.name, version, namespace, (*op.attributes, *op.plugin_attributes)) for op in contract.PLUGINS
    ]


OP_TABLE = (NATIVE / "adapter" / "op.cpp").read_text()


def test_table_of_ops_is_the_contracts() -> None:
    """TensorRT binds tensors by position, so the order of names in the table is all that says what they are."""
    table = re.findall(
        r'^const Op \w+\{\s*"(\w+)",\s*\{(\{.*?\}\})\},\s*\{(\{.*?\}\})\},\s*\{([^}]*)\},\s*(\w+),\s*\w+_workspace',
        OP_TABLE,
        re.M | re.S,
    )
    rows = [
        (
            name,
            *(tuple(re.findall(r'\{"(\w+)"', tensors)) for tensors in both),
            tuple(re.findall(r'"(\w+)"', attributes)),
            has_weights == "true",
        )
        for name, *both, attributes, has_weights in table
    ]
    assert rows == [
        (op.name, op.inputs, op.outputs, (*op.attributes, *op.plugin_attributes), bool(op.variadic))
        for op in contract.PLUGINS
    ]


SYMBOLS = {"T": "Tokens", "E": "Experts", "H": "Hidden", "F": "Intermediate", "T*K": "Rows", "E+1": "Offsets"}
SYMBOLS |= {"2F": "TwiceIntermediate", "H/8": "HiddenWords", "F/8": "IntermediateWords"}


def extents_of(shape: str) -> list[str]:
    return [f"Extent::k{SYMBOLS[symbol]}" for symbol in shape.split(", ")]


def test_shapes_in_the_table_are_the_contracts() -> None:
    """The contract gives every tensor's shape once, in its text: ``name [A, B]`` or ``name type [A, B]``."""
    assert contract.__doc__ is not None
    for op in contract.PLUGINS:
        part = re.split(r"``(Shuntyard\w+)``", contract.__doc__)
        prose = part[part.index(op.name) + 1]
        (block,) = re.findall(rf'"{op.name}",(.*?)_workspace', OP_TABLE, re.S)
        for name in op.inputs if op is contract.EXPERTS else (*op.inputs, *op.outputs):
            (shape,) = re.findall(rf"\b{name}(?: \w+)? \[([^]]+)\]", prose)[:1]
            (extents,) = re.findall(rf'\{{"{name}", ElementType::\w+, \{{([^}}]*)\}}\}}', block)
            assert extents.split(", ") == extents_of(shape), (op.name, name)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_layouts_in_the_table_are_the_contracts(layout: str) -> None:
    """Names and shapes of the parts, against the contract's text and against the form that Python works with."""
    code = f"SHUNTYARD_{layout.upper()}"
    (table,) = re.findall(r"^const Layout\* find_layout.*?^\}", OP_TABLE, re.M | re.S)
    blocks = re.split(r'\{"(\w+)",\s*(SHUNTYARD_\w+),\s*(true|false),', table)
    name, found_code, each_expert, text = blocks[(place := blocks.index(layout)) : place + 4]
    assert (name, found_code) == (layout, code)
    parts = re.findall(r'\{"(\w+)", ElementType::kWeight, \{([^}]*)\}', text)
    form = contract.ExpertsForm(2, layout)
    assert (each_expert == "true") == (len(form.weight_names) > len(form.parts))
    assert tuple(name for name, _ in parts[: len(form.parts)]) == form.parts
    packed = parts[len(form.parts) :]
    assert tuple(name for name, _ in packed) == (form.parts if layout == "linear" else ())
    header = (NATIVE / "shuntyard_plugins.h").read_text()
    assert re.search(rf"{code} = {contract.LAYOUTS.index(layout)},", header)

    assert contract.__doc__ is not None
    (row,) = re.findall(rf"^ +``{layout}``(  ?[^ :].*)$", contract.__doc__, re.M)
    prose = dict(re.findall(r"(gate_up|gate|up|down) \[([^]]+)\]", row))
    assert {name: extents.split(", ") for name, extents in parts[: len(form.parts)]} == {
        name: extents_of(shape) for name, shape in prose.items()
    }
    sizes = {"Experts": 2, "Hidden": 16, "Intermediate": 24, "TwiceIntermediate": 48}
    sizes |= {"HiddenWords": 2, "IntermediateWords": 3}
    every = 2 if each_expert == "true" else 1
    for found, quantization in ((parts[: len(form.parts)], "none"), (packed, "group")):
        shapes = [tuple(sizes[e.removeprefix("Extent::k")] for e in extents.split(", ")) for _, extents in found]
        given = contract.ExpertsForm(2, layout, quantization, 8).weight_shapes(16, 24)
        assert not found or tuple(shape for shape in shapes for _ in range(every)) == given


def test_numbers_of_the_c_interface_are_the_contracts() -> None:
    header = (NATIVE / "shuntyard_plugins.h").read_text()
    names = ("UNSCALED", "PER_TENSOR", "PER_CHANNEL", "PER_GROUP")
    rows = ("AS_THEY_ARE", "STATIC", "DYNAMIC")
    for activations, name in zip(contract.ACTIVATIONS, rows, strict=True):
        assert re.search(rf"SHUNTYARD_{name} = {contract.ACTIVATIONS.index(activations)},", header), name
        code = f'{{"{activations}", SHUNTYARD_{name}}}'
        assert code in OP_TABLE
    for quantization, name in zip(contract.QUANTIZATIONS, names, strict=True):
        assert re.search(rf"SHUNTYARD_{name} = {contract.QUANTIZATIONS.index(quantization)},", header), name


# -- TensorRT's binary interface, as abi/ declares it

ABI_HEADERS = ("types", "shapes", "plugin", "logging")


class Imitation:
    """A header that stands for TensorRT's, made of our own declarations, and a build that checks against it."""

    def __init__(self, directory: Path) -> None:
        texts = [(NATIVE / "abi" / f"{name}.h").read_text() for name in ABI_HEADERS]
        self.text = re.sub(r'^#(pragma once|include "abi/.*")$', "", "\n".join(texts), flags=re.M)
        self.header = directory / "include" / "NvInferRuntime.h"
        self.header.parent.mkdir(parents=True)
        self.header.write_text(self.text)
        self.build = CMakeBuild(directory / "build", f"TENSORRT_INCLUDE_DIR={self.header.parent}")

    def check(self, text: str) -> tuple[int, str]:
        self.header.write_text(text)
        return self.build.build("shuntyard_abi_check")


@pytest.fixture(scope="module")
def imitation(tmp_path_factory: pytest.TempPathFactory) -> Imitation:
    return Imitation(tmp_path_factory.mktemp("abi"))


def test_abi_check_passes_what_is_the_same(imitation: Imitation) -> None:
    status, text = imitation.check(imitation.text)
    assert status == 0 and re.search(r"our plugin interface is TensorRT's in all \d+ points checked", text), text


METHOD = r"    virtual [^;]*? {}\([^;]*;\n"
PLANTED = {
    "two methods swapped": (
        f"({METHOD.format('attachToContext')})({METHOD.format('getFieldsToSerialize')})",
        r"\2\1",
        "slot v_1_0::IPluginV3OneRuntime::attachToContext",
    ),
    "two methods of one signature swapped": (
        f"({METHOD.format('getPluginName')})({METHOD.format('getPluginVersion')})(.*?class IPluginV3OneBuild)",
        r"\2\1\3",
        "slot v_1_0::IPluginV3OneCore::getPluginName",
    ),
    "a method appended": (
        r"(virtual char const\* getMetadataString\(\) noexcept \{ return nullptr; \})",
        r"\1 virtual int32_t more() noexcept { return 0; }",
        "end v_1_0::IPluginV3OneBuild",
    ),
    "a parameter widened": (
        r"setTactic\(int32_t\)",
        "setTactic(int64_t)",
        "slot v_1_0::IPluginV3OneRuntime::setTactic",
    ),
    "a version raised": (r'"PLUGIN_V3ONE_BUILD", 1, 0', '"PLUGIN_V3ONE_BUILD", 1, 1', "info v_1_0::IPluginV3OneBuild"),
    "an enumerator renumbered": (r"kBF16 = 7,", "kBF16 = 17,", "value DataType::kBF16"),
    "a field inserted": (r"(    float scale;)", r"    int64_t more;\n\1", "type PluginTensorDesc"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_abi_check_finds_a_planted_difference(imitation: Imitation, name: str) -> None:
    pattern, replacement, found = PLANTED[name]
    planted, count = re.subn(pattern, replacement, imitation.text, count=1, flags=re.S)
    assert count == 1 and planted != imitation.text
    status, text = imitation.check(planted)
    assert status != 0 and "our plugin interface is not TensorRT's" in text and f"theirs: {found}" in text, text


def test_headers_older_than_v3_plugins_do_not_stop_a_build(tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").write_text("class IPluginV2;\n")
    build = CMakeBuild(tmp_path / "build", f"TENSORRT_INCLUDE_DIR={tmp_path}")
    assert build.status == 0 and "has no V3 plugins" in build.configured
    assert build.build("shuntyard_abi_check")[0] != 0  # there is no such target


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        ("TENSORRT_INCLUDE_DIR=/nonexistent", "NvInferRuntime.h is not there"),
        ("SHUNTYARD_CUDA_ARCHITECTURES=90a", "must be numbers as 89 or 90;120"),
        ("SHUNTYARD_CUDA_ARCHITECTURES=", "must be numbers as 89 or 90;120"),
    ],
)
def test_configuring_refuses(tmp_path: Path, definition: str, problem: str) -> None:
    build = CMakeBuild(tmp_path, definition)
    assert build.status != 0 and problem in " ".join(build.configured.split()), build.configured


def test_abi_is_tensorrts(tmp_path: Path) -> None:
    build = CMakeBuild(tmp_path / "build")
    assert build.status == 0, build.configured
    if "is not checked against" in build.configured:
        pytest.skip("no headers of TensorRT 10 or later; configure with TENSORRT_INCLUDE_DIR to check against some")
    status, text = build.build("shuntyard_abi_check")
    assert status == 0 and "our plugin interface is TensorRT's in all" in text, text
