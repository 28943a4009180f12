"""The number of torch's threads is lowered for the work and restored after it."""

import pytest
import torch

from offline.threads import one_thread


def test_one_thread_restores_the_number_also_after_a_failure():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
