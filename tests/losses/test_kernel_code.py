"""The machine code of the CUDA kernels, compiled ahead of time: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# (most instructions an example, most registers) on sm_90; half precision at most 1.3 times that.
BOUNDS = {"count": (40, 64), "loss+gradient": (62, 64), "loss": (62, 64), "gradient": (62, 64)}
# float32 writes its gradient with the loss, half precision does not.
COMMON = [("count-negative", t) for t in ("float32", "float16", "bfloat16")]
COMMON += [("loss+gradient-negative", "float32")]
COMMON += [("loss-negative", "float16"), ("loss-negative", "bfloat16")]
# The one that writes the gradient alone takes plain tiles and those with labels.
COMMON += [("gradient-class", t) for t in ("float32", "float16", "bfloat16")]


def run(*arguments):
    # A process of its own: in this one Triton interprets (see conftest.py).
    script = str(ROOT / "benchmarks" / "kernel_code.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )
    if "install" in done.stderr and done.returncode == 1:
        pytest.skip(done.stderr.strip())
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    file = folder / "kernels.json"
    only = "(.*-(negative|delta)|gradient-class)-(float32|float16|bfloat16)(-mu)?$"
    done = run("--arch", "90", "--json", str(file), "--cubin", str(folder), "--only", only)
    assert done.returncode == 0, done.stderr
    return {r["name"]: r for r in json.loads(file.read_text())["kernels"]}, folder, done.stdout


@pytest.mark.parametrize(("kernel", "dtype"), COMMON)
def test_bounds_of_the_common_cases(measured, kernel, dtype):
    results, _, _ = measured
    found = results[f"{kernel}-{dtype}"]
    instructions, registers = BOUNDS[kernel.split("-")[0]]
    scale = 1.0 if dtype == "float32" else 1.3
    loop = found["loop"]
    assert 5 < loop["instructions_an_example"] <= instructions * scale
    assert found["registers"] <= registers
    assert found["stack_bytes"] == found["calls"] == found["divisions_64_bit"] == 0
    assert loop["spills"] == 0
    # a thread's examples come in loads of 128 bits
    wide = loop["examples_a_thread"] * {"float32": 32}.get(dtype, 16) / 128
    assert loop["loads"]["128"] == wide
    if "gradient" in kernel:
        assert loop["stores"] == {"128": wide}


def test_box_deltas_have_wide_loads_and_neither_spills_nor_calls(measured):
    results, _, _ = measured
    assert sum(name.endswith("-mu") for name in results) == 9  # read from the device
    for name, found in results.items():
        if "delta" in name:
            assert found["registers"] <= 64, name
            assert found["stack_bytes"] == found["calls"] == found["loop"]["spills"] == 0, name
            assert found["loop"]["loads"]["128"] >= 2


def test_cubins_are_kept_and_the_table_names_every_kernel(measured):
    results, folder, table = measured
    for name, found in results.items():
        assert (folder / found["cubin"]).stat().st_size > 1000
        assert name in table
        assert found["predicted"]["H100"]["times_memory"] >= 1


def test_reading_of_machine_code():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kernel_code

    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E.U8 R8, [R2.64] ;
        /*0030*/              @!P0 MUFU.EX2 R9, R4 ;
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64) ;
        /*0050*/                   STG.E [R2.64], R9 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
        /*0080*/                   RET.REL.NODEC R2 `(x) ;
"""
    usage = "REG:40 STACK:8 SHARED:1024 LOCAL:0"
    found = kernel_code.read_code(code, usage, 2, 4, 90)
    assert found["instructions"] == 9 and found["registers"] == 40 and found["stack_bytes"] == 8
    assert found["calls"] == 1 and found["divisions_64_bit"] == 1
    loop = found["loop"]
    assert loop["instructions"] == 6 and loop["instructions_an_example"] == 3
    assert loop["loads"] == {"128": 1, "8": 1} and loop["stores"] == {"32": 1}
    assert loop["special_an_example"] == 0.5
    # 4 bytes at 3.35 TB/s; 3 instructions of 132 x 128 lanes at 1.755 GHz
    h100 = found["predicted"]["H100"]
    assert h100["memory_ps"] == pytest.approx(1.194) and h100["issue_ps"] == pytest.approx(0.101)
    # On sm_80 a loop may be left by a CALL to a label: without a RET that is a jump.
    assert kernel_code.read_code(code.replace("RET", "NOP"), usage, 2, 4, 90)["calls"] == 0


def test_mistakes_are_one_sentence():
    done = run("--only", "nothing")
    assert done.returncode == 1 and done.stderr == "error: --only nothing matches no kernel.\n"
