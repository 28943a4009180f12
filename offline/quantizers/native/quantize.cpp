// The loops in which quantization spends its time: the search for grids, the choice among those that can be stored, the
// columns of GPTQ, and what comes before and after them.
//
// Lanes are groups of weights, and rows of a matrix: none adds up what belongs to another, and nothing is contracted to
// fused operations. So every instruction set, of any width, computes the same bits.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Vectors of lanes that the columns of GPTQ are worked on at a time, so that a factor is loaded once for them.
constexpr int WIDE = 4;

// As groups.py stores grids: steps are 1 to STEPS scales, zero points FIRST_ZERO to LAST_ZERO parts of all codes.
constexpr float STEPS = 16, FIRST_ZERO = 6, LAST_ZERO = 21, ZERO_PARTS = 32;
// Grids of more bits are tried with a third step.
constexpr int64_t FEW_BITS = 4;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline Floats spread(float value) { return Floats{} + value; }

// To the nearest integer, ties to even, of values in the range of codes.
inline Floats nearest(Floats codes) {
  constexpr float WHOLE = 0x1.8p23f;
  return (codes + WHOLE) - WHOLE;
}

// To the next integer below, of the same.
inline Floats floored(Floats codes) {
  const Floats whole = nearest(codes);
  return whole > codes ? whole - 1.0f : whole;
}

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// NaN becomes low.
inline Floats clamped(Floats values, float low, Floats top) { return smaller(larger(values, spread(low)), top); }

inline Doubles doubles(Floats values) { return __builtin_convertvector(values, Doubles); }

// In two steps, because GCC makes one conversion of this kind a lane at a time.
inline Bytes bytes(Floats codes) { return __builtin_convertvector(__builtin_convertvector(codes, Ints), Bytes); }

// Groups that are worked on together, one in each lane. Lanes without a group repeat the last one.
struct Lanes {
  int64_t first, count;

  int64_t group(int64_t lane) const { return first + std::min(lane, count - 1); }

  // A value of each group.
  Floats values(const float* from) const {
    Floats found;
    for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = from[group(lane)];
    return found;
  }

  // A vector for each place in a group.
  void columns(const float* from, int64_t size, Floats* to) const {
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t k = 0; k < size; ++k) to[k][lane] = from[group(lane) * size + k];
  }

  void store(Floats values, float* to) const {
    for (int64_t lane = 0; lane < count; ++lane) to[first + lane] = values[lane];
  }
};

// Calls work with all groups, some at a time.
template <typename Work>
inline void by_lanes(int64_t groups, Work work) {
  for (int64_t first = 0; first < groups; first += LANES) work(Lanes{first, std::min<int64_t>(LANES, groups - first)});
}

// A grid for each lane: code = inverse_step * x + zero.
struct Grid {
  Floats inverse_step, zero;
};

struct Groups {
  const Floats* x;  // [size]
  int64_t size;
  Floats mean, variance;
};

// Encodes x on a grid, fits a new one to the codes, and returns its squared error: see _refit of grids.py.
inline Floats refit(const Groups& groups, Floats top, Grid& grid) {
  Floats sum_e{}, sum_eu{}, sum_ee{};
  for (int64_t k = 0; k < groups.size; ++k) {
    const Floats u = groups.x[k] * grid.inverse_step + grid.zero;
    const Floats e = nearest(clamped(u, 0, top)) - u;
    sum_e += e;
    sum_eu += e * u;
    sum_ee += e * e;
  }
  const float share = 1.0f / static_cast<float>(groups.size);
  const Floats mean_u = grid.inverse_step * groups.mean + grid.zero, mean_e = sum_e * share;
  const Floats cov_eu = sum_eu * share - mean_e * mean_u, var_e = sum_ee * share - mean_e * mean_e;
  const Floats cov_eq = cov_eu + var_e;
  const Floats var_q = grid.inverse_step * grid.inverse_step * groups.variance + cov_eu + cov_eq;
  const Floats slope = cov_eq / (var_q > 1e-3f ? var_q : spread(1e-3f));
  const Floats error = (var_e - slope * cov_eq) / (grid.inverse_step * grid.inverse_step);
  const Floats stretch = 1.0f / (1.0f - slope);
  grid.zero = (grid.zero + mean_e - slope * (mean_u + mean_e)) * stretch;
  grid.inverse_step *= stretch;
  return error;
}

