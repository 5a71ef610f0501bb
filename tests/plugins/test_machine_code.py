"""The machine code in the installed plugin library: the registers it takes, and the units that it was written for.

ptxas may take a kernel and quietly keep its sums in memory, or make other instructions of a product than were meant. A
slow kernel is right, so no other test sees it. Here each kernel of each architecture is read with NVIDIA's own tools.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from shuntyard.plugins.library import build_info, library_path
from tests.plugins.native_build import NATIVE, find_tool


@dataclass(frozen=True)
class Kernel:
    """One kernel's code for one architecture. ``name`` is mangled, ``opcodes`` are with all suffixes."""

    name: str
    architecture: int
    registers: int
    stack: int
    local: int
    opcodes: frozenset[str] = frozenset()


# -- what is expected

ANY_PRODUCT = r"[A-Z]*MMA\b.*"  # QGMMA and HGMMA too
HOPPERS_OWN = (r"[A-Z]GMMA\b.*", r"UTMA.*", r"SYNCS\b.*", r"USETMAXREG\b.*")
ASYNCHRONOUS = (r"UTMALDG\.2D", r"SYNCS\.ARRIVE\b.*", r"SYNCS\.PHASECHK\b.*", r"USETMAXREG\b.*")
E4M3_WIDE, E4M3 = r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3", r"QMMA\.16832\.F32\.E4M3\.E4M3"
HALF_WIDE, HALF = r"HGMMA\.64x\d+x16\.F32", r"HMMA\.16816\.F32"
BFLOAT_WIDE, BFLOAT = HALF_WIDE + r"\.BF16", HALF + r"\.BF16"


@dataclass(frozen=True)
class Family:
    """A row of the table: which kernels, from which file, and what their code must and must not have.

    ``name`` is searched in mangled names. ``threads`` of a block bound the registers, if one block is to fit. ``uses``
    and ``never`` hold, for an architecture, patterns of whole opcodes.
    """

    title: str
    name: str
    source: str | None
    threads: int | None = None
    uses: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    never: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def hopper(title: str, name: str, source: str, product: str, others: tuple[str, ...]) -> Family:
    """Kernels that are there on 9.0, and compiled to nothing elsewhere."""
    nothing = (*HOPPERS_OWN, ANY_PRODUCT)
    uses = {90: (product, *ASYNCHRONOUS)}
    return Family(title, rf"\d+hopper_product.*{name}", source, 384, uses, {89: nothing, 90: others, 120: nothing})


def mixed(title: str, name: str, source: str, product: str, other: str) -> Family:
    """The same, with weights that become 16-bit in registers."""
    row = hopper(title, name, source, product, (other, r"QG?MMA.*", r"HMMA.*"))
    return replace(row, name=rf"\d+hopper_mixed.*{name}")


def direct(title: str, name: str, source: str, product: str, others: tuple[str, ...]) -> Family:
    """Kernels of mma.sync with 16-bit operands, which every architecture has."""
    uses, never = (dict.fromkeys((89, 90, 120), value) for value in ((product,), (*HOPPERS_OWN, *others)))
    return Family(title, rf"\d+direct_kernel.*{name}", source, 256, uses, never)


HALF_X, BFLOAT_X = "DirectFormatINS_4HalfE", "DirectFormatINS_6BfloatE"
FORMS = {"along_k": "E1E", "along_n": "E2E", "e4m3": "E3E", "int4": "E4E"}  # of enum DirectForm

