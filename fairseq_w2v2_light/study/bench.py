"""How fast models run on this machine and in how much memory: ours beside others, in turns in one process."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor, nn

from ..nn.counts import count_macs
from ..nn.operating_point import OperatingPoint
from ..runtime.checkpoint import is_checkpoint_file
from ..runtime.cpu import cpu_name
from ..runtime.ctc import CtcModel
from ..runtime.folder import is_model_folder
from ..runtime.half import multiplies_bfloat16
from ..runtime.load import SPECIAL_SYMBOLS, load_ctc
from ..runtime.prepare import DTYPES as _PREPARED
from ..runtime.prepare import prepare_, require_device
from ..runtime.quantized import INT8, best_method
from ..runtime.timings import percentile
from .peers import PEERS
from .resident import added_memory, in_own_process
from .speed import in_turns, torch_threads

# the labels of a model with random weights: LibriSpeech's letters
SYMBOLS = [*SPECIAL_SYMBOLS, *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
DTYPES = tuple(dtype for dtype in _PREPARED if dtype != "auto")
# ours as the runtime runs it (prepared for this CPU or GPU), and ours as it was loaded
OURS, LOADED = "ours", "loaded"
IMPLEMENTATIONS = {
    OURS: "ours",
    LOADED: "ours, as loaded",
    "fairseq": "stock fairseq",
    "huggingface": "Hugging Face, SDPA",
    "onnx": "onnxruntime",
    "onnx-int8": "onnxruntime int8",
}
# seconds of audio that are timed at most: a day
LONGEST = 86_400
# edges of the square matrices whose products say what a machine can do; which is best depends on its caches
_EDGES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}
_Module = TypeVar("_Module", bound=nn.Module)
# seconds of audio after which a process has everything that it needs for any audio
_WARM_UP = 0.5


@dataclass(frozen=True)
class Contender:
    """What a row of the table runs, in words, so that another process can build it too.

    source: a checkpoint or model folder, or a recipe (random weights) with overrides like "model.unique_layers=12".
    implementation: see IMPLEMENTATIONS. dtype: one of DTYPES. point: of operation, in text form; empty: the model's
    own. compiled: by torch.compile.
    """

    name: str
    source: str
    overrides: Tuple[str, ...] = ()
    implementation: str = OURS
    dtype: str = "float32"
    point: str = ""
    compiled: bool = False

    @property
    def computes(self) -> Tuple[str, Tuple[str, ...], str]:
        """Weights and operating point: contenders that have these in common are to have the same logits."""
        return self.source, self.overrides, self.point


@dataclass(frozen=True)
class Setting:
    """What all contenders of a table hear, and where they run: seconds of audio, utterances, threads of the CPU."""

    seconds: float = 10.0
    batch_size: int = 1
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One contender in one setting; all times in seconds, for the whole batch.

    real_time_factor: seconds of compute per second of audio, throughput: its inverse, both of the median. peak_bytes:
    what a call adds at most to the memory that the loaded model takes (None: not measured). macs: of the batch, as
    `w2v2-light cost` counts them: those of direct sums, whatever computes them. peak_fraction: reached of the machine's
    fastest matrix product in this dtype, both by their FLOPs and median times (int8: the fastest in any dtype that int8
    models compute in); best_fraction: the same of the fastest runs. speed_up, mac_ratio: times faster than the first
    row, MACs of the first row by those of this one. difference: largest |logit - logit of the first row with these
    weights at this point|.
    """

    contender: Contender
    median: float
    least: float
    p90: float
    real_time_factor: float
    throughput: float
    peak_bytes: Optional[int]
    macs: int
    gflops: float
    peak_fraction: float
    best_fraction: float
    speed_up: float
    mac_ratio: float
    difference: float


class Table(NamedTuple):
    """The rows of a setting; left_out: why contenders did not run.

    peaks: FLOP/s of the fastest size of matrix products by dtype, by its median time, as the rows' are; best_peaks: of
    the one fastest run of any size.
    """

    setting: Setting
    rows: List[Row]
    peaks: Dict[str, float]
    best_peaks: Dict[str, float]
    left_out: Dict[str, str]


