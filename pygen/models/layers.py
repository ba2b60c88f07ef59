"""Layers of diffusion models. Where nothing learns and the model is on a CPU, convolutions and linear layers run by
oneDNN on a weight that is held in its own order, and is put into it again when the weight has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pygen import _C
from pygen.held import Held
from pygen.ops.attention import MOST_HEAD_DIM, attention
from pygen.ops.backend import reference_is_asked_for
from pygen.ops.gated_unit import geglu
from pygen.ops.group_norm_silu import group_norm_silu
from pygen.ops.row_norm import layer_norm, rms_norm, with_rows
from pygen.ops.winograd_conv2d import learning_winograd_conv2d, winograd_conv2d, winograd_weight


def learning(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def packs(module: nn.Conv2d | nn.Linear, x: Tensor) -> bool:
    """Whether oneDNN computes it as torch would, on a packed weight, and nothing learns by it."""
    return _computes(module, x) and not learning(x, module.weight, module.bias)


def _computes(module: nn.Conv2d | nn.Linear, x: Tensor) -> bool:
    """Whether it is for this package to compute, as torch would."""
    return (
        x.device.type == "cpu"
        and x.dtype == module.weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not reference_is_asked_for()
    )


Convolution = Callable[[Tensor], Tensor]


def convolve(module: nn.Conv2d, held: Held[Convolution], x: Tensor) -> Tensor:
    """``module``'s convolution, channels-last."""
    if x.dim() != 4 or not packs(module, x):
        if _learns_by_winograd(module, x):
            return learning_winograd_conv2d(x, module.weight, module.bias)
        return nn.Conv2d.forward(module, x)
    x = x.contiguous(memory_format=torch.channels_last)
    return held.get((module.weight,), lambda: _packed_convolution(module))(x)


def _packed_convolution(module: nn.Conv2d) -> Convolution:
    """Of many channels by Winograd's products where the image is large enough, else by oneDNN, each packed when it is
    asked for."""
    packed: dict[bool, Convolution] = {}

    def run(x: Tensor) -> Tensor:
        winograd = _by_winograd(module, x)
        if winograd not in packed:
            packed[winograd] = _of_winograd(module) if winograd else _of_onednn(module, x)
        return packed[winograd](x)

    return run


def _of_winograd(module: nn.Conv2d) -> Convolution:
    weight = winograd_weight(module.weight)
    return lambda x: winograd_conv2d(x, weight, module.bias, out_channels=module.out_channels)


def _of_onednn(module: nn.Conv2d, x: Tensor) -> Convolution:
    """Of one pixel as a linear layer: oneDNN's order of its weight fits all sizes of x, its convolution's only those of
    the first x, and would be made anew at every call."""
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0) and module.groups == 1:
        matrix = _packed_matrix(module.weight.flatten(1), x.permute(0, 2, 3, 1))
        return lambda x: _product(x.permute(0, 2, 3, 1), matrix, module.bias).permute(0, 3, 1, 2)
    how = (module.padding, module.stride, module.dilation, module.groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    weight = reorder(module.weight.detach().to_mkldnn(), *how, list(x.shape))
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, weight, module.bias, *how, "none", [], "")


def _by_winograd(module: nn.Conv2d, x: Tensor) -> bool:
    """Else its products are slower than oneDNN's: those of bfloat16 where tiles are few, or by a matrix unit."""
    many = min(module.weight.shape[:2]) >= 64 and _C.isa().startswith("avx512")
    enough = x.dtype == torch.float32 or (_pixels(x) >= 512 and not torch.cpu._is_amx_tile_supported())
    return _is_3x3(module) and many and enough


def _learns_by_winograd(module: nn.Conv2d, x: Tensor) -> bool:
    """Where so much is multiplied that a weight may be packed at every step."""
    if x.dim() != 4 or not learning(x, module.weight, module.bias) or not _computes(module, x):
        return False
    enough = _pixels(x) >= 512 and _pixels(x) * module.weight.numel() >= 9 << 23 and min(x.shape[2:]) >= 8
    return enough and x.dtype == torch.float32 and _by_winograd(module, x)


def _pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _is_3x3(module: nn.Conv2d) -> bool:
    """Of stride 1, padded by 1 with zeros."""
    shape = (module.kernel_size, module.stride, module.padding, module.dilation)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and module.groups == 1 and module.padding_mode == "zeros"


def doubles(module: nn.Conv2d, x: Tensor, size: Sequence[int] | None = None) -> bool:
    """Whether ``convolve_doubled`` takes it: twice the size by nearest neighbours, then a 3x3 convolution."""
    twice = size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
    return twice and _is_3x3(module) and packs(module, x)


