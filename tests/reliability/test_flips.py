"""Bytes of a finished checkpoint are flipped: `validate` finds every one, vLLM does not load what they would change.

The plugin compares checksums before anything is loaded. Where that is switched off, a flip in the numbers themselves,
or in what config.json says beside the quantization, is found by `validate` alone; what loading must notice then is
any flip in what says which bytes mean what.
"""

import shutil

import pytest

from alphaq_vllm import validate
from alphaq_vllm.checksums import compare_sums
from alphaq_vllm.plugin.files import EDITABLE
from offline.source.checkpoint import CONFIG, INDEX
from tests.reliability.loading import engine_config, load, one_rank, same, state

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("rank")):
        yield


@pytest.fixture
def damaged(tiny_checkpoint, tmp_path):
    """``damaged(name, place, bit)``: a copy of the checkpoint with one bit of one file flipped."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")

    def flip(name, place, bit):
        content = bytearray((tiny_checkpoint / name).read_bytes())
        content[place] ^= 1 << bit
        (copy / name).write_bytes(content)
        return copy

    return flip


def header_end(checkpoint):
    return 8 + int.from_bytes((checkpoint / SHARD).read_bytes()[:8], "little")


def places(checkpoint, step):
    """Places of each file, every ``step``-th of headers and small files, and fewer of the weights."""
    for file in sorted(checkpoint.iterdir()):
        size = file.stat().st_size
        end = header_end(checkpoint) if file.name == SHARD else size
        for place in [*range(0, end, step), *range(end, size, 100 * step if step > 1 else 1), size - 1]:
            yield file.name, place


def assert_validate_finds_flips(checkpoint, damaged, step):
    validate(str(checkpoint))
    tried = 0
    for name, place in places(checkpoint, step):
        # Bit 5 turns a hexadecimal digit into the same one in upper case, so every bit has its turn.
        copy = damaged(name, place, (place // step * 5 + 5) % 8)
        with pytest.raises((ValueError, OSError)):
            validate(str(copy))
        shutil.copy(checkpoint / name, copy / name)
        tried += 1
    return tried


def test_validate_finds_flips_in_every_file(tiny_checkpoint, damaged):
    assert assert_validate_finds_flips(tiny_checkpoint, damaged, 7) > 1700


@pytest.mark.long
def test_validate_finds_a_flip_of_every_byte(tiny_checkpoint, damaged):
    size = sum(file.stat().st_size for file in tiny_checkpoint.iterdir())
    assert assert_validate_finds_flips(tiny_checkpoint, damaged, 1) >= size


def assert_vllm_finds_flips(checkpoint, damaged, step):
    engine_config(checkpoint, verify=True)
    for name, place in places(checkpoint, step):
        copy = damaged(name, place, (place // step * 5 + 5) % 8)
        # A config that does not parse is refused by others first, each with an error of its own.
        try:
            engine_config(copy, verify=True)
        except Exception as error:
            assert str(error), f"{name}, byte {place}: refused without a message"
        else:
            # Warned of: what people edit, or its sum.
            comparison = compare_sums(copy)
            assert comparison.missing or comparison.different, f"{name}, byte {place}: not noticed"
            weighty = comparison.without(EDITABLE)
            assert not (weighty.missing or weighty.different), f"{name}, byte {place}: not refused"
        shutil.copy(checkpoint / name, copy / name)


def test_vllm_refuses_flips_in_every_file(rank, tiny_checkpoint, damaged):
    assert_vllm_finds_flips(tiny_checkpoint, damaged, 301)


@pytest.mark.long
def test_vllm_refuses_many_flips(rank, tiny_checkpoint, damaged):
    assert_vllm_finds_flips(tiny_checkpoint, damaged, 37)


def quantization_places(checkpoint):
    """Where config.json holds the quantization_config, which is written last."""
    content = (checkpoint / CONFIG).read_bytes()
    return range(content.index(b'"quantization_config"'), len(content))


def assert_loading_notices_flips(checkpoint, damaged, name, chosen):
    """Loading refuses each flip, or gives what the whole checkpoint gives. Returns how many it refused."""
    expected = state(load(checkpoint))
    refused = 0
    for number, place in enumerate(chosen):
        copy = damaged(name, place, number * 3 % 8)
        try:
            loaded = state(load(copy))
        except Exception as error:
            assert str(error), f"{name}, byte {place}: refused without a message"
            refused += 1
            continue
        assert same(expected, loaded), f"{name}, byte {place}, bit {number * 3 % 8}: loaded as something else"
    return refused


def test_loading_notices_flips_in_headers(rank, tiny_checkpoint, damaged):
    chosen = range(0, header_end(tiny_checkpoint), 61)
    assert assert_loading_notices_flips(tiny_checkpoint, damaged, SHARD, chosen) > len(chosen) * 0.8


def test_loading_notices_flips_in_the_quantization(rank, tiny_checkpoint, damaged):
    chosen = quantization_places(tiny_checkpoint)[::17]
    assert assert_loading_notices_flips(tiny_checkpoint, damaged, CONFIG, chosen) > len(chosen) * 0.7


def test_loading_notices_flips_in_the_index(rank, tiny_checkpoint, damaged):
    chosen = range(0, (tiny_checkpoint / INDEX).stat().st_size, 211)
    assert_loading_notices_flips(tiny_checkpoint, damaged, INDEX, chosen)


@pytest.mark.long
def test_loading_notices_a_flip_of_every_byte_that_says_what_the_others_mean(rank, tiny_checkpoint, damaged):
    assert_loading_notices_flips(tiny_checkpoint, damaged, SHARD, range(header_end(tiny_checkpoint)))
    assert_loading_notices_flips(tiny_checkpoint, damaged, CONFIG, quantization_places(tiny_checkpoint))


def test_loading_gives_the_same_twice_and_something_else_for_other_numbers(rank, tiny_checkpoint, damaged):
    """What the tests above compare tells checkpoints apart."""
    expected = state(load(tiny_checkpoint))
    assert same(expected, state(load(tiny_checkpoint)))
    last = (tiny_checkpoint / SHARD).stat().st_size - 1
    assert not same(expected, state(load(damaged(SHARD, last, 0))))
