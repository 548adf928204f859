"""What the compiled row kernels ask of a GPU, counted in their machine code; no GPU is needed.

python benchmarks/sass.py [--arch sm_90] [--library pear_megatron/_C...so]

For the hot loop of each row kernel: instructions and exponentials per logit, bytes per access, registers, bytes of
loads in flight, and from these how busy the schedulers and each pipe would be if memory were the only limit, at nine
tenths of the data sheet's bandwidth. Shares well below 100 % mean that memory binds, as it should. What such
counts cannot tell stands in NOTES.md.

Needs cuobjdump and nvdisasm: the CUDA toolkit has them, and so has triton's wheel.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """Of a data sheet: multiprocessors, clock under load in Hz, nine tenths of the memory bandwidth in bytes/s."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    threads: int = 2048  # that a multiprocessor holds


CARDS = {
    "sm_80": Card("A100 SXM", 108, 1.41e9, 1.8e12),
    "sm_90": Card("H100 SXM", 132, 1.7e9, 3.0e12),
    "sm_100": Card("B200", 148, 1.85e9, 7.2e12),
    "sm_120": Card("RTX PRO 6000", 188, 2.3e9, 1.6e12, 1536),
}

# Lanes a clock of one multiprocessor (CUDA C++ programming guide, throughput of native arithmetic instructions).
SCHEDULED = 128  # four schedulers, one warp instruction each
LANES = {"exp": 16, "alu": 64, "fma": 128}
_FMA_OF_AMPERE = 64

_PIPES = {
    "exp": ("MUFU",),
    "fma": ("FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "FADD2", "FMUL2", "FFMA2"),
    "alu": (
        *("FMNMX", "FSEL", "FSETP", "ISETP", "IADD3", "LOP3", "SHF", "PRMT", "LEA", "SEL", "IMNMX", "VIMNMX", "VIADD"),
        *("FMNMX3", "VHMNMX"),
        *("F2FP", "PLOP3", "FCHK", "IABS", "MOV"),
    ),
    "memory": ("LDG", "STG", "LDS", "STS", "LDC", "ULDC"),
    "control": ("BRA", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "EXIT", "CALL", "RET", "YIELD"),
}  # fmt: skip
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_PAIRS = ("FADD2", "FMUL2", "FFMA2")  # of float32: twice the lanes of one

_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?(?P<op>[A-Z0-9_.]+)(?P<rest>[^;&?]*)"
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_ROW_KERNEL = re.compile(
    r"(?P<kernel>forward_rows|backward_rows)I(?:N3c10\d(?P<half>Half|BFloat16)E|f)Li(?P<threads>\d+)E(?P<more>(?:Lb\dE)*)"
)
_DTYPES = {"Half": "f16", "BFloat16": "bf16", None: "f32"}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        """Of _PIPES, or ``other``."""
        return _PIPE_OF.get(self.opcode.split(".")[0], "other")

    def loads(self) -> int:
        """Bytes that a lane loads from memory."""
        return _width(self.opcode) if self.opcode.startswith("LDG") else 0

    def stores(self) -> int:
        """Bytes that a lane stores to memory."""
        return _width(self.opcode) if self.opcode.startswith("STG") else 0


def _width(opcode: str) -> int:
    parts = opcode.split(".")
    return next((size for name, size in (("128", 16), ("64", 8), ("U16", 2), ("U8", 1)) if name in parts), 4)


@dataclass(frozen=True)
class Loop:
    """The hot loop of one kernel, per logit unless said otherwise.

    Attributes:
        kernel, dtype, threads: which; ``more`` are its other template arguments.
        elements: logits that a thread takes in one turn.
        instructions, exponentials: per logit.
        by_pipe: warp instructions of one turn.
        access: bytes of the widest load.
        registers: per thread.
        in_flight: bytes of loads that a multiprocessor has under way.
        issue, exp, alu, fma: share of each at the card's bandwidth.
    """

    kernel: str
    dtype: str
    threads: int
    more: str
    elements: int
    instructions: float
    exponentials: float
    by_pipe: dict[str, int]
    access: int
    registers: int
    in_flight: int
    issue: float
    exp: float
    alu: float
    fma: float


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm.

    Raises:
        FileNotFoundError: neither the toolkit nor triton has it.
    """
    if found := shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin"):
        return found
    try:
        import triton

        found = shutil.which(name, path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        found = None
    if not found:
        raise FileNotFoundError(f"no {name}: install the CUDA toolkit, or triton, whose wheel brings it")
    return found


def _dump(library: Path, arch: str, what: str) -> str:
    command = [tool("cuobjdump"), what, "-arch", arch, str(library)]
    path = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=path).stdout


def functions(library: Path, arch: str) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, instructions) of every kernel that the library has for an architecture."""
    name, code = "", []
    for line in _dump(library, arch, "-sass").splitlines():
        if found := _FUNCTION.search(line):
            if name:
                yield name, code
            name, code = found[1], []
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(int(found["at"], 16), found["op"], found["rest"].strip()))
    if name:
        yield name, code


