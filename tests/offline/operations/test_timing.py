"""What a conversion expects of the time that it takes."""

import pytest

from alphaq_vllm import convert
from offline.layerwise import sequential
from offline.operations import convert as operation

SETTINGS = {"bits": 3.0, "calibration_tokens": 1024, "calibration_length": 512, "workers": 1, "group_size": 64}


def test_a_resumed_run_does_not_expect_what_is_done(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(operation, "WORTH_PROCESSES", 0)
    source, out, seen = tiny_model("qwen2_moe"), tmp_path / "out", []
    expect, quantize = operation.expect, sequential._run

    def quantize_first(*arguments):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(arguments)
        return quantize(*arguments)

    def compare(*arguments):
        *others, journal = arguments
        anew = expect(*others)
        left = expect(*others, journal)
        return {phase: left[phase] / anew[phase] if anew[phase] else 0.0 for phase in anew}

    monkeypatch.setattr(operation, "expect", compare)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_run", quantize_first)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, **SETTINGS)
    shares = convert(source, out, **SETTINGS, resume=True).expected
    assert list(shares) == ["measure", "text", "propagate", "gptq", "write"]
    assert shares["measure"] == shares["text"] == shares["propagate"] == 0
    # One of two layers, in times that are measured twice.
    assert 0.1 < shares["gptq"] < 1
