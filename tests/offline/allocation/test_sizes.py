"""Budgets given as sizes."""

import pytest

from offline.allocation.sizes import Room, fit_memory, target_size

GB = 10**9


def test_average_bits_fills_the_room_exactly():
    # 1000 others, 3 bits and a quarter for each of 8000 weights.
    assert Room("target_size", 1000 + 3250).average_bits(1000, 8000, 32, 2, 4) == 3
    assert 2.999 - 1e-9 <= Room("target_size", 1000 + 3249).average_bits(1000, 8000, 32, 2, 4) < 3
    assert Room("target_size", 1000 + 3125).average_bits(1000, 8000, 64, 2, 4) == 3


def test_average_bits_is_at_most_the_greatest_candidate():
    assert Room("target_size", GB).average_bits(0, 8000, 128, 2, 4) == 4


def test_average_bits_refuses_too_small_a_room_and_says_what_fills_it():
    message = r"`fit_memory`: .* at least 6\.2 GB, .* at 2 bits \(2\.2 GB\) .* not quantized \(4\.0 GB\), got 6\.0 GB"
    with pytest.raises(ValueError, match=message):
        Room("fit_memory", 6 * GB).average_bits(4 * GB, 8 * GB, 32, 2, 4)


def test_fit_memory_reserves_a_fifth_unless_told():
    assert fit_memory(24 * GB, None) == Room("fit_memory", 19_200_000_000, 4_800_000_000)
    assert fit_memory(24 * GB, 5 * GB).limit == 19 * GB
    assert "4.8 GB reserved for KV cache" in str(fit_memory(24 * GB, None))
    with pytest.raises(ValueError, match=r"`reserve`: expected less than the memory of 24\.0 GB, got 24\.0 GB"):
        fit_memory(24 * GB, 24 * GB)


def test_target_size_is_of_all_files():
    assert not target_size(GB).in_memory
    assert fit_memory(GB, None).in_memory
    assert str(target_size(GB)) == "1.0 GB for all files"
