"""Hard concrete gates: which frontend channels, heads, FFN channels and hidden channels a model keeps."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .config import EncoderConfig
from .gating import GateValues
from .precision import Fp32Parameters

_Values = Callable[[List["HardConcrete"]], List[Tensor]]
# of the probability that an open gate is drawn as not zero
_LIMIT = 1e-6


class HardConcrete(Fp32Parameters):
    """Gates z in [0, 1] that are 0 or 1 with a probability of their own, and through which gradients flow.

    Louizos et al. (arXiv 1712.01312), as in HJ-Pruning (arXiv 2302.14132), eqs. (2) and (3): with u ~ U(0, 1),
    v = sigmoid((log(u / (1 - u)) + log alpha) / beta), z = min(1, max(0, (high - low) v + low)). The paper gives no
    constants; beta 2/3, low -0.1, high 1.1 are those of DPHuBERT and CoFi, `open_probability` (P(z != 0) at the start)
    is ours. Parameters and arithmetic stay in fp32 whatever becomes of the module (`half()`, autocast): in half
    precision, draws of u would round to 1, and small steps of log alpha to nothing.

    log_alpha: (size,). Training draws; evaluation gives `decided()`.
    """

    def __init__(
        self, size: int, open_probability: float = 0.99, beta: float = 2 / 3, low: float = -0.1, high: float = 1.1
    ):
        super().__init__()
        if not 0 < open_probability < 1:
            raise ValueError(f"open_probability: found {open_probability}, expected more than 0 and less than 1")
        if size < 1 or beta <= 0 or not low < 0 < 1 < high:
            raise ValueError(
                f"hard concrete: found size {size}, beta {beta}, low {low}, high {high}; expected size >= 1, beta > 0, "
                "low < 0 and high > 1"
            )
        self.open_probability, self.beta, self.low, self.high = open_probability, beta, low, high
        self.shift = beta * math.log(-low / high)
        start = math.log(open_probability / (1 - open_probability)) + self.shift
        self.log_alpha = nn.Parameter(torch.full((size,), start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """(size,) fp32."""
        return self.draw() if self.training else self.decided()

    def draw(self, uniform: Optional[Tensor] = None) -> Tensor:
        """z (size,) of one draw; `uniform` (size,) in (0, 1) instead of a random one. Eq. (2)."""
        if uniform is None:
            uniform = torch.rand_like(self.log_alpha)
        uniform = uniform.float().clamp(_LIMIT, 1 - _LIMIT)
        v = torch.sigmoid((uniform.log() - (-uniform).log1p() + self.log_alpha) / self.beta)
        return self._stretched(v)

    def probability(self) -> Tensor:
        """P(z != 0) (size,). Eq. (3)."""
        return torch.sigmoid(self.log_alpha - self.shift)

    def mean(self, points: int = 256) -> Tensor:
        """E[z] (size,): the integral of P(z > t) over 0 < t < 1, by the midpoint rule."""
        t = (torch.arange(points, device=self.log_alpha.device) + 0.5) / points
        v = (t - self.low) / (self.high - self.low)
        above = torch.sigmoid(self.log_alpha.unsqueeze(-1) - self.beta * torch.logit(v))
        return above.mean(-1)

    def decided(self) -> Tensor:
        """The gates (size,) of evaluation, see `decide`."""
        return decide([self])[0]

    @torch.no_grad()
    def estimate(self) -> Tensor:
        """What an open gate (size,) is in evaluation; exactly 1 for gates as at the start.

        The usual min(1, (high - low) sigmoid(log alpha) + low), or the mean if that is more.
        """
        return torch.maximum(self._stretched(torch.sigmoid(self.log_alpha)), self.mean())

    def _stretched(self, v: Tensor) -> Tensor:
        return ((self.high - self.low) * v + self.low).clamp(0.0, 1.0)


@torch.no_grad()
def decide(gates: Sequence[HardConcrete]) -> List[Tensor]:
    """The gates of evaluation of several layers: as many are open as are expected to be, the most likely ones.

    Open are those that are as likely open as at the start, and of the others the expected number, rounded once for all
    layers (CoFi's rule, there for each layer: what goes is what the penalty counted). An open gate has its `estimate`,
    a closed one is 0. All may be closed.
    """
    probability = torch.cat([gate.probability() for gate in gates])
    # rounding must not close a gate that training has not touched
    sure = probability > torch.cat([torch.full_like(gate.log_alpha, gate.open_probability - 1e-3) for gate in gates])
    count = int((sure.sum() + probability[~sure].sum()).round())
    kept = torch.zeros_like(probability)
    kept[probability.topk(count).indices] = 1.0
    parts = kept.split([gate.log_alpha.numel() for gate in gates])
    return [gate.estimate() * part for gate, part in zip(gates, parts)]


class Gates(nn.Module):
    """The gates of a network, those of `config.prune_units`.

    They belong to stored layers: wherever such a layer runs, the same gates hold. Stored layers that use each other's
    attention maps have their head gates in common. Without a projection between frontend and Transformer the channels
    of the last frontend layer are the hidden channels, and have their gates. State names: conv.N, heads.N, ffn.N (N:
    frontend layer, stored layer), hidden; each with `log_alpha`.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        units = config.prune_units
        stored = range(config.unique_layers)
        own_conv = len(config.conv_layers) - (not config.projects)
        groups = config.map_groups
        self._heads_of = {index: group for group, members in groups.items() for index in members}
        sizes: Dict[str, Dict[int, int]] = {
            "conv": {index: layer[0] for index, layer in enumerate(config.conv_layers[:own_conv])},
            "heads": {group: config.heads_of(group) for group in groups},
            "ffn": {index: config.ffn_of(index) for index in stored},
        }
        for unit, layers in sizes.items():
            gates = {str(index): HardConcrete(size) for index, size in layers.items() if size}
            setattr(self, unit, nn.ModuleDict(gates) if unit in units else None)
        self.hidden = HardConcrete(config.dim) if "hidden" in units else None
        self._shape = len(config.conv_layers), config.unique_layers
        self._last_is_hidden = not config.projects and self.conv is not None

    def forward(self) -> GateValues:
        """One draw in training, the decided gates in evaluation."""
        return self._collect(lambda gates: [gate.draw() for gate in gates]) if self.training else self.decided()

    def decided(self) -> GateValues:
        """The gates of evaluation. Heads, and FFN channels, are decided together: they are few, or cost the same."""
        return self._collect(lambda gates: [gate.decided() for gate in gates], decide)

    def probabilities(self) -> GateValues:
        """P(z != 0) of each gate, with gradients; their sums are the expected widths."""
        return self._collect(lambda gates: [gate.probability() for gate in gates])

    def _collect(self, values: _Values, of_blocks: Optional[_Values] = None) -> GateValues:
        """`values` of all gates of a unit; `of_blocks` of heads, and of FFN channels (None: the same)."""

        def by_key(gates: Optional[nn.ModuleDict], keys: Iterable[int], function: _Values):
            if not gates:
                return None if gates is None else [None for _ in keys]
            found = dict(zip(gates, function(list(gates.values()))))
            return [found.get(str(key)) for key in keys]

        conv_layers, stored_layers = map(range, self._shape)
        hidden = None if self.hidden is None else values([self.hidden])[0]
        conv = by_key(self.conv, conv_layers, values)
        if self._last_is_hidden:
            conv[-1] = hidden
        heads = by_key(self.heads, [self._heads_of[layer] for layer in stored_layers], of_blocks or values)
        return GateValues(conv, heads, by_key(self.ffn, stored_layers, of_blocks or values), hidden)
