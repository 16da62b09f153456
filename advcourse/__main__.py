"""Command line: `python -m advcourse <command>`, also installed as `advcourse`; one function a command."""
import argparse
import sys
from pathlib import Path


def fetch_data(args: argparse.Namespace) -> int:
    """Download whole data sets into the cache folder."""
    from advcourse import data

    known = ("mnist", "fashion_mnist", "cifar10")
    for name in args.names:
        if name not in known:
            raise ValueError(f"name={name!r} is not a data set to download: choose {', '.join(known)}")
    for name in args.names or known:
        for split in data.SPLITS:
            x, _ = getattr(data, name)(split, full=True)
            print(f"{name} {split}: {len(x):,} images, checked")
    return 0


def train(args: argparse.Namespace) -> int:
    """Train shipped networks anew; an interrupted training goes on where it was."""
    import torch

    from advcourse import models, train
    from advcourse.files import cache_folder

    torch.set_num_threads(1)  # sums in one order, and no threads that wait for each other
    for name in args.names:
        out = args.out or models.WEIGHTS
        card = train.make(name, out, cache_folder() / "train" / f"{name}.pt")
        print(f"{out / name}.safetensors: clean accuracy {card['clean accuracy']:.2%}, under PGD "
              + ", ".join(f"{a:.1%} at {e}" for e, a in card.get("PGD accuracy", {}).items()))
    return 0


def models(args: argparse.Namespace) -> int:
    """Print the table of shipped networks, in Markdown."""
    from advcourse import models

    for line in models.table():
        print(line)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Decide a property (VNN-LIB) of a network (ONNX): unsat, sat and a counterexample, unknown, or timeout."""
    import torch

    from advcourse.certify import vnnlib

    torch.set_num_threads(1)
    print(vnnlib.verify(args.network, args.property, time_limit=args.timeout))
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands; to add one, write its function above and its arguments here."""
    top = argparse.ArgumentParser(prog="python -m advcourse", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run):
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command("fetch-data", fetch_data)
    sub.add_argument("names", nargs="*", metavar="NAME", help="mnist, fashion_mnist, cifar10; by default all three")
    sub = command("train", train)
    sub.add_argument("names", nargs="+", metavar="NAME", help="as listed by the command models, e.g. mnist-mlp-pgd")
    sub.add_argument("--out", type=Path, help="folder for weights, log and card; by default the package's own")
    command("models", models)
    sub = command("verify", verify)
    sub.add_argument("network", type=Path, metavar="NET.onnx", help="the network; may be gzipped")
    sub.add_argument("property", type=Path, metavar="PROP.vnnlib", help="which inputs and outputs are unsafe; may be gzipped")
    sub.add_argument("--timeout", type=float, metavar="S", help="seconds for the search; none by default")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 with a message for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"advcourse {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"advcourse {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
