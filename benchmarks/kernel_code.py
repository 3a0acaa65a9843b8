"""Compiles the CUDA kernels of the losses ahead of time and reads their machine code; no GPU.

    python benchmarks/kernel_code.py --arch 80 90 100 --json kernels.json --cubin kernels/

All figures come from the output of cuobjdump and nvdisasm, which are part of Triton, for the
compiled kernel. The main loop is the longest backward jump: one tile of examples. The predicted
time is the larger of what the memory needs and what the processor needs to issue the loop's
instructions, or those of its special function units.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from ghm_d2.errors import UserError

COLUMNS, BINS, LEVELS, ITERATIONS = 80, 30, 5, 8
DTYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}

# name: (architecture, multiprocessors, clock in GHz, memory in TB/s), from the makers' data sheets;
# the clock is that of a sustained load.
GPUS = {
    "A100": (80, 108, 1.41, 2.04),
    "H100": (90, 132, 1.755, 3.35),
    "H200": (90, 132, 1.755, 4.8),
    "B200": (100, 148, 1.85, 8.0),
}
_LANES, _SPECIAL_LANES = 128, 16  # of a multiprocessor, a clock
_SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "POPC"}


@dataclass
class Specialisation:
    """One kernel with its constants.

    Attributes:
        name: such as "count-negative-float32".
        kernel: "count", "loss", "flag", "walk", "finish" or "scale".
        types: for each argument a type, or a tuple of types.
        constants: the compile-time arguments.
        options: of the launch.
        bytes: number of bytes that an example reads and writes.
    """

    name: str
    kernel: str
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0


def specialisations() -> Iterator[Specialisation]:
    """All kernels that a detector launches, and the rarer forms once each."""
    from ghm_d2.losses.kernels import triton as kernels
    from ghm_d2.losses.kernels import triton_examples as examples
    from ghm_d2.losses.kernels.triton_launch import TILE, launch_options

    five = lambda kind: (kind,) * LEVELS  # noqa: E731
    names = ("negative", "class", "soft", "delta")
    kinds = {name: getattr(examples, name.upper()).value for name in names}
    for dtype, pointer in DTYPES.items():
        for kind, weighted, bins, mu in (
            *((name, 0, BINS, 0.02) for name in kinds),
            ("delta", 0, BINS, None),
            *((("class", 1, BINS, 0.0), ("class", 2, BINS, 0.0), ("soft", 2, BINS, 0.0),
               ("delta", 1, BINS, 0.02), ("delta", 2, BINS, 0.02), ("negative", 0, 20, 0.0),
               ("negative", 0, 1000, 0.0))
              if dtype == "float32" else ()),
        ):  # fmt: skip
            target = {"soft": "*fp32", "delta": pointer}.get(kind, "*i64")
            types = {
                "xs": five(pointer), "ys": five(target), "ws": five("*fp32"),
                "outs": five(pointer), "sizes": five("i32"), "marks_ptr": "*i8", "mu_ptr": "*fp32",
                "counts_ptr": "*i64", "bits_ptr": "*i64", "weights_ptr": "*fp32",
                "factor_ptr": "*fp32", "partial_ptr": "*fp32", "row_stride": "i32",
            }  # fmt: skip
            by_rows = kind == "class" or weighted == 1
            tiles = {"negative": "PLAIN", "class": "ALL" if weighted == 2 else "OTHER"}.get(
                kind, "ALL"
            )
            constants = {
                "KIND": kinds[kind], "IGNORED": -1 if kind == "class" else None,
                "COLUMNS": (4 if kind == "delta" else COLUMNS) if by_rows else 1,
                "WEIGHTED": weighted, "TILES": getattr(kernels, tiles).value, "MU": mu,
                "BINS": bins, "FLOOR_IS_EXACT": bins == BINS, "ITERATIONS": ITERATIONS,
                "TILE": TILE, "LEVELS": LEVELS,
            }  # fmt: skip
            suffix = "".join(
                (
                    f"-weighted{weighted}" * (weighted > 0),
                    f"-M{bins}" * (bins != BINS),
                    "-mu" * (mu is None),  # on the device
                )
            )
            read = _BYTES[pointer] + _BYTES.get(target, 0) + 4 * (weighted == 2)
            width = {"WIDTH": 1024 if bins > 31 else 32}
            options = launch_options("count", kinds[kind], bins)
            name = f"{kind}-{dtype}{suffix}"
            yield Specialisation(f"count-{name}", "count", types, constants | width, options, read)
            together = dtype == "float32"
            for what in ("loss+gradient" if together else "loss", "gradient"):
                if what == "gradient" and kind == "negative":
                    continue  # one launch writes the gradient of both kinds of tiles
                either = what == "gradient" and tiles == "OTHER"
                outputs = {"TILES": kernels.EITHER.value} if either else {}
                outputs |= {"LOSS": "loss" in what, "GRADIENT": "gradient" in what}
                written = _BYTES[pointer] * outputs["GRADIENT"]
                yield Specialisation(
                    f"{what}-{name}", "loss", types, constants | outputs,
                    launch_options("loss"), read + written,
                )  # fmt: skip
    shared = {"TILE": TILE, "LEVELS": LEVELS}
    types = {"ys": five("*i64"), "ws": five("*fp32"), "marks_ptr": "*i8", "sizes": five("i32")}
    constants = {"COLUMNS": COLUMNS, "WEIGHTED": 0, "ROWS": 32} | shared
    yield Specialisation("flag", "flag", types, constants, {"num_warps": 1})
    types = {"outs": five("*fp32"), "factor_ptr": "*fp32", "sizes": five("i32")}
    constants = {"ITERATIONS": ITERATIONS} | shared
    yield Specialisation("scale", "scale", types, constants, launch_options("scale"), 8)
    pointers = ("counts", "updates", "new_updates", "bits", "failed")
    every = ("acc", "weights", "new_acc", "partial", "loss")
    types = {f"{name}_ptr": "*i64" for name in pointers} | {f"{n}_ptr": "*fp32" for n in every}
    types |= {"levels": "i32", "number": "i32"}
    constants = {
        "KEPT": 0.75, "LOG_MOMENTUM": -0.287682, "ADDED": 0.25, "CORRECTED": False,
        "DECAY": False, "VALID": True, "BINS": BINS, "WIDTH": 32,
    }  # fmt: skip
    options = launch_options("walk") | {"enable_fp_fusion": False}
    yield Specialisation("walk", "walk", types, constants, options)
    corrected = constants | {"CORRECTED": True}
    yield Specialisation("walk-corrected", "walk", types, corrected, options)
    constants = {"WRITES": True, "CORRECTED": False, "BINS": BINS, "WIDTH": 32, "BLOCK": 1024}
    yield Specialisation("finish", "finish", types, constants, launch_options("finish"))


def compile_kernel(kernel: Any, spec: Specialisation, arch: int) -> bytes:
    """The cubin of one specialisation, pointers aligned to 16 bytes as those of PyTorch are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: v for k, v in spec.constants.items() if k in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else spec.types[name] for name in kernel.arg_names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j, each in enumerate(kind) if each[0] == "*"}
        elif kind[0] == "*":
            attributes[(i,)] = aligned
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    code: bytes = triton.compile(source, target=target, options=spec.options).asm["cubin"]
    return code