// Takes the refitted grid if it is better than the best.
inline void compete(const Groups& groups, Floats top, Grid grid, Grid& best, Floats& least) {
  const Floats error = refit(groups, top, grid);
  const auto better = error < least;
  least = better ? error : least;
  best.inverse_step = better ? grid.inverse_step : best.inverse_step;
  best.zero = better ? grid.zero : best.zero;
}

// Groups of weights, and the scales of their rows.
struct Weights {
  const Floats* weight;  // [size]
  int64_t size, num_bits;
  Floats scale;

  float codes() const { return static_cast<float>(1 << num_bits); }
};

// A grid for each lane as it is stored: its step in scales, its zero point in parts, and the squared error it leaves.
struct Stored {
  Floats steps, parts;
  Doubles error;
};

// The weights of place k in codes, before they are rounded. Divided as in torch: a product with the inverse differs.
inline Floats exact_codes(const Weights& of, const Stored& grid, int64_t k) {
  const Floats zero = grid.parts * (of.codes() / ZERO_PARTS);
  return of.weight[k] / (of.scale * grid.steps) + zero;
}

// See encode of groups.py.
inline Doubles squared_error(const Weights& of, const Stored& grid) {
  Floats sum{};
  for (int64_t k = 0; k < of.size; ++k) {
    const Floats exact = exact_codes(of, grid, k);
    const Floats error = exact - nearest(clamped(exact, 0, spread(of.codes() - 1)));
    sum += error * error;
  }
  const Doubles step = doubles(of.scale * grid.steps);
  return doubles(sum) * (step * step);
}

// See groups.py. NaN stays NaN.
inline Floats reaching_step(Floats up, Floats down, float codes) {
  const float most_up = codes - 1 - codes * FIRST_ZERO / ZERO_PARTS, most_down = codes * LAST_ZERO / ZERO_PARTS;
  return larger(down / most_down, larger(up / most_up, up / (codes - 1) + down / (codes - 1)));
}

// Takes a grid of _grids of groups.py if it is better than the best, in lanes that are open.
inline void compete(const Weights& of, Floats step, Floats middle, Ints open, Stored& best) {
  const float codes = of.codes(), half = (codes - 1) / 2;
  const Floats reaching = reaching_step(half * step + middle, half * step - middle, codes);
  const Floats lower = floored(clamped(step / of.scale, 1, spread(STEPS)));
  const Floats upper = floored(clamped(reaching / of.scale, 0, spread(STEPS - 1))) + 1.0f;
  const Floats candidates[] = {lower, upper, smaller(upper + 1.0f, spread(STEPS))};
  for (int64_t i = 0; i < (of.num_bits <= FEW_BITS ? 2 : 3); ++i) {
    const Floats exact = half - middle / (of.scale * candidates[i]);
    // Weights that are small beside the smallest step are nearest to 0.
    Floats zero = step < of.scale ? spread(codes / 2) : exact;
    // NaN comes of searches in groups whose weights are all equal.
    zero = zero == zero ? zero : spread(half);
    const Floats parts = nearest(clamped(zero * (ZERO_PARTS / codes), FIRST_ZERO, spread(LAST_ZERO)));
    Stored grid{candidates[i], parts, Doubles{}};
    grid.error = squared_error(of, grid);
    // The first one, however bad, is better than the NaN before it.
    const Ints better = open & ~__builtin_convertvector(grid.error >= best.error, Ints);
    best.steps = better ? grid.steps : best.steps;
    best.parts = better ? grid.parts : best.parts;
    best.error = __builtin_convertvector(better, decltype(grid.error >= best.error)) ? grid.error : best.error;
  }
}

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
// weight [count, size]: groups; x [count, size], center, radius, mean, variance [count]: what comes of it. The radius
// of a group that is not finite is not either.
extern "C" __attribute__((visibility("default"))) void alphaq_normalize(const float* weight, int64_t count,
                                                                        int64_t size, float* x, float* center,
                                                                        float* radius, float* mean, float* variance) {
  std::vector<Floats> columns(size);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(weight, size, columns.data());
    Floats high = columns[0], low = columns[0];
    for (const Floats& values : columns) {
      high = larger(values, high);
      low = smaller(values, low);
    }
    // Halves, because the sum and the difference of the largest weights are infinite.
    const Floats middle = high / 2.0f + low / 2.0f, reach = high / 2.0f - low / 2.0f;
    const Floats divisor = reach > 0.0f ? reach : spread(1);
    Floats sum{}, squares{};
    for (Floats& values : columns) {
      values = (values - middle) / divisor;
      sum += values;
    }
    const Floats average = sum / static_cast<float>(size);
    for (const Floats& values : columns) squares += (values - average) * (values - average);
    for (int64_t lane = 0; lane < lanes.count; ++lane)
      for (int64_t k = 0; k < size; ++k) x[lanes.group(lane) * size + k] = columns[k][lane];
    lanes.store(middle, center);
    // No comparison finds NaN, but the mean does, and it is 0 less itself otherwise.
    lanes.store(reach + (average - average), radius);
    lanes.store(average, mean);
    lanes.store(squares / static_cast<float>(size), variance);
  });
}

