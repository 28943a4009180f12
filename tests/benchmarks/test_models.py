from benchmarks.models import ALTERED, AT_LOAD, NAMES, REFUSED, SERVED, default, table
from offline.source.architectures import FAMILIES
from tests.offline.conftest import WEIGHTS_ONLY


def test_every_family_has_a_name():
    assert NAMES.keys() == FAMILIES.keys()


def test_every_type_is_in_one_row():
    listed = [cell.strip("` ") for line in table()[2:] for cell in line.split(" | ")[1].split(",")]
    assert sorted(listed) == sorted(FAMILIES)


def test_default_is_that_of_what_can_be_run():
    runs = {name for name in FAMILIES if default(name) == "propagated + gptq"}
    assert runs == set(FAMILIES) - set(WEIGHTS_ONLY)


def test_what_is_said_of_vllm_is_said_of_families():
    assert {*SERVED, *AT_LOAD, *ALTERED, *REFUSED} <= set(FAMILIES)
    assert set(ALTERED) <= set(SERVED)
    assert not set(REFUSED) & set(SERVED)
    # The plugin refuses to quantize them at load.
    assert not {name for name in AT_LOAD if FAMILIES[name].fused.transposed}
