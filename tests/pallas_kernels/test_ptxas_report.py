import pytest

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.compile_case import DEVICES, Work
from alaya_jax.pallas_kernels.ptxas_report import read_reports

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_mosaic_gpu_kernel
    {stack} bytes stack frame, {spill} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""
PTX = """
 @%p1 cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], ...
 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 ...
 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 ...
"""
MODULE = """
    %c33 = arith.constant 33 : index
    %c8 = arith.constant 8 : index
    %c1 = arith.constant 1 : index
    %c128 = arith.constant 128 : index
    %c103480_i32 = arith.constant 103480 : i32
    %0 = gpu.launch async [%18] blocks(%a, %b, %c) in (%d = %c33, %e = %c8, %f = %c1) threads(%g) in (%h = %c128, %i = %c1, %j = %c1) dynamic_shared_memory_size %c103480_i32 {
"""  # noqa: E501


@pytest.fixture
def dump(tmp_path):
    def write(registers=116, stack=0, spill=0, module=MODULE, ptx=PTX):
        text = PTXAS.format(registers=registers, stack=stack, spill=spill)
        (tmp_path / "attend_0.ptxas").write_text(text.replace("4 bytes", f"{spill} bytes"))
        (tmp_path / "attend_0.ptx").write_text(ptx)
        (tmp_path / "attend_0.before_layout_inference.txt").write_text(module)
        return tmp_path

    return write


def test_what_the_compiler_said_is_read(dump):
    (report,) = read_reports(dump())
    assert (report.name, report.registers, report.spill_bytes) == ("attend", 116, 0)
    assert (report.shared_memory, report.threads, report.grid) == (103480, 128, 264)
    assert (report.wgmma, report.tma, report.fences) == (2, 1, 0)
    assert report.faults(frozenset({"wgmma", "tma"})) == []


def test_faults_are_named(dump):
    (report,) = read_reports(dump(spill=8, stack=16))
    faults = "\n".join(report.faults(frozenset({"fences"})))
    assert "spills 16 bytes" in faults  # 8 stored, 8 loaded
    assert "16 bytes in local memory" in faults
    assert "no fences" in faults
    (report,) = read_reports(dump(ptx=""))
    assert len(report.faults(frozenset({"wgmma", "tma"}))) == 2


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    # 2 x (101 + 1) KB fit 228 KB, 3 do not; 255 registers x 128 threads leave room for two blocks,
    # 128 for four; without either limit 2048 threads are 16 blocks.
    [(116, 103480, 2), (255, 1024, 2), (128, 1024, 4), (32, 1024, 16), (32, 240000, 0)],
)
def test_occupancy(dump, registers, shared, blocks):
    module = MODULE.replace("103480", str(shared))
    (report,) = read_reports(dump(registers=registers, module=module))
    assert report.blocks_a_core(DEVICES["h100"]) == blocks


def test_a_report_of_another_form_is_refused(dump):
    folder = dump()
    (folder / "attend_0.ptxas").write_text("all is well")
    with pytest.raises(KernelError, match="its form changed"):
        read_reports(folder)
    with pytest.raises(KernelError, match="no launch"):
        read_reports(dump(module=""))


def test_the_roofline_is_the_slower_of_memory_and_matmuls():
    h100 = DEVICES["h100"]
    assert h100.seconds(Work(bytes=3.35e12, flops=1.0)) == 1.0
    assert h100.seconds(Work(bytes=1.0, flops=2 * 989e12)) == 2.0