# The first row whose name fits is a kernel's own.
TABLE = (
    hopper("Hopper, E4M3", "OperandE2E", "hopper_codes", E4M3_WIDE, (HALF_WIDE, BFLOAT_WIDE, r"[HQ]MMA.*")),
    hopper("Hopper, fp16", "OperandE0E", "hopper_half", HALF_WIDE, (r"QG?MMA.*", BFLOAT_WIDE, r"HMMA.*")),
    hopper("Hopper, bf16", "OperandE1E", "hopper_bfloat", BFLOAT_WIDE, (r"QG?MMA.*", HALF_WIDE, r"HMMA.*")),
    mixed("Hopper, weights to fp16", "MixedConfigINS_4HalfE", "hopper_mixed_half", HALF_WIDE, BFLOAT_WIDE),
    mixed("Hopper, weights to bf16", "MixedConfigINS_6BfloatE", "hopper_mixed_bfloat", BFLOAT_WIDE, HALF_WIDE),
    # 9.0 has no FP8 product for one warp: ptxas turns the codes into fp16, which is exact, and makes two of fp16.
    Family(
        "direct, E4M3 codes",
        r"\d+direct_kernel.*DirectFormE5E",
        "direct_codes",
        256,
        {89: (E4M3,), 90: (HALF, r"F2FP\.F16\.E4M3\.UNPACK_B"), 120: (E4M3,)},
        {89: (*HOPPERS_OWN, r"HMMA.*"), 90: (*HOPPERS_OWN, BFLOAT), 120: (*HOPPERS_OWN, r"HMMA.*")},
    ),
    *(
        direct(f"direct, {form}, {kind}", f"{x}LNS_10DirectForm{code}", f"direct_{form}", product, (r"QMMA.*", other))
        for form, code in FORMS.items()
        for kind, x, product, other in (("fp16", HALF_X, HALF, BFLOAT), ("bf16", BFLOAT_X, BFLOAT, HALF))
    ),
    Family("prepare", r"\d+prepare_rows", "prepare", 128, never=dict.fromkeys((89, 90, 120), (ANY_PRODUCT,))),
    Family("all others", "", None, None, never=dict.fromkeys((89, 90, 120), (ANY_PRODUCT, *HOPPERS_OWN[:2]))),
)


def family_of(kernel: Kernel) -> Family:
    return next(family for family in TABLE if re.search(family.name, kernel.name))