def registers(library: Path, arch: str) -> dict[str, int]:
    """Mangled name -> registers per thread."""
    text = _dump(library, arch, "-res-usage")
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest loop that loads 16 bytes at a time, without the loops inside it; empty where there is none.

    Inside it is the search for the top-k's columns, which few turns make.
    """
    loops = []
    for last in code:
        target = _TARGET.search(last.operands) if last.opcode == "BRA" else None
        if target and int(target[1], 16) < last.address:
            loops.append(range(int(target[1], 16), last.address + 1))
    bodies = [(loop, [one for one in code if one.address in loop]) for loop in loops]
    wide = [(loop, body) for loop, body in bodies if any(one.loads() == 16 for one in body)]
    if not wide:
        return []
    hot, body = min(wide, key=lambda found: len(found[1]))
    inside = [loop for loop in loops if loop != hot and loop.start >= hot.start and loop.stop <= hot.stop]
    return [one for one in body if not any(one.address in loop for loop in inside)]


def look(library: Path, arch: str) -> list[Loop]:
    """What stands in the module's docstring, of each row kernel."""
    card, used = CARDS[arch], registers(library, arch)
    lanes = LANES | ({"fma": _FMA_OF_AMPERE} if arch == "sm_80" else {})
    loops = []
    for name, code in functions(library, arch):
        found = _ROW_KERNEL.search(name)
        body = hot_loop(code) if found else []
        if not found or not body:
            continue
        dtype, threads = _DTYPES[found["half"]], int(found["threads"])
        size = 4 if dtype == "f32" else 2
        loaded, stored = sum(one.loads() for one in body), sum(one.stores() for one in body)
        elements = loaded // size
        by_pipe = Counter(one.pipe for one in body)
        # Logits a second and multiprocessor if memory were the only limit, and the turns of a warp that they are.
        turns = card.bandwidth / (size * (1 + (stored > 0))) / card.multiprocessors / elements / 32
        block = threads * (4 if threads == 32 else 1)
        blocks = min(65536 // (-(-used[name] // 8) * 8 * block), card.threads // block)
        uses = by_pipe + Counter(fma=sum(one.opcode.split(".")[0] in _PAIRS for one in body))
        busy = {pipe: turns * uses[pipe] * 32 / (count * card.clock) for pipe, count in lanes.items()}
        loops.append(
            Loop(
                kernel=found["kernel"],
                dtype=dtype,
                threads=threads,
                more=found["more"],
                elements=elements,
                instructions=len(body) / elements,
                exponentials=by_pipe["exp"] / elements,
                by_pipe=dict(by_pipe),
                access=max(one.loads() for one in body),
                registers=used[name],
                in_flight=loaded * block * blocks,
                issue=turns * len(body) * 32 / (SCHEDULED * card.clock),
                **busy,
            )
        )
    return sorted(loops, key=lambda loop: (loop.kernel, loop.dtype, loop.more, loop.threads))


def extension() -> Path:
    """The installed package's compiled module."""
    import torch  # noqa: F401  (loads the libraries that the extension needs)

    from pear_megatron import _C

    return Path(_C.__file__)


def table(loops: list[Loop], card: Card) -> str:
    """Markdown, a row per kernel."""
    lines = [
        f"{card.name}: {card.multiprocessors} multiprocessors, {card.clock / 1e9:.2f} GHz, "
        f"{card.bandwidth / 1e12:.1f} TB/s",
        "",
        "| kernel | instructions a logit | MUFU a logit | access | registers | in flight | issue | exp | ALU | FMA |",
        "| --- |" + " ---: |" * 9,
    ]
    for x in loops:
        name = f"{x.kernel} {x.dtype}, {x.threads} threads{f' {x.more}' if x.more else ''}"
        shares = (f"{share:.0%}" for share in (x.issue, x.exp, x.alu, x.fma))
        cells = (name, f"{x.instructions:.2f}", f"{x.exponentials:.2f}", f"{x.access} B", str(x.registers))
        lines.append("| " + " | ".join([*cells, f"{x.in_flight // 1024} KB", *shares]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=CARDS, default=["sm_90"], help="default: sm_90")
    parser.add_argument("--library", type=Path, help="a compiled module; default: the installed package's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was counted")
    args = parser.parse_args()
    library = args.library or extension()
    found = {arch: look(library, arch) for arch in args.arch}
    for arch, loops in found.items():
        if not loops:
            raise SystemExit(f"{library} has no row kernels for {arch}; build it with TORCH_CUDA_ARCH_LIST")
        print(table(loops, CARDS[arch]), end="\n\n")
    if args.json:
        args.json.write_text(
            json.dumps({a: [asdict(x) for x in ls] for a, ls in found.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
