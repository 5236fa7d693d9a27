"""The reader of GPU programs, on a program written by hand."""

import jax
import pytest
from absl.testing import flagsaver

from experiments.benchmark import gpu_compile, gpu_devices, hlo
from vaecf import config as config_lib
from vaecf.config import Config
from vaecf.parallel import mesh as mesh_lib

# Three kernels and two collectives in a loop, and a copy before it.
PROGRAM = """
HloModule jit_steps, is_scheduled=true

%scatter_body (p0: f32[100,8], p1: s32[5,1], p2: f32[5,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[5,1]{1,0} parameter(1)
  %p2 = f32[5,8]{1,0} parameter(2)
  ROOT %scatter = f32[100,8]{1,0} scatter(%p0, %p1, %p2), to_apply=%add
}

%gather_body (q0: f32[100,8], q1: s32[6,1]) -> (bf16[8], f32[6,8]) {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = s32[6,1]{1,0} parameter(1)
  %twice = f32[100,8]{1,0} add(%q0, %q0)
  %rows = f32[6,8]{1,0} gather(%twice, %q1), offset_dims={1}
  %sum = bf16[8]{0} reduce(%rows), dimensions={0}, to_apply=%add
  ROOT %both = (bf16[8]{0}, f32[6,8]{1,0}) tuple(%sum, %rows)
}

%dot_body (d0: bf16[8,100], d1: bf16[100,4]) -> f32[8,4] {
  %d0 = bf16[8,100]{1,0} parameter(0)
  %d1 = bf16[100,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%d0, %d1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner (i: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  ROOT %next = s32[] copy(%i)
}

%body (state: f32[100,8]) -> f32[100,8] {
  %state = f32[100,8]{1,0} parameter(0)
  %index = s32[5,1]{1,0} constant({...})
  %more = s32[6,1]{1,0} constant({...})
  %rows5 = f32[5,8]{1,0} constant({...})
  %left = bf16[8,100]{1,0} constant({...})
  %right = bf16[100,4]{1,0} constant({...})
  %sums = (f32[5,8]{1,0}, f32[5,8]{1,0}) all-reduce-start(%rows5), replica_groups={{0,1}}
  %put = f32[100,8]{1,0} fusion(%state, %index, %rows5), kind=kInput, calls=%scatter_body, metadata={op_name="jit(steps)/scatter-add"}
  %done = f32[5,8]{1,0} all-reduce-done(%sums)
  %taken = (bf16[8]{0}, f32[6,8]{1,0}) fusion(%put, %more), kind=kInput, calls=%gather_body
  %triton = f32[8,4]{1,0} fusion(%left, %right), kind=kCustom, calls=%dot_body
  %blas = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%left, %right), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %gathered = f32[10,8]{1,0} all-gather(%rows5), dimensions={0}
  %loop = s32[] while(%zero), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[100,8]{1,0} bitcast(%put)
}

ENTRY %main (start: f32[100,8]) -> f32[100,8] {
  %start = f32[100,8]{1,0} parameter(0)
  %copied = f32[100,8]{1,0} copy(%start)
  ROOT %while = f32[100,8]{1,0} while(%copied), condition=%c, body=%body
}
"""


def test_kernels_of_a_step():
    module = hlo.Module(PROGRAM)
    step, around = module.step()
    assert [k.name for k in around] == ["copied"]
    kernels = {k.name: k for k in step}
    assert list(kernels) == [
        *("sums", "put", "taken", "triton", "blas", "gathered", "next")
    ]
    # The scatter reads and writes the five rows that it updates.
    put = kernels["put"]
    assert put.read == (5 * 8 * 4, 5 * 4, 5 * 8 * 4)
    assert (
        put.written == (5 * 8 * 4,) and put.source == "jit(steps)/scatter-add"
    )
    # The gather reads six rows, although it first adds the whole array up.
    assert kernels["taken"].read == (6 * 8 * 4, 6 * 4)
    assert kernels["taken"].written == (8 * 2, 6 * 8 * 4)
    for name, op in (("triton", "fusion"), ("blas", "__cublas$gemm")):
        product = kernels[name]
        assert (product.op, product.operand) == (op, "bf16")
        assert product.flop == 2 * 8 * 4 * 100
        assert product.read == (8 * 100 * 2, 100 * 4 * 2)
    assert kernels["next"].times == 3 and kernels["put"].times == 1
    assert module.beside == {"sums": ["put"]}


