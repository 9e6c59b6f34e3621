"""`w2v2-light prune`: a gated checkpoint without what its gates closed."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint with gates, as criterion light_prune trains it")
    parser.add_argument("out", help="where to write the smaller checkpoint")
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="DIR",
        help="also print what each layer keeps, with parameters and MACs before and after, and write it to DIR "
        "(default: beside OUT) as OUT's name with .md (table) and .png (picture; needs matplotlib)",
    )


def run(args) -> int:
    from ..compress.prune import prune_checkpoint
    from ..study.configured import ConfiguredSubject
    from ..study.structure import compare, draw_structure, format_structure, format_summary

    files = None if args.report is None else _report_files(args.report, args.out)
    pruned = prune_checkpoint(args.checkpoint, args.out)
    structure = compare(
        *(
            ConfiguredSubject(pruned.model, model, pruned.vocabulary, pruned.pretraining_heads)
            for model in (pruned.before, pruned.after)
        )
    )
    print(f"{args.checkpoint} -> {args.out} ({pruned.model})\n{format_summary(structure)}")
    if files is not None:
        from ..files import atomic_write_text

        table, picture = files
        text = format_structure(structure)
        atomic_write_text(table, f"# {Path(args.out).name}\n\n{format_summary(structure)}\n\n{text}\n")
        draw_structure(structure, picture, Path(args.out).name)
        print(f"\n{text}\n\nreport: {table}, {picture}")
    return 0


def _report_files(folder: str, out: str):
    """Table and picture; raises ValueError when they could not be written."""
    from ..study.plot import load_pyplot

    load_pyplot()
    place = Path(folder) if folder else Path(out).parent
    if place.exists() and not place.is_dir():
        raise ValueError(f"--report {place}: a file; expected a folder, or nothing for the folder of OUT")
    files = place / f"{Path(out).stem}.md", place / f"{Path(out).stem}.png"
    if Path(out) in files:
        raise ValueError(f"'{out}': the report would overwrite the checkpoint; name it like pruned.pt")
    return files
