"""Manifold-constrained hyper-connections (arXiv 2512.24880, section 4.2): S residual streams that
mix at every layer.

B batch, L length, S streams, D model width, R = S x S.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels.sinkhorn_knopp import sinkhorn_knopp
from parallel.mesh import Mesh
from parallel.placement import Init, Placement, constant, declare
from training.model.config import ModelConfig

ALPHA = 0.01  # the paper's only published initial value (appendix A.1)
# Equal streams would get equal gradients and stay equal for ever; the mean of H_post is 1 all the
# same.
POST_SPREAD = 1.0
# Diagonal of the initial mixing logits: 98 % of a stream stays in it, and it still learns.
IDENTITY_LOGIT = 5.0


class HyperConnection(nn.Module):
    """Coefficients of one layer: u = H_pre x, x' = H_res x + H_post^T F(u).

    H_pre = sigmoid, H_post = 2 sigmoid, H_res doubly stochastic by Sinkhorn-Knopp; all from r^-1 x
    phi, fp32. Initially H_pre = 1/S and H_post has mean 1, so the mean of the streams is the plain
    residual network's.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        streams = model.num_streams
        self.eps = model.norm_eps
        self.streams = streams

        def replica(
            *shape: int,
            init: Init,
            whole: bool = False,
        ) -> nn.Parameter:
            placement = Placement(
                shape=shape,
                init=init,
                partial=mesh.sequence_parallel,
                decay=False,
                fp32=True,
                whole_init=whole,
            )
            return declare(placement, mesh)

        size = streams * (streams + 2)
        self.phi = replica(size, streams * model.d_model, init=constant(0.0))
        self.alpha = replica(3, init=constant(ALPHA))
        self.bias = replica(size, init=self._initial_bias, whole=True)

    def _initial_bias(
        self,
        _: torch.Generator,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        """Logits of H_pre = 1 / S, of H_post spread about 1, and of nearly the identity."""
        streams = self.streams
        pre_S = torch.full((streams,), -math.log(streams - 1))
        post_S = torch.linspace(-POST_SPREAD, POST_SPREAD, streams)
        mix_SS = IDENTITY_LOGIT * torch.eye(streams)
        return torch.cat([pre_S, post_S, mix_SS.flatten()])

    def forward(
        self,
        x_BLSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the layer reads, and how its output returns: u_BLD, post_BLS, mix_BLSS (from stream,
        to stream).
        """
        pre_BLS, post_BLS, res_BLR = self._logits(x_BLSD)
        streams = (self.streams, self.streams)
        mix_BLSS = sinkhorn_knopp(res_BLR.unflatten(-1, streams))
        u_BLD = torch.einsum(
            "bls,blsd->bld",
            torch.sigmoid(pre_BLS),
            x_BLSD.float(),
        )
        # Factor 2: the mean of H_post is 1 where its logits are about 0.
        return u_BLD, 2 * torch.sigmoid(post_BLS), mix_BLSS

    def _logits(self, x_BLSD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of H_pre, H_post and H_res: r^-1 x phi, each third with its own scale, and a bias."""
        flat = x_BLSD.flatten(-2).float()
        squares = flat.square().mean(-1, keepdim=True)
        inverse_rms = torch.rsqrt(squares + self.eps)
        sizes = [self.streams, self.streams, self.streams**2]
        thirds = zip(self.alpha, sizes, strict=True)
        scale = torch.cat([alpha.expand(size) for alpha, size in thirds])
        logits = F.linear(flat, self.phi) * inverse_rms * scale + self.bias
        return logits.split(sizes, dim=-1)


def merge(
    x_BLSD: torch.Tensor,
    y_BLD: torch.Tensor,
    post_BLS: torch.Tensor,
    mix_BLSS: torch.Tensor,
) -> torch.Tensor:
    """x'[k] = post[k] y + sum_j mix[j, k] x[j]."""
    mixed_BLSD = torch.einsum(
        "bljk,bljd->blkd",
        mix_BLSS,
        x_BLSD.float(),
    )
    added_BLSD = post_BLS[..., None] * y_BLD[..., None, :].float()
    return (mixed_BLSD + added_BLSD).to(x_BLSD.dtype)
