from kernels.lti_conv.init import decode_diagonal, encode_diagonal, hippo_legs, s4d_init
from kernels.lti_conv.op import lti_conv
from kernels.lti_conv.reference import lti_conv_reference, s4d_scan
from kernels.lti_conv.s4d import discretize, s4d_kernel, s4d_last_state, s4d_step

__all__ = [
    "decode_diagonal",
    "discretize",
    "encode_diagonal",
    "hippo_legs",
    "lti_conv",
    "lti_conv_reference",
    "s4d_init",
    "s4d_kernel",
    "s4d_last_state",
    "s4d_scan",
    "s4d_step",
]