def load_model(source: str, overrides: Sequence[str] = ()) -> CtcModel:
    """The CTC model of a checkpoint or model folder, or of a recipe with random weights (the same in every call).

    A pre-training recipe gets a CTC head of 32 labels. Raises ValueError for overrides of anything but a recipe.
    """
    if is_model_folder(source) or is_checkpoint_file(source):
        if overrides:
            raise ValueError(f"'{source}': overrides are for recipes; leave out {' '.join(overrides)}")
        return load_ctc(source)
    from .cost import load_subject  # fairseq's configurations

    subject = load_subject(source, list(overrides))
    point = OperatingPoint.parse(subject.own_point) if subject.own_point else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CtcModel(subject.network, SYMBOLS, subject.normalizes, point=point)
    return model.eval().requires_grad_(False)


def operating_points(source: str, overrides: Sequence[str], points: Sequence[str]) -> List[str]:
    """`points`, or for ["all"] every one of the model; raises ValueError for one that it was not trained for."""
    trained = load_model(source, overrides).config.operating_points
    if list(points) == ["all"]:
        return [str(point) for point in trained.points()]
    for point in points:
        if point:
            trained.check(OperatingPoint.parse(point))
    return list(points)


class _Logits(nn.Module):
    """A CtcModel at one point, as a function from waveforms to logits alone."""

    def __init__(self, model: CtcModel, point: Optional[OperatingPoint]):
        super().__init__()
        self.model, self.point = model, point

    def forward(self, wave: Tensor) -> Tensor:
        return self.model(wave, point=self.point)[0]


def build(
    contender: Contender,
    setting: Setting,
    model: Optional[CtcModel] = None,
    networks: Optional[Dict[Contender, CtcModel]] = None,
) -> Callable[[Tensor], Tensor]:
    """A contender as a function from waveforms (batch, samples) to logits, ready to be timed.

    model: the contender's, where it was loaded before; it is not changed. networks: those of ours that were prepared
    before, which one at another point is run with, and where a new one is kept. Raises ValueError that says why for
    what cannot be run here.
    """
    model = load_model(contender.source, contender.overrides) if model is None else model
    if contender.implementation in PEERS:
        return _peer(contender, setting, model)
    networks = {} if networks is None else networks
    at_any_point = replace(contender, name="", point="", compiled=False)
    if at_any_point not in networks:
        networks[at_any_point] = _network(contender, setting, model)
    return _ours(contender, networks[at_any_point])


def _peer(contender: Contender, setting: Setting, model: CtcModel) -> Callable[[Tensor], Tensor]:
    run = PEERS[contender.implementation](model, _point(contender))
    if isinstance(run, nn.Module):
        return _as_function(_to(run, contender, setting), contender, getattr(torch, contender.dtype))
    if setting.device != "cpu":
        raise ValueError("onnxruntime runs on the CPU here; choose --device cpu")
    return run


def _network(contender: Contender, setting: Setting, model: CtcModel) -> CtcModel:
    """A copy of `model` as a contender of ours runs it, at any point."""
    network = copy.deepcopy(model)
    if contender.implementation == OURS:
        rows = setting.batch_size * int(model.config.frames(_samples(model, setting)))
        prepare_(network, contender.dtype, rows, setting.device)
        return network
    return _to(network, contender, setting)


def _ours(contender: Contender, network: CtcModel) -> Callable[[Tensor], Tensor]:
    # a prepared model hears float32 in every precision
    hears = "float32" if contender.implementation == OURS else contender.dtype
    return _as_function(_Logits(network, _point(contender)), contender, getattr(torch, hears))


def _to(run: _Module, contender: Contender, setting: Setting) -> _Module:
    """A network that is not prepared, where and in which precision it is to run."""
    if contender.dtype == INT8:
        raise ValueError("int8: only our prepared models run in it; choose another dtype")
    if (contender.dtype, setting.device) == ("float32", "cpu"):
        return run
    return run.to(setting.device, getattr(torch, contender.dtype))