def problems(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel's code, by the table."""
    family = family_of(kernel)
    where = f"{family.title}, sm_{kernel.architecture}, {kernel.name}"
    if kernel.stack or kernel.local:
        yield f"{where}: spills, or has arrays in memory: stack {kernel.stack} B, local {kernel.local} B"
    if family.threads and kernel.registers > (most := min(65536 // family.threads // 8 * 8, 255)):
        yield f"{where}: {kernel.registers} registers, of which a block of {family.threads} threads has {most} each"
    for pattern in family.uses.get(kernel.architecture, ()):
        if not any(re.fullmatch(pattern, opcode) for opcode in kernel.opcodes):
            yield f"{where}: has no {pattern}"
    for pattern in family.never.get(kernel.architecture, ()):
        if found := sorted(opcode for opcode in kernel.opcodes if re.fullmatch(pattern, opcode)):
            yield f"{where}: has {', '.join(found)}"


# -- reading


def nvidia_tool(name: str) -> str | None:
    """A program of pip's package ``nvidia-cuda-NAME``, which has it outside of PATH, else of PATH."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == name), None) or find_tool(name)


@dataclass(frozen=True)
class Tools:
    """NVIDIA's programs that read machine code."""

    cuobjdump: str
    nvdisasm: str

    @staticmethod
    def run(*command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def tools() -> Tools:
    found = {name: nvidia_tool(name) for name in ("cuobjdump", "nvdisasm")}
    if missing := [f"nvidia-cuda-{name}" for name, path in found.items() if path is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return Tools(str(found["cuobjdump"]), str(found["nvdisasm"]))


def resources_in(text: str) -> list[Kernel]:
    """Kernels in what ``cuobjdump --dump-resource-usage`` prints."""
    found = []
    architecture = 0
    pattern = r"^arch = sm_(\d+)|^ Function (\S+):\n +REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for sm, name, registers, stack, local in re.findall(pattern, text, re.M):
        if sm:
            architecture = int(sm)
        else:
            found.append(Kernel(name, architecture, int(registers), int(stack), int(local)))
    return found


def opcodes_in(text: str) -> dict[str, frozenset[str]]:
    """Opcodes by kernel, in what ``nvdisasm -c`` prints; functions that a kernel calls count as its own."""
    found: dict[str, set[str]] = {}
    own: set[str] = set()
    pattern = r"^\.text\.(\S+):|^ +/\*[0-9a-f]+\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)"
    for match in re.finditer(pattern, text, re.M):
        if match[1]:
            own = found.setdefault(match[1], set())
        else:
            own.add(match[2])
    return {name: frozenset(opcodes) for name, opcodes in found.items()}


def kernels_of(tools: Tools, path: Path, scratch: Path) -> list[Kernel]:
    tools.run(tools.cuobjdump, "-xelf", "all", str(path), cwd=scratch)  # one file for each source and architecture
    files = sorted(scratch.glob("*.cubin"))
    assert files

    def read(file: Path) -> dict[tuple[str, int], frozenset[str]]:
        match = re.search(r"\.sm_(\d+)[af]?$", file.stem)
        assert match, file
        code = opcodes_in(tools.run(tools.nvdisasm, "-c", "-ndf", str(file)))
        return {(name, int(match[1])): opcodes for name, opcodes in code.items()}

    with ThreadPoolExecutor(2) as pool:
        opcodes = {kernel: found for read_one in pool.map(read, files) for kernel, found in read_one.items()}
    kernels = resources_in(tools.run(tools.cuobjdump, "--dump-resource-usage", str(path)))
    return [replace(kernel, opcodes=opcodes[kernel.name, kernel.architecture]) for kernel in kernels]


# -- the installed library


@pytest.fixture(scope="module")
def kernels(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    if build_info(library_path()).cuda is None:
        pytest.skip("the library was built without CUDA kernels")
    return kernels_of(tools, library_path(), tmp_path_factory.mktemp("cubins"))


def test_code_is_as_the_table_says(kernels: list[Kernel]) -> None:
    found = [problem for kernel in kernels for problem in problems(kernel)]
    assert not found, f"{len(found)} of {len(kernels)} kernels:\n" + "\n".join(found)


def test_each_row_has_kernels_for_each_architecture(kernels: list[Kernel]) -> None:
    built = set(re.findall(r"\bkernels/(\w+)\.cu\b", (NATIVE / "CMakeLists.txt").read_text()))
    seen = {(family_of(kernel).title, kernel.architecture) for kernel in kernels}
    rows = [family for family in TABLE if family.source is None or family.source in built]
    expected = {(family.title, sm) for family in rows for sm in build_info(library_path()).architectures}
    assert expected <= seen, expected - seen
    assert all(kernel.opcodes for kernel in kernels)


# -- the checks themselves

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5firstv:
  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6secondv:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
\t.section\t.text._Z5firstv,"ax",@progbits
.text._Z5firstv:
        .type           _Z5firstv,@function
_Z5firstv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P1 BRA `(.L_x_0) ;
        /*1f020*/             @UP0 UTMALDG.2D [UR8], [UR4] ;
.text._Z6secondv:
        /*0000*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
"""


def test_reads_what_the_tools_print() -> None:
    assert resources_in(RESOURCES) == [Kernel("_Z5firstv", 90, 168, 16, 8), Kernel("_Z6secondv", 90, 24, 0, 0)]
    assert opcodes_in(SASS) == {
        "_Z5firstv": {"LDC", "BRA", "UTMALDG.2D"},
        "_Z6secondv": {"QGMMA.64x64x32.F32.E4M3.E4M3"},
    }


ALL_OF_HOPPER = {"UTMALDG.2D", "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "USETMAXREG.DEALLOC.CTAPOOL"}
CODES = "_ZN9shuntyard14hopper_productINS_12HopperConfigINS_4HalfELNS_7OperandE2ELNS_5MajorE0ELi64EEEEE"
ON_HOPPER = Kernel(CODES, 90, 168, 0, 0, frozenset({"QGMMA.64x64x32.F32.E4M3.E4M3", *ALL_OF_HOPPER}))
ELSEWHERE = Kernel(CODES, 89, 4, 0, 0, frozenset({"EXIT"}))
HALF_ROWS = replace(ON_HOPPER, name=CODES.replace("OperandE2", "OperandE0"))
HALF_ROWS = replace(HALF_ROWS, opcodes=frozenset({"HGMMA.64x256x16.F32", *ALL_OF_HOPPER}))
DIRECT = "_ZN9shuntyard13direct_kernelINS_10DirectPlanINS_12DirectFormatINS_6BfloatELNS_10DirectFormE{}ELi2EEELi8EEEEE"
DIRECT_CODES = Kernel(DIRECT.format(5), 89, 128, 0, 0, frozenset({"QMMA.16832.F32.E4M3.E4M3"}))
DIRECT_INT4 = Kernel(DIRECT.format(4), 120, 128, 0, 0, frozenset({"HMMA.16816.F32.BF16"}))
PLAIN = Kernel("_ZN9shuntyard6swigluIfffEEvPKT1_", 120, 40, 0, 0, frozenset({"FFMA"}))

PLANTED = {
    "a spill": (replace(ON_HOPPER, stack=8), "Hopper, E4M3, .*: spills"),
    "local memory": (replace(PLAIN, local=4), "all others, .*: spills"),
    "too many registers": (replace(ON_HOPPER, registers=169), "169 registers"),
    "no product": (replace(ON_HOPPER, opcodes=frozenset(ALL_OF_HOPPER)), "has no QGMMA"),
    "a product of fp16": (replace(ON_HOPPER, opcodes=HALF_ROWS.opcodes), "has HGMMA.64x256x16.F32"),
    "one warp's product": (replace(HALF_ROWS, opcodes=HALF_ROWS.opcodes | {"HMMA.16816.F32"}), "has HMMA"),
    "bf16 for fp16": (replace(HALF_ROWS, opcodes=frozenset({"HGMMA.64x256x16.F32.BF16", *ALL_OF_HOPPER})), "has no HG"),
    "Hopper's on Ada": (replace(ELSEWHERE, opcodes=frozenset({"SYNCS.EXCH.64"})), "has SYNCS.EXCH.64"),
    "a product on Blackwell": (replace(ELSEWHERE, architecture=120, opcodes=DIRECT_CODES.opcodes), "has QMMA"),
    "codes as fp16": (replace(DIRECT_CODES, opcodes=frozenset({"HMMA.16816.F32"})), "has HMMA.16816.F32"),
    "codes by FFMA": (replace(DIRECT_CODES, opcodes=PLAIN.opcodes), "has no QMMA"),
    "INT4 as fp16": (replace(DIRECT_INT4, opcodes=frozenset({"HMMA.16816.F32"})), "has no HMMA"),
    "a kernel renamed": (replace(ON_HOPPER, name="_Z5otherv"), "all others, .*: has QGMMA"),
    **{
        f"no {opcode}": (replace(ON_HOPPER, opcodes=ON_HOPPER.opcodes - {opcode}), f"has no {opcode.split('.')[0]}")
        for opcode in sorted(ALL_OF_HOPPER)
    },
}


@pytest.mark.parametrize("good", [ON_HOPPER, ELSEWHERE, HALF_ROWS, DIRECT_CODES, DIRECT_INT4, PLAIN])
def test_nothing_is_found_in_good_code(good: Kernel) -> None:
    assert list(problems(good)) == []


@pytest.mark.parametrize("name", PLANTED)
def test_finds_planted(name: str) -> None:
    kernel, message = PLANTED[name]
    found = list(problems(kernel))
    assert any(re.search(message, problem) for problem in found), found


SPOILED = """
#include <cstdint>
namespace shuntyard {
enum class Operand { kHalf, kBfloat, kE4m3 };
template <Operand kOperand>
__global__ void hopper_product(uint32_t* values, int place) {
    uint32_t kept[32];
    for (int i = 0; i < 32; ++i) kept[i] = values[i];
    for (int i = 0; i < 32; ++i) values[i] = kept[(place + i * place) & 31];
}
template <Operand kOperand>
__global__ void direct_kernel(float* d, const uint32_t* a) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                 "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
}
template __global__ void hopper_product<Operand::kE4m3>(uint32_t*, int);
template __global__ void direct_kernel<Operand::kE4m3>(float*, const uint32_t*);
}
"""


def test_finds_what_a_compiler_made(tools: Tools, tmp_path: Path) -> None:
    """An array that is indexed, and no product, from source to finding; and what mma.sync of E4M3 becomes."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not in PATH")
    (tmp_path / "spoiled.cu").write_text(SPOILED)
    codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in ("89", "90a", "120")]
    command = [nvcc, "-std=c++17", "-O3", *codes, "-c", "spoiled.cu", "-o", "spoiled.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {
        (kernel.name, kernel.architecture): kernel for kernel in kernels_of(tools, tmp_path / "spoiled.o", tmp_path)
    }
    assert len(made) == 6
    for (name, architecture), kernel in made.items():
        found = " ".join(problems(kernel))
        if "hopper_product" in name:
            assert "spills" in found and ("has no QGMMA" in found) == (architecture == 90), found
        else:
            assert any(re.fullmatch(HALF if architecture == 90 else E4M3, opcode) for opcode in kernel.opcodes), kernel


# -- how the build calls nvcc


def cmake_script(*arguments: str) -> tuple[int, str, str]:
    cmake = find_tool("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    done = subprocess.run([cmake, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        ("89;90;120", ["compute_89,code=sm_89", "compute_90a,code=sm_90a", "compute_120,code=sm_120"]),
        ("90", ["compute_90a,code=sm_90a"]),
        ("89;90", ["compute_89,code=sm_89", "compute_90a,code=sm_90a"]),
    ],
)
def test_hopper_is_compiled_with_all_that_it_has(tmp_path: Path, architectures: str, flags: list[str]) -> None:
    """PTX is never of 90a, which no later GPU could take."""
    script = tmp_path / "gencode.cmake"
    script.write_text(f'include({NATIVE}/cmake/nvcc.cmake)\nshuntyard_gencode(flags)\nmessage(STATUS "${{flags}}")\n')
    status, output, errors = cmake_script(f"-DSHUNTYARD_CUDA_ARCHITECTURES={architectures}", "-P", str(script))
    last = architectures.split(";")[-1]
    assert status == 0, errors
    assert re.findall(r"arch=([^;\s]+)", output) == [*flags, f"compute_{last},code=compute_{last}"]


REPORT = (
    "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\n"
    "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info    : Used 168 registers, used 1 barriers\n"
)


@pytest.mark.parametrize("status", [0, 3])
def test_ptxas_report_is_kept_and_the_rest_shown(tmp_path: Path, status: int) -> None:
    report = tmp_path / "k.ptxas.txt"
    said = REPORT + 'k.cu(1): warning #177-D: variable; "x" was declared\n'
    program = f"import sys; print({said!r}, end='', file=sys.stderr); sys.exit({status})"
    compile_script = str(NATIVE / "cmake" / "compile.cmake")
    got, _, errors = cmake_script(f"-DREPORT={report}", "-P", compile_script, "--", sys.executable, "-c", program)
    assert (got != 0) == (status != 0)
    assert "warning #177-D" in errors and "registers" not in errors
    assert report.exists() == (status == 0)
    if status == 0:
        assert report.read_text() == REPORT
