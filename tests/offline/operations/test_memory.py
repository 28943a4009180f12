"""What a conversion is thought to take, and what makes it keep to a limit."""

import pytest

from alphaq_vllm import convert
from offline.layerwise.sequential import SequentialGptq
from offline.model.text import Calibration
from offline.operations import memory
from offline.operations.memory import available_bytes, fit, peak_bytes, shapes_of
from offline.operations.plan import Job
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from tests.conftest import MODEL


@pytest.fixture(scope="module")
def job():
    source = open_checkpoint(str(MODEL))
    return Job(str(MODEL), source, find_experts(source), workers=4)


@pytest.fixture(scope="module")
def gptq(job):
    return SequentialGptq(job.source, job.experts, Calibration())


def test_shapes_are_those_of_the_model(job, gptq):
    shapes = shapes_of(job, gptq.decoder)
    assert (shapes.hidden, shapes.inner, shapes.heads, shapes.share) == (128, 128, 4, 0.25)
    assert shapes.matrix == 128 * 128 * 4
    # Attention with its biases, two norms, a router, and a shared expert with its gate.
    layer = 4 * 128 * 128 + 3 * 128 + 2 * 128 + 8 * 128 + 3 * 128 * shared_size(job) + 128
    assert shapes.layer == 4 * layer
    assert shapes.head == 2 * 128 * shapes.words


def shared_size(job):
    return job.source.config["shared_expert_intermediate_size"]


# Fields of Shapes, and what was measured of the default: Mixtral's layer, two workers.
MIXTRAL = memory.Shapes(4096, 14336, 4 * 4096 * 14336, 168_000_000, 262_144_000, 32000, 32, 0.25)


def test_more_workers_tokens_and_phases_take_more():
    one, two = (peak_bytes(MIXTRAL, workers, 32768, 512, True) for workers in (1, 2))
    assert 1.3 * one < two < 2 * one
    assert peak_bytes(MIXTRAL, 2, 65536, 512, True) > two > peak_bytes(MIXTRAL, 2, 0, 512, True)
    assert peak_bytes(MIXTRAL, 2, 0, 512, True) > peak_bytes(MIXTRAL, 2)


def test_an_expert_that_gets_most_tokens_has_them_all_together():
    """Down's blocks save memory only where tokens are fewer than features, of a busy expert as well."""
    few, many = (peak_bytes(MIXTRAL, 1, tokens, 512) for tokens in (2**14, 2**15))
    assert many - few > 2 * MIXTRAL.inner**2 * 4 - MIXTRAL.hidden**2 * 4 > 1.5e9


def test_workers_yield_to_what_there_is_and_tokens_stay(job, gptq, monkeypatch):
    whole = fit(job, gptq, gptq.decoder, True, 4, None, False)
    assert (whole.workers, whole.tokens, whole.less) == (4, gptq.tokens, "")
    monkeypatch.setattr(memory, "choose_workers", lambda requested, numel: requested or 4)
    monkeypatch.setattr(memory, "available_bytes", lambda: whole.nbytes - memory.WORKER)
    less = fit(job, gptq, gptq.decoder, True, None, None, False)
    assert (less.workers, less.tokens) == (3, gptq.tokens)
    assert less.less.startswith("3 of 4 workers, to keep to ")
    # The user's own number stands.
    assert fit(job, gptq, gptq.decoder, True, 4, None, False) == whole


def test_a_limit_leaves_fewer_workers_and_then_fewer_tokens(job, monkeypatch):
    monkeypatch.setattr(memory, "shapes_of", lambda *_: MIXTRAL)
    # So many that gptq takes more than what is before it.
    gptq = SequentialGptq(job.source, job.experts, Calibration(tokens=2**16))
    alone = peak_bytes(MIXTRAL, 1, gptq.tokens, gptq.length, True)
    fitted = fit(job, gptq, gptq.decoder, True, 4, alone, False)
    assert (fitted.workers, fitted.tokens, fitted.nbytes) == (1, gptq.tokens, alone)
    fewer = fit(job, gptq, gptq.decoder, True, 4, alone - 1, False)
    assert fewer.workers == 1 and 4096 <= fewer.tokens < gptq.tokens and fewer.nbytes < alone
    assert "1 of 4 workers and" in fewer.less and f"of {gptq.tokens} tokens" in fewer.less
    for limit, fixed in ((alone - 1, True), (1000, False)):
        with pytest.raises(ValueError, match=r"`memory`: expected at least .* for this model, got"):
            fit(job, gptq, gptq.decoder, True, 4, limit, fixed)


def test_convert_keeps_to_memory(tmp_path, capsys):
    expected = convert(MODEL, tmp_path / "out", bits=3, workers=2, dry_run=True)
    out = convert(MODEL, tmp_path / "out", bits=3, workers=2, memory=expected.memory - 150_000_000, dry_run=True)
    assert out.memory < expected.memory
    assert "1 of 2 workers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`memory`: expected at least"):
        convert(MODEL, tmp_path / "out", memory="1MiB")
    assert not list(tmp_path.iterdir())


def test_available_bytes_are_the_least_that_the_system_and_its_groups_leave(tmp_path):
    system = tmp_path / "meminfo"
    system.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert available_bytes(tmp_path, system) == 51200
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("9000\n")
    # Most of it is what files have left in memory.
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 5000\ninactive_file 3000\n")
    assert available_bytes(tmp_path, system) == 51200
    (tmp_path / "memory.max").write_text("41000\n")
    assert available_bytes(tmp_path, system) == 40000
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