def _as_function(run: nn.Module, contender: Contender, hears: torch.dtype) -> Callable[[Tensor], Tensor]:
    module = torch.compile(run) if contender.compiled else run
    return lambda wave: module(wave.to(hears))


def _point(contender: Contender) -> Optional[OperatingPoint]:
    return OperatingPoint.parse(contender.point) if contender.point else None


def compare(
    contenders: Sequence[Contender],
    setting: Setting,
    repeats: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    memory: bool = True,
) -> Table:
    """Times all contenders in a setting, in turns with products of matrices, and then their memory one by one.

    A contender of others, or compiled, that cannot be built is left out. memory: False leaves the peaks of memory out;
    on a CPU each needs a process of its own. Raises ValueError for a setting that is none, and for a contender of ours
    that cannot be run.
    """
    check(setting, repeats)
    with torch_threads(setting.threads):
        return _compare(contenders, setting, repeats, clock, memory)


def _compare(contenders, setting, repeats, clock, memory) -> Table:
    runs, left_out = _build_all(contenders, setting)
    if not runs:
        raise ValueError(f"nothing to run: {'; '.join(left_out.values()) or 'no contenders'}")
    with torch.inference_mode():
        products = _products({contender.dtype for contender in runs}, setting)
        # the caches are as the products leave them for one call, which took up to three times as long in a small
        # network: that call is the last contender's, and does not count
        calls: Dict[Any, Callable[[], Any]] = {**products, "after the products": runs[next(reversed(runs))].call}
        calls.update((contender, run.call) for contender, run in runs.items())
        seconds = in_turns({name: timer(call, clock) for name, call in calls.items()}, repeats)
        logits = {contender: run.call().float().cpu() for contender, run in runs.items()}
        added: Dict[Contender, Optional[int]] = dict.fromkeys(runs)
        if memory and setting.device != "cpu":
            added = {contender: _peak_on_gpu(run.call) for contender, run in runs.items()}
    peaks: Dict[str, float] = {}
    best_peaks: Dict[str, float] = {}
    for dtype, edge in products:
        for found, typical in ((peaks, statistics.median), (best_peaks, min)):
            found[dtype] = max(found.get(dtype, 0.0), 2 * edge**3 / typical(seconds[dtype, edge]))
    macs = {contender: run.macs for contender, run in runs.items()}
    if memory and setting.device == "cpu":
        # other processes need memory now
        for holder in (runs, calls, products):
            holder.clear()
        added = {contender: peak_memory(contender, setting) for contender in added}
    first, references, rows = next(iter(added)), {}, []
    audio = setting.seconds * setting.batch_size
    for contender, peak_bytes in added.items():
        median = statistics.median(seconds[contender])
        reference = logits[references.setdefault(contender.computes, contender)]
        flops = 2 * macs[contender] / median
        rows.append(
            Row(
                contender=contender,
                median=median,
                least=min(seconds[contender]),
                p90=percentile(seconds[contender], 90),
                real_time_factor=median / audio,
                throughput=audio / median,
                peak_bytes=peak_bytes,
                macs=macs[contender],
                gflops=flops / 1e9,
                peak_fraction=flops / _peak(peaks, contender),
                best_fraction=2 * macs[contender] / min(seconds[contender]) / _peak(best_peaks, contender),
                speed_up=statistics.median(seconds[first]) / median,
                mac_ratio=macs[first] / macs[contender],
                difference=float((logits[contender] - reference).abs().max()),
            )
        )
    return Table(setting, rows, peaks, best_peaks, left_out)


def _peak(peaks: Dict[str, float], contender: Contender) -> float:
    return max(peaks.values()) if contender.dtype == INT8 else peaks[contender.dtype]


class _Run(NamedTuple):
    """A contender that is ready: a call that computes its logits, and the MACs of that."""

    call: Callable[[], Tensor]
    macs: int