// See mse_grid of grids.py.
// x [count, size], mean, variance [count]: groups; starts [num_starts]: inverse steps; factors, shifts [rounds,
// directions]: what disturbs a grid; inverse_steps, zeros [count]: the grids that were found.
extern "C" __attribute__((visibility("default"))) void alphaq_mse_grid(
    const float* x, const float* mean, const float* variance, int64_t count, int64_t size, float top,
    const float* starts, int64_t num_starts, const float* factors, const float* shifts, int64_t rounds,
    int64_t directions, float* inverse_steps, float* zeros) {
  std::vector<Floats> columns(size);
  const Floats tops = spread(top);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(x, size, columns.data());
    const Groups groups{columns.data(), size, lanes.values(mean), lanes.values(variance)};
    Grid best{spread(starts[0]), tops / 2.0f};
    Floats least = spread(__builtin_inff());
    for (int64_t i = 0; i < num_starts; ++i) compete(groups, tops, {spread(starts[i]), tops / 2.0f}, best, least);
    for (int64_t round = 0; round < rounds; ++round) {
      const Grid from = best;
      least = spread(__builtin_inff());
      for (int64_t i = round * directions; i < (round + 1) * directions; ++i) {
        const Floats zero = (from.zero - tops / 2.0f) * factors[i] + tops / 2.0f + shifts[i];
        compete(groups, tops, {from.inverse_step * factors[i], zero}, best, least);
      }
    }
    lanes.store(best.inverse_step, inverse_steps);
    lanes.store(best.zero, zeros);
  });
}

