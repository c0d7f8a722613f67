"""Engram (arXiv 2601.07372, section 2): hashed n-gram memory, gated into the residual streams
before a layer's mixer.

B batch, L length, S streams, D model width, M = O x W memory width (n-gram orders x heads x row
width).
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from kernels.engram_gate import engram_gate
from kernels.rms_norm import rms_norm
from parallel.collectives import gather_tokens, give_token_share, take_token_share
from parallel.mesh import Mesh
from parallel.placement import Init, Placement, constant, declare
from training.model.config import ModelConfig
from training.model.context import Context
from training.model.init import weight_init


class Engram(nn.Module):
    """k = W_K e, v = W_V e; u = gate(h, k) v; out = h + u + SiLU(conv(RMSNorm(u))).

    A position that looks nothing up (e = 0) has u = 0, which is what the convolution reads of it,
    and out = h.

    Under tensor parallelism each tensor rank looks up and gates its share of the tokens.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = model.engram
        self.mesh = mesh
        self.eps = model.norm_eps
        assert config is not None, "a model without Engram has no Engram layer"
        self.config = config
        self.streams = model.num_streams if config.per_stream else 1
        self._declare(model, len(config.orders) * config.num_heads * config.head_dim)

    def _declare(self, model: ModelConfig, memory: int) -> None:
        """Each tensor rank sees a share of the tokens: whole weights, whose gradients are
        summed.
        """
        width = model.d_model
        streams = self.streams
        taps = self.config.conv_width
        weights = weight_init(model)
        self.value = self._replica((width, memory), weights)
        if self.config.gate:
            self.key = self._replica((streams * width, memory), weights)
            self.query_norm = self._norm(streams, width)
            self.key_norm = self._norm(streams, width)
        if self.config.conv:
            self.conv_norm = self._norm(streams, width)
            self.conv_weight = self._replica((streams * width, taps), constant(0.0), decay=False)

    def _norm(self, streams: int, width: int) -> nn.Parameter:
        return self._replica((streams, width), constant(1.0), decay=False, fp32=True)

    def _replica(
        self,
        shape: tuple[int, ...],
        init: Init,
        *,
        decay: bool = True,
        fp32: bool = False,
    ) -> nn.Parameter:
        placement = Placement(
            shape=shape,
            init=init,
            partial=True,
            decay=decay,
            fp32=fp32,
        )
        return declare(placement, self.mesh)

    def forward(
        self,
        h_BLSD: torch.Tensor,
        memory_BLM: torch.Tensor,
        context: Context,
        masked_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The streams with what is remembered, in the layout of ``h_BLSD``.

        Args:
            h_BLSD: residual streams, in their own layout.
            memory_BLM: rows of this tensor rank's share of the tokens, concatenated over orders and
                heads.
            context: documents of the whole row, and the convolution's state.
            masked_BL: bool, which positions of ``memory_BLM`` look nothing up; None: none.
        """
        shared = self.mesh.size("tp") > 1 and not self.mesh.sequence_parallel
        if not self.config.conv and not shared:
            return self.gated(h_BLSD, memory_BLM, residual=True)[0]
        # The convolution reads u itself, and shares are gathered in its dtype, which may be
        # narrower than the streams'.
        u_BLSD, _ = self.gated(take_token_share(h_BLSD, self.mesh), memory_BLM)
        if self.config.conv:
            y_BLSD = F.silu(self._conv(u_BLSD, context))
            if masked_BL is not None:
                y_BLSD = y_BLSD.masked_fill(masked_BL[..., None, None], 0)
            u_BLSD = u_BLSD + y_BLSD
        return h_BLSD + give_token_share(u_BLSD, self.mesh)

    def gated(
        self,
        h_BLSD: torch.Tensor,
        memory_BLM: torch.Tensor,
        residual: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each stream's value (B, L, S, D) before the convolution, and gates (B, L, S), detached: 1
        without a gate.

        With ``residual`` the streams with their values added.
        """
        v_BLD = F.linear(memory_BLM, self.value)
        if not self.config.gate:
            u_BLSD = v_BLD[:, :, None].expand(-1, -1, self.streams, -1)
            gates_BLS = v_BLD.new_ones((*h_BLSD.shape[:3],))
            return h_BLSD + u_BLSD if residual else u_BLSD, gates_BLS
        k_BLSD = F.linear(memory_BLM, self.key)
        k_BLSD = k_BLSD.unflatten(-1, (self.streams, -1))
        return engram_gate(
            h_BLSD,
            k_BLSD,
            v_BLD,
            self.query_norm,
            self.key_norm,
            self.eps,
            return_gate=True,
            residual=residual,
        )

    def _conv(self, u_BLSD: torch.Tensor, context: Context) -> torch.Tensor:
        """Depthwise causal convolution over whole rows: all tensor ranks' shares are gathered, the
        own one kept.
        """
        group = self.mesh.group("tp")
        normed = rms_norm(u_BLSD, self.conv_norm, self.eps).flatten(-2)
        y = self._conv_rows(gather_tokens(normed, group), context)
        if group is not None and self.mesh.size("tp") > 1:
            shares = y.chunk(self.mesh.size("tp"), dim=1)
            y = shares[self.mesh.rank("tp")]
        return y.unflatten(-1, (self.streams, -1))

    def _conv_rows(self, rows: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, L, S x D) -> the same; a decoded sequence's last inputs are its state
        ``engram_conv``.
        """
        dilation = max(self.config.orders)
        if context.state is None:
            return causal_conv1d(
                rows,
                self.conv_weight,
                seq_idx=context.seq_idx_BL,
                dilation=dilation,
            )
        y, context.state["engram_conv"] = causal_conv1d(
            rows,
            self.conv_weight,
            initial_states=context.before("engram_conv"),
            return_final_states=True,
            dilation=dilation,
        )
        return y
