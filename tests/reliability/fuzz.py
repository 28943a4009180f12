"""Fuzz what reads files that others made.

    python -m tests.reliability.fuzz TARGET... [--seconds 10 | --inputs N] [--seed 0]
    python -m tests.reliability.fuzz TARGET --coverage [-- -runs=1000000 -max_len=4096]

The first form mutates the corpus at random. The second is guided by coverage: it needs atheris (pip install ".[fuzz]"),
hands what follows ``--`` to it, and leaves new inputs in the folder that the first of these names, if any.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

# What random bytes hardly ever hit upon.
TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u0000", b"\xff", b"\0", b"null", b"true", b"NaN", b"1e999", b"-0"),
    *(str(n).encode() for n in (0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5)),
    *(b"[" * 5000, b'{"a":' * 5000, b"9" * 5000),
    *(b'"dtype"', b'"BF16"', b'"I32"', b'"shape"', b'"data_offsets"', b'"weight_map"', b"../", b"/etc/passwd"),
    *(b'"num_bits"', b'"group_size"', b'"linear"', b'"modules"', b'"text_config"', b'"quantization_config"'),
)


def read_corpus(target: str) -> list[bytes]:
    """The inputs that are kept for a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutate(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """Change ``data`` in a few places."""
    content = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        start = dice.randint(0, len(content))
        end = min(len(content), start + dice.choice((0, 1, 1, 2, 8, 64)))
        way = dice.randrange(6)
        if way == 0 and start < len(content):
            content[start] ^= 1 << dice.randrange(8)
        elif way == 1:
            content[start:end] = dice.choice(TOKENS)
        elif way == 2:
            content[start:end] = dice.randbytes(dice.randint(0, 4))
        elif way == 3:
            other = dice.choice(others)
            at = dice.randint(0, len(other))
            content[start:end] = other[at : at + dice.randint(0, 64)]
        elif way == 4:
            content[start:start] = content[start:end] * dice.randint(1, 4)
        else:
            del content[start:end]
    return bytes(content)


def inputs(target: str, seed: int) -> Iterator[bytes]:
    """The corpus, then mutations of it without end; the same for the same seed."""
    corpus, dice = read_corpus(target), random.Random(f"{target} {seed}")
    yield from corpus
    while True:
        yield mutate(dice.choice(corpus), corpus, dice)


def fuzz(target: str, seconds: float, number: float = float("inf"), seed: int = 0) -> Counter[bool]:
    """Feed a target for some time, or some inputs. Returns how many it accepted and refused; raises for a bug."""
    from tests.reliability.targets import accepts

    end, counts = time.monotonic() + seconds, Counter[bool]()
    for data in inputs(target, seed):
        if counts.total() >= number or time.monotonic() > end:
            break
        try:
            counts[accepts(target, data)] += 1
        except Exception as error:
            raise AssertionError(f"{target}: {error!r} for the input {data[:2000]!r}") from error
    return counts


def fuzz_by_coverage(target: str, arguments: list[str]) -> None:
    """Let atheris choose the inputs; does not return."""
    import atheris

    with atheris.instrument_imports(include=["alphaq_vllm", "offline", "json"]):
        from tests.reliability import targets

    accepted = targets.accepts
    folders = [argument for argument in arguments if not argument.startswith("-")]
    atheris.Setup(
        [sys.argv[0], *arguments, *([] if folders else [str(CORPUS / target)])], lambda d: accepted(target, d)
    )
    atheris.Fuzz()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=sorted(path.name for path in CORPUS.iterdir()))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each target")
    parser.add_argument("--inputs", type=float, default=float("inf"), help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="let atheris choose the inputs")
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.coverage:
        fuzz_by_coverage(args.targets[0], rest)
    for target in args.targets:
        start = time.monotonic()
        counts = fuzz(target, args.seconds, args.inputs, args.seed)
        seconds = time.monotonic() - start
        print(f"{target}: {counts.total()} inputs in {seconds:.0f} s, {counts[True]} accepted", flush=True)


if __name__ == "__main__":
    main()
