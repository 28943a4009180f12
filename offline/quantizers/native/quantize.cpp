// The two loops in which quantization spends its time: the search for grids, and the columns of GPTQ.
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

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));

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

inline Floats clamped(Floats values, Floats top) {
  values = values > 0.0f ? values : Floats{};
  return values < top ? values : top;
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
    const Floats e = nearest(clamped(u, top)) - u;
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

}  // namespace

// See mse_grid of grids.py.
// x [count, size], mean, variance [count]: groups; starts [num_starts]: inverse steps; factors, shifts [rounds,
// directions]: what disturbs a grid; inverse_steps, zeros [count]: the grids that were found.
extern "C" __attribute__((visibility("default"))) void alphaq_mse_grid(
    const float* x, const float* mean, const float* variance, int64_t count, int64_t size, float top,
    const float* starts, int64_t num_starts, const float* factors, const float* shifts, int64_t rounds,
    int64_t directions, float* inverse_steps, float* zeros) {
  std::vector<Floats> columns(size);
  const Floats tops = spread(top);
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t lanes = std::min<int64_t>(LANES, count - first);
    Groups groups{columns.data(), size, Floats{}, Floats{}};
    for (int64_t lane = 0; lane < LANES; ++lane) {
      // Lanes without a group repeat the last one.
      const int64_t group = first + std::min(lane, lanes - 1);
      for (int64_t k = 0; k < size; ++k) columns[k][lane] = x[group * size + k];
      groups.mean[lane] = mean[group];
      groups.variance[lane] = variance[group];
    }
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
    for (int64_t lane = 0; lane < lanes; ++lane) {
      inverse_steps[first + lane] = best.inverse_step[lane];
      zeros[first + lane] = best.zero[lane];
    }
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
        const Floats code = nearest(clamped(moved.parts[part] / scale + zero, tops));
        done[j].parts[part] = load(weights + part * LANES) - (code - zero) * scale;
        store(values + part * LANES, code);
      }
      for (int64_t lane = 0; lane < width; ++lane) codes[j * rows + first + lane] = static_cast<uint8_t>(values[lane]);
      for (int part = 0; part < WIDE; ++part) store(values + part * LANES, done[j].parts[part]);
      std::copy_n(values, width, errors + j * rows + first);
    }
  }
}
