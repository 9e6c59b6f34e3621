"""How much of a network its gates remove, and the penalty that brings it to a target (HJ-Pruning, arXiv 2302.14132)."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..nn.config import PRUNE_UNITS, EncoderConfig
from ..nn.counts import Widths, count_macs, count_parameters, expected_widths
from ..nn.gates import Gates, GateValues
from ..nn.operating_point import OperatingPoint
from ..nn.precision import Fp32Parameters

# the group of fairseq's composite optimizer that trains the multipliers
MULTIPLIERS_GROUP = "multipliers"
# method -> its constraints
METHODS: Dict[str, Tuple[str, ...]] = {
    "size": ("size",),
    "sepsize": ("cnn", "transformer"),
    "mac": ("mac",),
    "transformer": ("transformer",),
}
# MACs are those of 10 s of audio at 16 kHz, whatever the batch holds (HJ-Pruning, section 3)
VIRTUAL_SAMPLES = 160_000
_LEVELS = "▁▂▃▄▅▆▇█"


class Multipliers(Fp32Parameters):
    """Lagrange multipliers l1 and l2 of each constraint, which every optimizer that descends makes ascend.

    l1 starts at 0, l2 at `stiffness`. The paper does not say where they start. From 0, both grow while the gates lag
    behind the ramp, and have no time to shrink when the target is passed: closed gates hardly open again. With a large
    l2 the sparsity follows the ramp from the beginning, and what pushes vanishes with the gap. `values` (constraints,
    2) stay in fp32 whatever becomes of the module (`half()`, autocast).
    """

    def __init__(self, constraints: Sequence[str], stiffness: float = 500.0):
        super().__init__()
        self.constraints = tuple(constraints)
        self.values = nn.Parameter(torch.tensor([[0.0, float(stiffness)]] * len(self.constraints)))
        self.values.param_group = MULTIPLIERS_GROUP

    def penalty(self, sparsity: Dict[str, Tensor], target: Dict[str, float]) -> Tensor:
        """g = sum over the constraints of l1 (s - t) + l2 (s - t)^2, a number. Eq. (6), and (9) for two constraints.

        The gradient is that of g for s, and that of -g for l1 and l2: max over the multipliers, min over the rest.
        """
        values = 2 * self.values.detach() - self.values
        gaps = torch.stack([sparsity[name].float() - target[name] for name in self.constraints])
        return (values[:, 0] * gaps + values[:, 1] * gaps.square()).sum()


def ramped(target: float, updates: int, ramp_updates: int) -> float:
    """The target after `updates` updates of pruning: it grows from 0 to `target` over `ramp_updates`, linearly."""
    if updates < 0:
        return 0.0
    return target if updates >= ramp_updates else target * updates / ramp_updates


def sparsities(
    method: str,
    config: EncoderConfig,
    probabilities: GateValues,
    vocabulary: int = 0,
    point: Optional[OperatingPoint] = None,
) -> Dict[str, Tensor]:
    """The fraction of `config`'s network that is pruned, of each constraint of a method, with gradients.

    probabilities: P(z != 0) of each gate (`Gates.probabilities`): expected sparsity; or what is open as 1 and what is
    closed as 0 (`opened`): reached sparsity. vocabulary: symbols of a CTC projection, which counts as well.

    size: all parameters of backbone and CTC projection, without pre-training heads. sepsize: cnn, the parameters of
    the frontend, and transformer, those of the stored Transformer layers. mac: the MACs of one utterance of 10 s at the
    operating point (None: the network's default), CTC projection included. transformer: the parameters of the stored
    Transformer layers. Gates themselves count nowhere.
    """
    widths = expected_widths(config, probabilities)
    now = _costs(method, config, vocabulary, point, widths)
    whole = _costs(method, config, vocabulary, point, None)
    return {name: torch.as_tensor(1 - now[name] / whole[name], dtype=torch.float32) for name in METHODS[method]}


def _costs(
    method: str, config: EncoderConfig, vocabulary: int, point: Optional[OperatingPoint], widths: Optional[Widths]
) -> Dict[str, Tensor]:
    if method == "mac":
        point = config.operating_points.default if point is None else point
        return {"mac": sum(count_macs(config, VIRTUAL_SAMPLES, point, vocabulary, widths).values())}
    parameters = count_parameters(config, vocabulary, widths)
    if method == "size":
        return {"size": sum(parameters.values())}
    return {"cnn": parameters["frontend"], "transformer": parameters["layers"]}


def gates_map(gates: GateValues, function: Callable[[Tensor], Tensor]) -> GateValues:
    """`function` of the values of each gate."""

    def each(values):
        return None if values is None else [None if value is None else function(value) for value in values]

    hidden = None if gates.hidden is None else function(gates.hidden)
    return GateValues(each(gates.conv), each(gates.heads), each(gates.ffn), hidden)


def opened(gates: GateValues) -> GateValues:
    """1.0 where a gate is open, else 0.0."""
    return gates_map(gates, lambda value: (value > 0).float())


def check_method(method: str, config: EncoderConfig, targets: Dict[str, float], vocabulary: int = 0) -> None:
    """Raises ValueError for a method, gates or targets that cannot work together.

    targets: of each constraint of the method, as `sparsities` names them.
    """
    if method not in METHODS:
        raise ValueError(f"criterion.method: found '{method}', expected one of {', '.join(METHODS)}")
    units = list(config.prune_units)
    wanted = [unit for unit in PRUNE_UNITS if method != "transformer" or unit != "conv"]
    advice = f"set model.prune_units=[{','.join(wanted)}]"
    if not units:
        raise ValueError(f"model.prune_units: empty, but criterion light_prune needs gates to close; {advice}")
    if method == "transformer" and "conv" in units:
        raise ValueError(
            f"model.prune_units: found {units}, but criterion.method=transformer prunes the Transformer only; {advice}"
        )
    for name, target in targets.items():
        if not 0 <= target < 1:
            raise ValueError(
                f"criterion.{target_key(name)}: found {target}, expected the fraction to prune, from 0 to below 1"
            )
    with torch.no_grad():
        closed = gates_map(Gates(config).probabilities(), torch.zeros_like)
        most = sparsities(method, config, closed, vocabulary)
    for name, target in targets.items():
        if target > most[name]:
            raise ValueError(
                f"criterion.{target_key(name)}: found {target}, but gates on {units} can remove at most "
                f"{most[name]:.1%} of what method {method} counts; lower it, or {advice}"
            )


def target_key(constraint: str) -> str:
    """The criterion's key for the target of a constraint."""
    return "cnn_target" if constraint == "cnn" else "target"


def kept_bars(gates: GateValues) -> str:
    """What decided gates leave of each layer, as text: `conv ▅▇█ heads █▅ ffn ▆▃ hidden 98 %`; `·`: nothing."""

    def bar(values: List[Optional[Tensor]]) -> str:
        return "".join("·" if value is None else _level(_open_fraction(value)) for value in values)

    named = (("conv", gates.conv), ("heads", gates.heads), ("ffn", gates.ffn))
    parts = [f"{name} {bar(values)}" for name, values in named if values is not None]
    if gates.hidden is not None:
        parts.append(f"hidden {_open_fraction(gates.hidden):.0%}".replace("%", " %"))
    return " ".join(parts)


def _open_fraction(gate: Tensor) -> float:
    return float((gate > 0).float().mean())


def _level(fraction: float) -> str:
    return _LEVELS[min(int(fraction * len(_LEVELS)), len(_LEVELS) - 1)] if fraction > 0 else "·"