def measure(spec: Specialisation, arch: int, folder: Path) -> dict[str, Any]:
    """Compiles one specialisation into `folder` and reads its machine code."""
    from ghm_d2.losses.kernels import triton as kernels

    kernel = getattr(kernels, f"{spec.kernel}_kernel")
    path = folder / f"{spec.name}.sm_{arch}.cubin"
    path.write_bytes(compile_kernel(kernel, spec, arch))
    return {"name": spec.name, "arch": arch, "cubin": path.name} | read_code(
        _tool("nvdisasm", "-c", str(path)),
        _tool("cuobjdump", "-res-usage", str(path)),
        spec.constants.get("TILE", 0) / (32 * spec.options["num_warps"]),
        spec.bytes,
        arch,
    )


def read_code(
    code: str, usage: str, examples: float, bytes_of_example: int, arch: int
) -> dict[str, Any]:
    """What the two tools say of one kernel.

    Args:
        code: output of nvdisasm.
        usage: output of cuobjdump.
        examples: of a thread in the main loop.
        bytes_of_example: that it reads and writes.
        arch: such as 90.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    loops = [
        instructions[start : end + 1]
        for end, text in enumerate(instructions)
        if (jump := re.search(r"^BRA.*`\((\.L_x_\d+)\)", text))
        and (start := labels.get(jump[1], len(instructions))) < end
    ]
    loop = max(loops, key=len, default=[])
    # On sm_80, ptxas leaves some loops by a CALL to a label of the same kernel. That is a jump:
    # a call comes back by a RET.
    returns = any(text.startswith("RET") for text in instructions)
    calls = [text for text in instructions if text.startswith("CALL")] if returns else []
    resources = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    result: dict[str, Any] = {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": resources["SHARED"],
        "instructions": len(instructions),
        "calls": len(calls),
        "divisions_64_bit": len(re.findall(r"CALL.*div_[us]64", code)),
        "loop": {
            "instructions": len(loop),
            "loads": _widths(loop, "LDG"),
            "stores": _widths(loop, "STG"),
            "spills": sum(text.startswith(("LDL", "STL")) for text in loop),
        },
    }
    if loop and bytes_of_example:
        special = sum(text.split(".")[0].split()[0] in _SPECIAL for text in loop) / examples
        each = len(loop) / examples
        result["loop"] |= {"examples_a_thread": examples, "instructions_an_example": each}
        result["loop"]["special_an_example"] = special
        result["predicted"] = dict(_predict(each, special, bytes_of_example, arch))
    return result


def _predict(each: float, special: float, size: int, arch: int) -> Iterator[tuple[str, Any]]:
    for name, (own, processors, clock, memory) in GPUS.items():
        if own == arch:
            rate = processors * clock * 1e9
            times = {
                "memory": size / (memory * 1e12),
                "issue": each / (rate * _LANES),
                "special": special / (rate * _SPECIAL_LANES),
            }
            picoseconds = {f"{key}_ps": round(value * 1e12, 3) for key, value in times.items()}
            ratio = max(times.values()) / times["memory"]
            yield name, picoseconds | {"times_memory": round(ratio, 3)}


def _widths(loop: Sequence[str], operation: str) -> dict[str, int]:
    """Number of `operation` instructions in the loop by how many bits they move."""
    found = Counter()
    for text in loop:
        if text.startswith(operation):
            width = re.search(r"\.(?:[US])?(8|16|64|128)\b", text.split()[0])
            found[width[1] if width else "32"] += 1
    return dict(found)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(tool_path(name)), *arguments], capture_output=True, text=True).stdout


def tool_path(name: str) -> Path:
    """Where Triton keeps one of NVIDIA's programs.

    Raises:
        UserError: there is none.
    """
    try:
        import triton
    except ImportError as error:
        raise UserError("Compiling the kernels needs Triton: pip install triton.") from error
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise UserError(f"This Triton has no {name} in {path.parent}: install another version.")
    return path


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each kernel."""
    lines = [
        f"{'kernel':38}{'arch':>5}{'instr./ex.':>11}{'regs':>6}{'stack':>6}{'calls':>6}"
        f"{'loads':>22}{'stores':>9}  time / memory's"
    ]
    for r in results:
        loop = r["loop"]
        each = loop.get("instructions_an_example")
        loads, stores = (
            " ".join(f"{n}x{bits}" for bits, n in loop[key].items()) for key in ("loads", "stores")
        )
        ratios = ", ".join(
            f"{gpu} {p['times_memory']:.2f}" for gpu, p in r.get("predicted", {}).items()
        )
        lines.append(
            f"{r['name']:38}{r['arch']:>5}{f'{each:.1f}' if each else '-':>11}"
            f"{r['registers']:>6}{r['stack_bytes']:>6}{r['calls']:>6}{loads:>22}{stores:>9}"
            f"  {ratios}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", nargs="+", type=int, default=[80, 90, 100], help="90: sm_90; default: all three")
    add("--json", type=Path, help="write the figures here")
    add("--cubin", type=Path, metavar="DIR", help="keep the compiled kernels here")
    add("--only", default="", metavar="REGEX", help="kernels whose name it matches from the start")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles, measures, writes JSON, prints a table."""
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreter has no machine code
    args = parse(arguments)
    for name in ("nvdisasm", "cuobjdump"):
        tool_path(name)
    try:
        chosen = [spec for spec in specialisations() if re.match(args.only, spec.name)]
    except re.error as error:
        raise UserError(f"--only {args.only} is not a regular expression: {error}.") from error
    if not chosen:
        raise UserError(f"--only {args.only} matches no kernel.")
    import triton

    jobs = [(spec, arch) for arch in args.arch for spec in chosen]
    results = []
    with TemporaryDirectory() as scratch:
        folder = args.cubin or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for spec, arch in tqdm(jobs, unit="kernel", file=sys.stderr):
            try:
                results.append(measure(spec, arch, folder))
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(f"{spec.name} does not compile for sm_{arch}: {error}.") from error
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        keys = ("arch", "processors", "ghz", "tb_s")
        gpus = {n: dict(zip(keys, v, strict=True)) for n, v in GPUS.items()}
        head = {
            "triton": triton.__version__,
            "nvdisasm": _tool("nvdisasm", "--version").split()[-1],
        }
        args.json.write_text(json.dumps(head | {"gpus": gpus, "kernels": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