# Which of a doubled image's four by four taps (of a transposed convolution) a kernel's three by three add up to.
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def convolve_doubled(module: nn.Conv2d, held: Held[Tensor], x: Tensor) -> Tensor:
    """``module``'s convolution of x doubled, without doubling it: the 9 taps of an output fall on 4 pixels of x, so one
    transposed convolution, 4x4 of stride 2, does it with 4 products in the place of 9."""

    def pack() -> Tensor:
        taps = torch.tensor(_TAPS, dtype=torch.float64)
        weight = torch.einsum("tk,oikl,sl->iots", taps, module.weight.detach().double(), taps).to(x.dtype)
        reorder: Any = torch.ops.mkldnn._reorder_convolution_transpose_weight
        return reorder(weight.contiguous(), *how, list(x.shape))

    x = x.contiguous(memory_format=torch.channels_last)
    how = ([1, 1], [0, 0], [2, 2], [1, 1], 1)  # padding, of the output, stride, dilation, groups
    weight = held.get((module.weight,), pack)
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, module.bias, *how, "none", [], "")


def project(module: nn.Linear, held: Held[Tensor], x: Tensor) -> Tensor:
    """``module``'s product; the bias goes with it, where torch copies it into the result first."""
    if not packs(module, x):
        return nn.Linear.forward(module, x)
    return _product(x, held.get((module.weight,), lambda: _packed_matrix(module.weight, x)), module.bias)


def project_gelu(module: nn.Linear, held: Held[Tensor], x: Tensor, approximate: str = "tanh") -> Tensor:
    """``module``'s product and its GELU, "tanh" or "none", on the way."""
    if not packs(module, x):
        return nn.functional.gelu(nn.Linear.forward(module, x), approximate=approximate)
    matrix = held.get((module.weight,), lambda: _packed_matrix(module.weight, x))
    return _product(x, matrix, module.bias, gelu=approximate)


def is_plain(linear: nn.Linear) -> bool:
    """Whether a linear layer is no more than its product: no adapter's, without hooks, and nobody else's forward."""
    forward = vars(linear).get("forward")
    ours = forward is None or getattr(forward, "func", None) is project
    return type(linear) is nn.Linear and ours and not (linear._forward_hooks or linear._forward_pre_hooks)


def _packed_matrix(weight: Tensor, x: Tensor) -> Tensor:
    """In oneDNN's order, which is made for so many rows as x has, and does for others."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), x.numel() // x.shape[-1])


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    activation: tuple[Any, ...] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, *activation)


Packed = tuple[Tensor, Tensor | None]  # a weight, and a bias


def project_together(modules: Sequence[nn.Linear], held: Held[Packed], x: Tensor) -> tuple[Tensor, ...]:
    """What linear layers make of one x, by one product: parts of its rows."""
    if not all(packs(module, x) for module in modules):
        return tuple(module(x) for module in modules)

    def pack() -> Packed:
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = None
        if any(module.bias is not None for module in modules):
            zeros = (weight.new_zeros(module.out_features) for module in modules)
            bias = torch.cat([z if m.bias is None else m.bias.detach() for m, z in zip(modules, zeros, strict=True)])
        return _packed_matrix(weight, x), bias

    made_of = tuple(parameter for module in modules for parameter in module.parameters())
    y = _product(x, *held.get(made_of, pack))
    return y.split([module.out_features for module in modules], dim=-1)


def project_geglu(module: nn.Linear, held: Held[tuple[Packed, Packed]], x: Tensor) -> Tensor:
    """The first half of ``module``'s product times the GELU of the second, by two products that do so on their way."""
    if not packs(module, x):
        up, gate = nn.Linear.forward(module, x).chunk(2, dim=-1)
        return geglu(gate, up)

    def pack() -> tuple[Packed, Packed]:
        up, gate = module.weight.chunk(2)
        up_bias, gate_bias = (None, None) if module.bias is None else module.bias.detach().chunk(2)
        return (_packed_matrix(up, x), up_bias), (_packed_matrix(gate, x), gate_bias)

    up_by, gate_by = held.get(tuple(module.parameters()), pack)
    gate = _product(x, *gate_by, gelu="none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, *up_by, "mul")


class Conv2d(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: Held[Convolution] = Held()

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, self.held, input)


class Linear(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: Held[Any] = Held()

    def forward(self, input: Tensor, by: Callable[[nn.Linear, Held[Any], Tensor], Tensor] = project) -> Tensor:
        """by: or ``project_gelu`` or ``project_geglu``: always the same, of one layer."""
        return by(self, self.held, input)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(with_rows(input), self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def sinusoidal_embedding(t: Tensor, width: int, *, cosines_first: bool = True, shift: float = 0.0) -> Tensor:
    """(B,) times to (B, width) as diffusers rounds them, which the weights that it saved were trained with: angles in
    float32, off by 1e-4 at large times, where those of ``pygen.timestep_embedding`` are exact.

    shift: of diffusers' ``freq_shift``: with 1, the last wavelength is 20000 pi itself.
    """
    half = width // 2
    powers = -math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - shift)
    angles = t.float()[:, None] * powers.exp()
    parts = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return nn.functional.pad(torch.cat(parts, dim=1), (0, width % 2))


class MLP(nn.Module):
    """Two linear layers and an activation: "silu", or "gelu_tanh"."""

    def __init__(self, width_in: int, width: int, activation: str = "silu") -> None:
        super().__init__()
        self.linear_1 = Linear(width_in, width)
        self.linear_2 = Linear(width, width)
        self.activation = nn.SiLU() if activation == "silu" else nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return y


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x, project_geglu)
        return y


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x, project_gelu)
        return y


