// The loops in which quantization spends its time, as Python calls them: the search for grids, the choice among those
// that can be stored, the columns of GPTQ, and what comes before and after them.

#include "columns.h"

#define ALPHAQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A plane of packing.py of one unit, whose codes are in pairs, 16 bits apart.
template <int WIDTH>
inline uint32_t* pack_plane(const uint32_t* pairs, int low_bit, uint32_t* to) {
  constexpr int SLOTS = 16 / WIDTH;
  constexpr uint32_t MASK = ((1u << WIDTH) - 1) * 0x00010001u;
  for (int word = 0; word < WIDTH; ++word, ++to) {
    *to = 0;
    for (int slot = 0; slot < SLOTS; ++slot) *to |= (pairs[word * SLOTS + slot] >> low_bit & MASK) << slot * WIDTH;
  }
  return to;
}

}  // namespace

// See normalize of groups.py.
// weight [count, size]: groups; x [count, size], center, radius, mean, variance [count]: what comes of it.
ALPHAQ_EXPORT void alphaq_normalize(const float* weight, int64_t count, int64_t size, float* x, float* center,
                                    float* radius, float* mean, float* variance) {
  std::vector<Floats> columns(size);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(weight, size, columns.data());
    const Groups groups = normalize(columns.data(), size, columns.data());
    for (int64_t lane = 0; lane < lanes.count; ++lane)
      for (int64_t k = 0; k < size; ++k) x[lanes.group(lane) * size + k] = columns[k][lane];
    lanes.store(groups.center, center);
    lanes.store(groups.radius, radius);
    lanes.store(groups.mean, mean);
    lanes.store(groups.variance, variance);
  });
}

// See mse_grid of grids.py.
// x [count, size], mean, variance [count]: groups; starts and the five after it: see Attempts; inverse_steps, zeros
// [count]: the grids that were found.
ALPHAQ_EXPORT void alphaq_mse_grid(const float* x, const float* mean, const float* variance, int64_t count,
                                   int64_t size, float top, const float* starts, int64_t num_starts,
                                   const float* factors, const float* shifts, int64_t rounds, int64_t directions,
                                   float* inverse_steps, float* zeros) {
  const Attempts attempts{starts, num_starts, factors, shifts, rounds, directions};
  std::vector<Floats> columns(size);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(x, size, columns.data());
    const Groups groups{columns.data(), size, {}, {}, lanes.values(mean), lanes.values(variance)};
    const Grid found = search(groups, spread(top), attempts);
    lanes.store(found.inverse_step, inverse_steps);
    lanes.store(found.zero, zeros);
  });
}

// See quantize_groups of groups.py: from grids to the codes of those that are stored.
// weight [count, size], center, radius, mean, variance [count]: groups; scales [count]: of their rows; inverse_steps,
// zeros [count]: their grids; codes [count, size], grids, errors [count]: what comes of it.
ALPHAQ_EXPORT void alphaq_store_groups(const float* weight, const float* center, const float* radius, const float* mean,
                                       const float* variance, const float* scales, int64_t count, int64_t size,
                                       int64_t num_bits, const float* inverse_steps, const float* zeros, uint8_t* codes,
                                       uint8_t* grids, double* errors) {
  std::vector<Floats> columns(size);
  std::vector<Bytes> found(size);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(weight, size, columns.data());
    const Weights weights{columns.data(), size, num_bits, lanes.values(scales)};
    const Groups groups{
        nullptr, size, lanes.values(center), lanes.values(radius), lanes.values(mean), lanes.values(variance)};
    const Stored best = choose(weights, groups, {lanes.values(inverse_steps), lanes.values(zeros)});
    const Floats top = spread(weights.codes() - 1);
    for (int64_t k = 0; k < size; ++k) found[k] = bytes(nearest(clamped(exact_codes(weights, best, k), 0, top)));
    const Floats stored = grid_byte(best.steps, best.parts);
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t group = lanes.group(lane);
      for (int64_t k = 0; k < size; ++k) codes[group * size + k] = found[k][lane];
      grids[group] = static_cast<uint8_t>(stored[lane]);
      errors[group] = best.error[lane];
    }
  });
}

// See pack of packing.py. codes [units, 32]; words [units, num_bits]: what comes of it.
ALPHAQ_EXPORT void alphaq_pack(const uint8_t* codes, int64_t units, int64_t num_bits, uint32_t* words) {
  for (int64_t unit = 0; unit < units; ++unit, codes += 32) {
    uint32_t pairs[16];
    for (int k = 0; k < 16; ++k) pairs[k] = codes[2 * k] | static_cast<uint32_t>(codes[2 * k + 1]) << 16;
    // The lowest bits are in the widest plane.
    if (num_bits & 8) words = pack_plane<8>(pairs, 0, words);
    if (num_bits & 4) words = pack_plane<4>(pairs, 0, words);
    if (num_bits & 2) words = pack_plane<2>(pairs, num_bits & 4, words);
    if (num_bits & 1) words = pack_plane<1>(pairs, num_bits & 6, words);
  }
}

// See round_group of columns.py.
// block, moved [size, rows]: as there; scales [rows]: of the rows; factor, to_gradient, own [size, size]: see Effects;
// reach: how far around their grids others are tried; times: how often columns become better; starts and the five after
// it: see Attempts; codes [size, rows], grids [rows], errors [size, rows]: what comes of it. Returns whether all is
// finite.
ALPHAQ_EXPORT int alphaq_round_group(const float* block, const float* moved, const float* scales, int64_t size,
                                     int64_t rows, int64_t num_bits, const float* factor, const float* to_gradient,
                                     const float* own, int64_t reach, int64_t times, const float* starts,
                                     int64_t num_starts, const float* factors, const float* shifts, int64_t rounds,
                                     int64_t directions, uint8_t* codes, uint8_t* grids, float* errors) {
  const Attempts attempts{starts, num_starts, factors, shifts, rounds, directions};
  const Effects effects(factor, to_gradient, own, size);
  Columns columns(effects, num_bits);
  bool finite = true;
  by_rows(rows, [&](Rows some) {
    columns.scale = some.load(scales, 1);
    for (int64_t j = 0; j < size; ++j) {
      columns.block[j] = some.load(block + j * rows);
      columns.moved[j] = some.load(moved + j * rows);
    }
    finite &= columns.find_grids(attempts);
    if (times) {
      columns.round_around(reach);
      columns.improve(times);
    } else {
      columns.round();
    }
    Wide stored, error;
    for (int part = 0; part < WIDE; ++part)
      stored.parts[part] = grid_byte(columns.steps.parts[part], columns.parts.parts[part]);
    some.store(stored, grids);
    for (int64_t j = 0; j < size; ++j) {
      for (int part = 0; part < WIDE; ++part) error.parts[part] = columns.error(j, part);
      some.store(error, errors + j * rows);
      some.store(columns.codes[j], codes + j * rows);
    }
  });
  return finite;
}