def _build_all(contenders: Sequence[Contender], setting: Setting) -> Tuple[Dict[Contender, _Run], Dict[str, str]]:
    """All contenders that can run, and the reasons of the others.

    A model is loaded once, and one network of ours runs at all its points, as it does for its users: each of them finds
    in the cache what the one before left there.
    """
    models: Dict[Tuple[str, Tuple[str, ...]], CtcModel] = {}
    networks: Dict[Contender, CtcModel] = {}
    runs: Dict[Contender, _Run] = {}
    left_out: Dict[str, str] = {}
    for contender in contenders:
        source = contender.source, contender.overrides
        if source not in models:
            models[source] = load_model(*source)
        model = models[source]
        point = _point(contender) or model.point
        macs = setting.batch_size * sum(
            count_macs(model.config, _samples(model, setting), point, len(model.symbols)).values()
        )
        try:
            call = functools.partial(build(contender, setting, model, networks), _wave(model, setting))
            if contender.compiled:
                _require_compilable(call)
        except ValueError as error:
            if contender.implementation not in PEERS and not contender.compiled:
                raise
            left_out[contender.name] = str(error)
        else:
            runs[contender] = _Run(call, macs)
    return runs, left_out


def _require_compilable(call: Callable[[], Tensor]) -> None:
    """Raises ValueError with the reason where torch.compile, which works in the first call, does not."""
    try:
        with torch.inference_mode():
            call()
    except Exception as error:  # it raises all kinds, for lack of a C++ compiler too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch.compile fails here: {reason}") from error


def check(setting: Setting, repeats: int = 1) -> None:
    """Raises ValueError for a setting that is none, or not here, and for no repeats."""
    for what, found in (("seconds", setting.seconds), ("batch size", setting.batch_size), ("repeats", repeats)):
        if not 0 < found < math.inf:
            raise ValueError(f"{what}: found {found:g}, expected a positive number")
    if setting.threads < 1:
        raise ValueError(f"threads: found {setting.threads}, expected 1 or more")
    if setting.seconds > LONGEST:
        raise ValueError(f"seconds: found {setting.seconds:g}, expected at most {LONGEST:,}")
    require_device(setting.device)


def _samples(model: CtcModel, setting: Setting) -> int:
    return round(setting.seconds * model.sample_rate)