class FeedForward(nn.Module):
    """Four times as wide within; by GEGLU (Shazeer 2020) or tanh-approximate GELU."""

    def __init__(self, width: int, *, gated: bool) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [(GEGLU if gated else GELU)(width, 4 * width), nn.Identity(), Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net[2](self.net[0](x))
        return y


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * head_dim) as (batch, heads, length, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(first: Sequence[Tensor], then: Sequence[Tensor]) -> list[Tensor]:
    """Tokens and those behind them, in memory too as projections leave them, heads behind positions: so attention's
    result is a view of what is projected next."""
    return [
        torch.cat([a.transpose(1, 2), b.transpose(1, 2)], dim=1).transpose(1, 2)
        for a, b in zip(first, then, strict=True)
    ]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``pygen.attention``; or torch's, of heads that are too wide for it, as an autoencoder's are on a GPU."""
    if q.shape[-1] <= MOST_HEAD_DIM.get(q.device.type, 0):
        return attention(q, k, v, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal, scale=scale)


class Attention(nn.Module):
    """Of (batch, length, width) to itself or to a text, whose keys and values are held while the text stays the same.

    norm_groups: for one that has a GroupNorm of its own before it.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, text_width: int | None = None, *, bias: bool, norm_groups: int = 0
    ) -> None:
        super().__init__()
        self.heads = heads
        if norm_groups:
            self.group_norm = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.to_q = Linear(width, heads * head_dim, bias=bias)
        self.to_k = Linear(text_width or width, heads * head_dim, bias=bias)
        self.to_v = Linear(text_width or width, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(heads * head_dim, width)])
        self.together: Held[Packed] = Held()
        self.of_text: Held[tuple[Tensor, Tensor]] = Held()

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if text is None:
            parts = project_together((self.to_q, self.to_k, self.to_v), self.together, x)
            q, keys, values = (heads_of(part, self.heads) for part in parts)
        else:
            q, (keys, values) = heads_of(self.to_q(x), self.heads), self._of_text(text)
        y = attend(q, keys, values, mask)
        out: Tensor = self.to_out[0](y.transpose(1, 2).flatten(2))
        return out

    def _keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return heads_of(self.to_k(states), self.heads), heads_of(self.to_v(states), self.heads)

    def _of_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        made_of = (text, *self.to_k.parameters(), *self.to_v.parameters())
        if not may_hold(*made_of):
            return self._keys_and_values(text)
        return self.of_text.get(made_of, lambda: self._keys_and_values(text))


def may_hold(states: Tensor, *parameters: Tensor) -> bool:
    """Whether what is made of states and parameters stays what it is while they do."""
    changes = learning(states, *parameters) or states.is_inference()
    return not (changes or torch.compiler.is_compiling() or torch.is_autocast_enabled(states.device.type))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), the time's embedding projected."""

    def __init__(self, channels_in: int, channels: int, time_width: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=eps)
        self.conv1 = Conv2d(channels_in, channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels_in == channels else Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: (batch, channels, height, width); time: (batch, time_width), after its activation."""
        y = self.conv1(silu_of_norm(self.norm1, x))
        if time is not None:
            y = y + self.time_emb_proj(time)[:, :, None, None]
        shortcut: Tensor = self.conv_shortcut(x)
        return shortcut + self.conv2(silu_of_norm(self.norm2, y))


def silu_of_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x)), or of norm(x) (1 + scale) + shift, both (batch, channels)."""
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if scale is not None and shift is not None:
        factor = 1 + scale.to(torch.promote_types(scale.dtype, torch.float32))
        weight = factor if weight is None else weight * factor
        bias = shift.to(factor.dtype) if bias is None else bias * factor + shift
    return group_norm_silu(x, weight, bias, norm.num_groups, norm.eps)


class Downsample(nn.Module):
    """A convolution of stride 2, padded by 1 on all sides, or as the autoencoder's: right and below."""

    def __init__(self, channels: int, *, everywhere: bool = True) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if everywhere else 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x if self.everywhere else nn.functional.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Nearest neighbours, twice the size or ``size``, then a convolution."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = Conv2d(channels, out_channels or channels, 3, padding=1)
        self.held: Held[Tensor] = Held()

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        if doubles(self.conv, x, size):
            return convolve_doubled(self.conv, self.held, x)
        how: dict[str, Any] = {"scale_factor": 2.0} if size is None else {"size": list(size)}
        y: Tensor = self.conv(nn.functional.interpolate(x, mode="nearest", **how))
        return y