// See quantize_groups of groups.py: from grids to the codes of those that are stored.
// weight [count, size], center, radius, mean, variance [count]: groups; scales [count]: of their rows; inverse_steps,
// zeros [count]: their grids; codes [count, size], grids, errors [count]: what comes of it.
extern "C" __attribute__((visibility("default"))) void alphaq_store_groups(
    const float* weight, const float* center, const float* radius, const float* mean, const float* variance,
    const float* scales, int64_t count, int64_t size, int64_t num_bits, const float* inverse_steps, const float* zeros,
    uint8_t* codes, uint8_t* grids, double* errors) {
  std::vector<Floats> columns(size);
  std::vector<Bytes> found(size);
  by_lanes(count, [&](Lanes lanes) {
    lanes.columns(weight, size, columns.data());
    const Weights groups{columns.data(), size, num_bits, lanes.values(scales)};
    const Floats middle = lanes.values(center), reach = lanes.values(radius), tops = spread(groups.codes() - 1);
    Stored best{Floats{}, Floats{}, Doubles{} + __builtin_nan("")};
    const Floats step = reach / lanes.values(inverse_steps);
    compete(groups, step, middle + (tops / 2.0f - lanes.values(zeros)) * step, ~Ints{}, best);

    // Where the grid is far from all that can be stored, these are not: the range of the group in equal steps, and 0.
    const Floats up = reach + middle, down = reach - middle;
    const Floats all = reaching_step(larger(up, Floats{}), larger(down, Floats{}), groups.codes());
    const Doubles average = doubles(middle + reach * lanes.values(mean));
    const Doubles square = average * average + doubles(reach) * doubles(reach) * doubles(lanes.values(variance));
    const Doubles quarter = doubles(all) * doubles(all) / 4.0;
    const Doubles most = static_cast<double>(size) * (square < quarter ? square : quarter);
    const Ints far = __builtin_convertvector(best.error > most, Ints);
    bool any = false;
    for (int64_t lane = 0; lane < LANES; ++lane) any |= far[lane] != 0;
    if (any) {
      compete(groups, all, middle, far, best);
      compete(groups, Floats{}, Floats{}, far, best);
    }

    for (int64_t k = 0; k < size; ++k) found[k] = bytes(nearest(clamped(exact_codes(groups, best, k), 0, tops)));
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t group = lanes.group(lane);
      for (int64_t k = 0; k < size; ++k) codes[group * size + k] = found[k][lane];
      grids[group] = static_cast<uint8_t>((best.parts[lane] - FIRST_ZERO) * 16 + (best.steps[lane] - 1));
      errors[group] = best.error[lane];
    }
  });
}

// See pack of packing.py. codes [units, 32]; words [units, num_bits]: what comes of it.
extern "C" __attribute__((visibility("default"))) void alphaq_pack(const uint8_t* codes, int64_t units,
                                                                   int64_t num_bits, uint32_t* words) {
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

// See gptq of gptq.py: rounds a group of columns from the last to the first, each moved by the errors of those after it.
// block, corrected [size, rows]: the columns, and moved by the errors of later groups; factor: the rows and columns of U
// for them, whose rows are row_stride apart; step, offset [rows]: their grid; codes, errors [size, rows]: what comes of
// it.
extern "C" __attribute__((visibility("default"))) void alphaq_gptq_columns(
    const float* block, const float* corrected, const float* factor, int64_t row_stride, const float* step,
    const float* offset, int64_t size, int64_t rows, float top, uint8_t* codes, float* errors) {
  struct Wide {
    Floats parts[WIDE];
  };
  std::vector<Wide> done(size);
  constexpr int64_t WIDTH = WIDE * LANES;
  const Floats tops = spread(top);
  for (int64_t first = 0; first < rows; first += WIDTH) {
    const int64_t width = std::min(WIDTH, rows - first);
    // Rows that do not exist are 0 on a grid of 1.
    float steps[WIDTH], offsets[WIDTH]{}, weights[WIDTH]{}, values[WIDTH]{};
    std::fill_n(steps, WIDTH, 1.0f);
    std::copy_n(step + first, width, steps);
    std::copy_n(offset + first, width, offsets);
    for (int64_t j = size - 1; j >= 0; --j) {
      std::copy_n(block + j * rows + first, width, weights);
      std::copy_n(corrected + j * rows + first, width, values);
      Wide moved;
      for (int part = 0; part < WIDE; ++part) moved.parts[part] = load(values + part * LANES);
      const float* row = factor + j * row_stride;
      for (int64_t i = j + 1; i < size; ++i)
        for (int part = 0; part < WIDE; ++part) moved.parts[part] += done[i].parts[part] * row[i];
      for (int part = 0; part < WIDE; ++part) {
        const Floats scale = load(steps + part * LANES), zero = load(offsets + part * LANES);
        const Floats code = nearest(clamped(moved.parts[part] / scale + zero, 0, tops));
        done[j].parts[part] = load(weights + part * LANES) - (code - zero) * scale;
        store(values + part * LANES, code);
      }
      for (int64_t lane = 0; lane < width; ++lane) codes[j * rows + first + lane] = static_cast<uint8_t>(values[lane]);
      for (int part = 0; part < WIDE; ++part) store(values + part * LANES, done[j].parts[part]);
      std::copy_n(values, width, errors + j * rows + first);
    }
  }
}
