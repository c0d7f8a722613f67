"""Every op beside its peer, in one table: ``python -m kernels.bench_all``. Each row is checked before it is timed."""

from collections.abc import Iterator

from kernels.cases import Case
from kernels.causal_attention import bench as causal_attention
from kernels.causal_conv1d import bench as causal_conv1d
from kernels.compiled import compile_pieces
from kernels.engram_gate import bench as engram_gate
from kernels.engram_hash import bench as engram_hash
from kernels.grouped_matmul import bench as grouped_matmul
from kernels.linear_cross_entropy import bench as linear_cross_entropy
from kernels.lti_conv import bench as lti_conv
from kernels.moe_permute import bench as moe_permute
from kernels.rms_norm import bench as rms_norm
from kernels.route import bench as route
from kernels.segment_sum import bench as segment_sum
from kernels.selective_scan import bench as selective_scan
from kernels.sinkhorn_knopp import bench as sinkhorn_knopp
from kernels.ssd import bench as ssd
from kernels.state_update import bench as state_update
from kernels.timing import machine, print_rows

OPS = (
    ssd,
    selective_scan,
    causal_attention,
    causal_conv1d,
    grouped_matmul,
    moe_permute,
    route,
    linear_cross_entropy,
    rms_norm,
    lti_conv,
    state_update,
    engram_hash,
    engram_gate,
    segment_sum,
    sinkhorn_knopp,
)


def gpu_cases() -> Iterator[Case]:
    """What ``kernels.bench_gpu`` times and ``kernels.compile_all`` compiles, of every op that has Triton kernels."""
    for op in OPS:
        yield from getattr(op, "gpu_cases", tuple)()


def main() -> None:
    """Measure, then print."""
    print(f"Forward and backward of each op unless said otherwise. {machine()}", flush=True)
    compile_pieces(False)
    print_rows(row for op in OPS for row in op.measure())


if __name__ == "__main__":
    main()
