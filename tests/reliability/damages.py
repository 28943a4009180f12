"""Damages of a source, one for each number: of a tensor, or of a field of config.json, which number and dice choose.

python -m tests.reliability.damages MODEL NUMBER OUT    copies a model with one file and damages the copy
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from offline.source.checkpoint import CONFIG, SINGLE

DTYPES = (torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int32, torch.bool)
VALUES = (None, True, 7, -1, 1.5, "x", [], [1], {}, {"a": 1})
NUMBERS = (torch.nan, torch.inf, -torch.inf, 3e38)


def remove(tensors, name, dice):
    """Leave a tensor out."""
    del tensors[name]
    return f"no {name}"


def reshape(tensors, name, dice):
    """Give a tensor another shape: less of it, or all of it otherwise arranged."""
    tensor = tensors[name]
    ways = [tensor[:-1], tensor[..., :-1], tensor[None], tensor.repeat(2, *[1] * (tensor.dim() - 1))]
    if tensor.dim() > 1:
        ways += [tensor.flatten(), tensor.mT] if tensor.shape[-1] != tensor.shape[-2] else [tensor.flatten()]
    tensors[name] = dice.choice(ways).contiguous()
    return f"{name} of shape {tuple(tensors[name].shape)} for {tuple(tensor.shape)}"


def recast(tensors, name, dice):
    """Give a tensor another dtype."""
    tensors[name] = tensors[name].to(dice.choice(DTYPES))
    return f"{name} in {tensors[name].dtype}"


def spoil(tensors, name, dice):
    """Put a number into a tensor that nothing can be computed with."""
    tensor = tensors[name] = tensors[name].clone()
    place, number = dice.randrange(tensor.numel()), dice.choice(NUMBERS)
    tensor.view(-1)[place] = number
    return f"{name} with {number}"


def retype(config, dice):
    """Give a field of a config, or of an object in it, a value of another type."""
    key = dice.choice(sorted(config))
    if isinstance(config[key], dict) and config[key] and dice.random() < 0.8:
        return f"{key}.{retype(config[key], dice)}"
    value = config[key]
    config[key] = dice.choice([new for new in (*VALUES, str(value)) if type(new) is not type(value)])
    return f"{key} = {config[key]!r} for {value!r}"


KINDS = (remove, reshape, recast, spoil, retype)


def damage(model: Path, number: int) -> str:
    """Damage a model with one file; the same damage for the same number. Returns what was done."""
    dice, kind = random.Random(number), KINDS[number % len(KINDS)]
    if kind is retype:
        config = json.loads((model / CONFIG).read_bytes())
        done = retype(config, dice)
        (model / CONFIG).write_text(json.dumps(config))
        return done
    tensors = load_file(model / SINGLE)
    # Not mostly experts, of which there are more than of anything else.
    names = [name for name in sorted(tensors) if (".experts." in name) == (dice.random() < 0.3)]
    done = kind(tensors, dice.choice(names), dice)
    save_file(tensors, model / SINGLE, {"format": "pt"})
    return done


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(damage(shutil.copytree(args.model, args.out), args.number))


if __name__ == "__main__":
    main()
