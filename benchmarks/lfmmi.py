"""LF-MMI's forward and backward beside torch's CTC loss, on the same input.

    python benchmarks/lfmmi.py [--threads 2] [--repeats 9] [--device cpu]

Prints a table: milliseconds of one forward and backward (median and fastest of interleaved repeats) at --frames and at
twice as many of the same transcripts, the ratio of the fastest, and the memory that one adds at its peak. On a machine
that does other work the fastest tells more. Exits with 1 when the fastest run of an order-2 loss takes more than
--limit seconds, or its ratio lies outside of 1.8 to 2.2 (linear in frames), but not with --smoke.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from limits import verdict

from fairseq_w2v2_light.criterions.denominator import estimate
from fairseq_w2v2_light.criterions.lfmmi import distillation_lfmmi, lfmmi_loss

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
LINEAR = (1.8, 2.2)
SMOKE = dict(batch=2, frames=60, symbols=8, repeats=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--symbols", type=int, default=32, help="size of the dictionary, fairseq's four included")
    parser.add_argument("--orders", type=int, nargs="+", choices=(2, 3), default=(2, 3))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds for an order-2 loss at --frames (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="short audio, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    # First, in forked processes: a thread pool or a device that is in use does not survive a fork.
    losses = ["ctc"] + [f"{kind} order {order}" for order in args.orders for kind in ("training", "distillation")]
    peaks = {name: peak_memory(name, args) for name in losses}
    torch.set_num_threads(args.threads)
    seconds = measure(losses, args)
    sizes = f"{args.batch} x {args.frames} and {args.batch} x {2 * args.frames} frames x {args.symbols} symbols"
    sizes = f"{args.batch} x {args.frames} and {args.batch} x {2 * args.frames} frames x {args.symbols} symbols"
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads; median (fastest) of {args.repeats}")
    print(f"{sizes}; forward + backward\n")
    print(f"| loss | {args.frames} frames, ms | {2 * args.frames} frames, ms | ratio | peak MiB | peak MiB, doubled |")
    print("|---|---|---|---|---|---|")
    missed = []
    for name in losses:
        once, twice = seconds[name, args.frames], seconds[name, 2 * args.frames]
        ratio = min(twice) / min(once)
        times = " | ".join(f"{statistics.median(runs) * 1e3:.0f} ({min(runs) * 1e3:.0f})" for runs in (once, twice))
        print(f"| {name} | {times} | {ratio:.2f} | " + " | ".join(f"{peak:.0f}" for peak in peaks[name]) + " |")
        if "order 2" in name and (min(once) > args.limit or not LINEAR[0] <= ratio <= LINEAR[1]):
            missed.append(
                f"{name} {min(once):.2f} s of {args.limit:g}, ratio {ratio:.2f} of {LINEAR[0]} to {LINEAR[1]}"
            )
    return verdict(missed, args.smoke)


def measure(losses, args):
    """Seconds of each repeat of each loss, by name and frames: at the given number of frames and at twice as many."""
    steps = {(name, frames): step(name, args, frames) for name in losses for frames in (args.frames, 2 * args.frames)}
    for run in steps.values():
        run()
    seconds = {key: [] for key in steps}
    for _ in range(args.repeats):
        for key, run in steps.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def step(name, args, frames):
    """A function that runs one loss forward and backward, and waits for the device."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (2 * torch.randn(2, args.batch, frames, args.symbols, generator=generator)).to(args.device)
    targets = torch.randint(len(SPECIALS), args.symbols, (args.batch, args.frames // 8), generator=generator)
    lengths = torch.full((args.batch,), frames)
    target_lengths = torch.full((args.batch,), targets.size(1))
    symbols = SPECIALS + [f"label{index}" for index in range(args.symbols - len(SPECIALS))]
    graph = estimate(targets.tolist(), symbols, order=3 if name.endswith("3") else 2)
    logits.requires_grad_()

    def run():
        logits.grad = None
        if name == "ctc":
            log_probs = logits.log_softmax(-1).transpose(0, 1)
            loss = F.ctc_loss(log_probs, targets.to(args.device), lengths, target_lengths, reduction="none")
        elif name.startswith("training"):
            loss = lfmmi_loss(logits, lengths, targets, target_lengths, graph)
        else:
            loss = distillation_lfmmi(logits, teacher, lengths, graph)
        loss.sum().backward()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return run


def peak_memory(name, args):
    """MiB that one run adds at its peak, at the given number of frames and at twice as many."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, args))


def _peak_memory(name, args):
    torch.set_num_threads(args.threads)
    step(name, args, 20)()
    runs = [step(name, args, frames) for frames in (args.frames, 2 * args.frames)]
    return [_cuda_peak(run) for run in runs] if args.device != "cpu" else _resident_peaks(runs)


def _cuda_peak(run) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_peaks(runs):
    """The process's high-water mark after each run, less that before the first."""
    unit = 1 if sys.platform == "darwin" else 2**10
    marks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    for run in runs:
        run()
        marks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return [(mark - marks[0]) * unit / 2**20 for mark in marks[1:]]


if __name__ == "__main__":
    sys.exit(main())
