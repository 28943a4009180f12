"""What a conversion expects of the time that it takes."""

import pytest

from alphaq_vllm import convert
from offline.layerwise import sequential
from offline.model.decoder import Decoder
from offline.operations import convert as operation
from offline.operations.plan import Job
from offline.operations.timing import _pace
from offline.source.checkpoint import open_checkpoint
from offline.source.families import find_experts
from offline.threads import one_thread

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


@one_thread()
@pytest.mark.parametrize(("model_type", "with_experts", "without"), [("qwen2_moe", 2, 0), ("deepseek_v2", 1, 1)])
def test_layers_without_experts_take_time_too(tiny_model, model_type, with_experts, without):
    source = open_checkpoint(str(tiny_model(model_type)))
    experts = find_experts(source)
    pace = _pace(Decoder(source, experts), Job(source.path, source, experts, workers=2), experts)
    assert [number for number, _, _ in pace.entered] == [with_experts, without][: 1 + bool(without)]
    assert all(load > 0 and window > 0 for _, load, window in pace.entered)
    # Windows are shared among workers, layers are loaded once.
    loads = sum(number * load for number, load, _ in pace.entered)
    assert pace.enter(1024) - loads == pytest.approx(2 * (pace.enter(512) - loads))
    assert pace.enter(512) - loads == pytest.approx(sum(number * window for number, _, window in pace.entered) / 2)