def test_bytes_of_shapes():
    assert hlo.sizes("(f32[2,3]{1,0}, bf16[4], pred[5], token[])") == [
        *(24, 8, 5, 0)
    ]
    assert hlo.sizes("f8e4m3fn[16]") == [16]


@pytest.mark.parametrize(
    ("op", "read", "written", "sent"),
    [
        ("all-reduce", 48, 48, 96),
        ("all-reduce-start", 48, 2 * 48, 96),
        ("all-gather", 6, 48, 48),
        ("all-gather-start", 6, 6 + 48, 48),
        ("reduce-scatter", 48, 6, 48),
        ("reduce-scatter-start", 48, 48 + 6, 48),
    ],
)
def test_predicted_time_of_a_collective(op, read, written, sent):
    """A device sends 7/8 of an array, counted as all of it."""
    with flagsaver.flagsaver():
        from experiments.benchmark import gpu_program

    gpu = gpu_devices.GPUS["h100"]
    sizes = (read * 10**6,), (written * 10**6,)
    kernel = hlo.Kernel("", op, "", sizes[0], 0, sizes[1], 0, "", 1)
    got = gpu_program.seconds(kernel, gpu, "bf16")
    assert got == pytest.approx(sent * 1e6 / (0.75 * 450e9), rel=0.13)


def test_time_of_a_step_with_collectives():
    """Two gradients' sums share the links beside four kernels of 1 s."""
    with flagsaver.flagsaver():
        from experiments.benchmark import gpu_program

    names = ["a", "sum1", "b", "sum2", "c", "d"]
    step = [hlo.Kernel(n, "", "", (), 0, (), 0, "", 1) for n in names]

    def elapsed(seconds, **beside):
        times = dict.fromkeys(names, 1.0)
        times |= {"sum1": seconds, "sum2": seconds}
        return gpu_program.elapsed(step, times, beside)

    assert elapsed(3.0) == 10  # nothing at once
    # b runs beside sum1, c beside sum2, which waits for sum1.
    assert elapsed(3.0, sum1=["b", "sum2"], sum2=["c"]) == 8
    assert elapsed(0.5, sum1=["b", "sum2"], sum2=["c"]) == 4
    # The last one ends after all kernels.
    assert elapsed(3.0, sum1=["b", "sum2", "c", "d"], sum2=["c", "d"]) == 7


@pytest.mark.parametrize("seconds", ["bytes", "products", "launch"])
def test_predicted_time_of_a_kernel(seconds):
    with flagsaver.flagsaver():  # the flags of a script would stay
        from experiments.benchmark import gpu_program

    gpu = gpu_devices.GPUS["a100"]
    kernel = hlo.Kernel("", "", "", (10**9,), 0, (10**9,), 0, "", 1)
    expected = 2e9 / (0.85 * 2.04e12)
    if seconds == "products":
        kernel = kernel._replace(flop=10**12, operand="bf16")
        expected = 1e12 / (0.75 * 312e12)
    elif seconds == "launch":
        kernel, expected = kernel._replace(read=(8,), written=()), 2e-6
    got = gpu_program.seconds(kernel, gpu, "bf16")
    assert got == pytest.approx(expected)


def test_programs_are_compiled_from_shapes():
    """For a CPU here; the same code compiles for a described GPU."""
    changes = {
        "model.hidden": (8,),
        "model.latent": 4,
        "train.batch_size": 16,
        "eval.batch_size": 16,
    }
    config = config_lib.replace(Config(), changes)
    mesh = mesh_lib.make_mesh(1, 1)
    programs = gpu_compile.train(config, mesh, 100, 50, 5)
    programs |= gpu_compile.rankings(config, mesh, 100, 5)
    users = {name: users for name, (_, users) in programs.items()}
    assert users == {"train": 16, "evaluation": 16, "query": 1}
    for program, _ in programs.values():
        assert isinstance(program, jax.stages.Compiled)
    step, around = hlo.Module(programs["train"][0].as_text()).step()
    # Products of two layers between the item matrices, three for each.
    assert sum(k.flop > 0 for k in step) >= 6 and around