def _wave(model: CtcModel, setting: Setting) -> Tensor:
    """Noise (batch, samples): the speed does not depend on what is heard."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch_size, _samples(model, setting), generator=generator).to(setting.device)


def timer(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that makes a call, on whichever device, and returns the seconds that it took."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def timed() -> float:
        wait()
        start = clock()
        call()
        wait()
        return clock() - start

    return timed


def _products(dtypes, setting: Setting) -> Dict[Tuple[str, int], Callable[[], Tensor]]:
    """Products of square matrices, by (dtype, edge), of all dtypes that contenders of `dtypes` compute in."""
    dtypes = set(dtypes)
    if INT8 in dtypes:
        # what of a network is not integers, and on some CPUs the integers too
        dtypes |= {"float32", *(["bfloat16"] if multiplies_bfloat16() else [])}
        dtypes -= set() if _multiplies_int8() else {INT8}
    products = {}
    for dtype in sorted(dtypes):
        multiply = torch._int_mm if dtype == INT8 else torch.mm
        for edge in _EDGES[setting.device]:
            left, right = (
                (30 * torch.randn(edge, edge, device=setting.device)).to(getattr(torch, dtype)) for _ in range(2)
            )
            out = torch.empty_like(left, dtype=torch.int32 if dtype == INT8 else None)
            # transposed, as the weight of a Linear is
            products[dtype, edge] = functools.partial(multiply, left, right.t(), out=out)
    return products


def _multiplies_int8() -> bool:
    """Whether this torch multiplies matrices of int8 on CPUs."""
    ones = torch.ones(32, 32, dtype=torch.int8)
    try:
        return bool((torch._int_mm(ones, ones.t()) == 32).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


# ---- memory


def _peak_on_gpu(call: Callable[[], Tensor]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(contender: Contender, setting: Setting) -> Optional[int]:
    """Bytes that calls add at most to the memory of a process that has the contender and has run it on short audio.

    On the CPU, in a process of its own. None where the system does not say (anything but Linux).
    """
    return in_own_process(_peak_of_calls, contender, setting)


def _peak_of_calls(contender: Contender, setting: Setting) -> Optional[int]:
    torch.set_num_threads(setting.threads)
    model = load_model(contender.source, contender.overrides)
    run, wave = build(contender, setting, model), _wave(model, setting)
    with torch.inference_mode():
        # what is compiled is compiled for a length
        short = 1.0 if contender.compiled else min(1.0, _WARM_UP / setting.seconds)
        run(wave[:, : max(1, round(wave.size(1) * short))])
        return added_memory(lambda: [run(wave) for _ in range(2)])


# ---- what is printed


def machine(device: str = "cpu") -> Dict[str, str]:
    """What numbers depend on: torch, the CPU and what it multiplies, the GPU."""
    native = "native" if multiplies_bfloat16() else "not on this CPU"
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" and torch.cuda.is_available() else {}
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "capability": capability,
        "bfloat16": native,
        "int8": best_method().name,
        **gpu,
    }


def format_machine(found: Dict[str, str]) -> str:
    """One line of `machine`."""
    return (
        f"torch {found['torch']}; {found['cpu']}, {found['capability']}; bfloat16: {found['bfloat16']}; "
        f"int8: {found['int8']}" + (f"; {found['gpu']}" if "gpu" in found else "")
    )


COLUMNS = (
    *("what", "ms, median", "ms, min", "ms, p90", "real-time factor", "s of audio / s", "peak MiB", "GMACs"),
    *("of the product's speed", "at best", "speed-up", "/ MAC ratio", "difference"),
)


def format_table(table: Table) -> str:
    """A Markdown table, with the setting above it and what was left out below."""
    setting = table.setting
    peaks = ", ".join(
        f"{peak / 1e9:.0f} GFLOP/s in {dtype} (at best {table.best_peaks[dtype] / 1e9:.0f})"
        for dtype, peak in table.peaks.items()
    )
    utterances = f"{setting.batch_size} utterance{'s' if setting.batch_size > 1 else ''} of {setting.seconds:g} s"
    where = setting.device if setting.device != "cpu" else f"{setting.threads} thread{'s' * (setting.threads > 1)}"
    lines = [f"{utterances}, {where}; matrix products: {peaks}", "", _row(COLUMNS), _row(["---"] * len(COLUMNS), "")]
    computing = Counter(row.contender.computes for row in table.rows)
    for row in table.rows:
        cells = [row.contender.name, *(f"{value * 1e3:.1f}" for value in (row.median, row.least, row.p90))]
        cells += [f"{row.real_time_factor:.4f}", f"{row.throughput:.1f}"]
        cells += ["" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}", f"{row.macs / 1e9:.2f}"]
        cells += [
            f"{row.peak_fraction:.2f}",
            f"{row.best_fraction:.2f}",
            f"{row.speed_up:.2f}",
            f"{row.speed_up / row.mac_ratio:.2f}",
        ]
        lines.append(_row([*cells, f"{row.difference:.1e}" if computing[row.contender.computes] > 1 else ""]))
    lines += [f"\nwithout {name}: {reason}" for name, reason in table.left_out.items()]
    return "\n".join(lines)


def _row(cells: Sequence[str], space: str = " ") -> str:
    return f"|{space}" + f"{space}|{space}".join(cells) + f"{space}|"


def as_json(table: Table) -> Dict[str, Any]:
    """A table as plain values."""
    return {
        "setting": asdict(table.setting),
        "peaks": table.peaks,
        "best_peaks": table.best_peaks,
        "rows": [asdict(row) for row in table.rows],
        "left_out": table.left_out,
    }
