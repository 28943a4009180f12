// Grids of groups: the search for them, and the choice among those that can be stored. See grids.py and groups.py.
// Lanes are groups.
#pragma once

#include "lanes.h"

namespace {

// As groups.py stores grids: steps are 1 to STEPS scales, zero points FIRST_ZERO to LAST_ZERO parts of all codes.
constexpr float STEPS = 16, FIRST_ZERO = 6, LAST_ZERO = 21, ZERO_PARTS = 32;
// Grids of more bits are tried with a third step.
constexpr int64_t FEW_BITS = 4;

// The number of codes.
inline float all_codes(int64_t num_bits) { return static_cast<float>(1 << num_bits); }

// A zero point, in codes, of its parts, and the parts of the nearest one that can be stored. NaN becomes the first.
inline Floats zero_point(Floats parts, int64_t num_bits) { return parts * (all_codes(num_bits) / ZERO_PARTS); }

inline Floats nearest_parts(Floats zero, int64_t num_bits) {
  return nearest(clamped(zero * (ZERO_PARTS / all_codes(num_bits)), FIRST_ZERO, spread(LAST_ZERO)));
}

// The byte that stores a grid, as a number.
inline Floats grid_byte(Floats steps, Floats parts) { return (parts - FIRST_ZERO) * 16.0f + (steps - 1.0f); }

// A grid for each lane: code = inverse_step * x + zero.
struct Grid {
  Floats inverse_step, zero;
};

// Groups as center + radius * x, and what is known of x: see Groups of groups.py.
struct Groups {
  const Floats* x;  // [size]
  int64_t size;
  Floats center, radius, mean, variance;
};

// The groups of weights, [size], whose place x may take. The radius of one that is not finite is not either.
inline Groups normalize(const Floats* weight, int64_t size, Floats* x) {
  Floats high = weight[0], low = weight[0];
  for (int64_t k = 1; k < size; ++k) {
    high = larger(weight[k], high);
    low = smaller(weight[k], low);
  }
  // Halves, because the sum and the difference of the largest weights are infinite.
  const Floats center = high / 2.0f + low / 2.0f, radius = high / 2.0f - low / 2.0f;
  const Floats divisor = radius > 0.0f ? radius : spread(1);
  Floats sum{}, squares{};
  for (int64_t k = 0; k < size; ++k) {
    x[k] = (weight[k] - center) / divisor;
    sum += x[k];
  }
  const Floats mean = sum / static_cast<float>(size);
  for (int64_t k = 0; k < size; ++k) squares += (x[k] - mean) * (x[k] - mean);
  // No comparison finds NaN, but the mean does, and it is 0 less itself otherwise.
  return {x, size, center, radius + (mean - mean), mean, squares / static_cast<float>(size)};
}

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

// What a search tries: inverse steps to start with, [num_starts], and what disturbs a grid, [rounds, directions].
struct Attempts {
  const float* starts;
  int64_t num_starts;
  const float *factors, *shifts;
  int64_t rounds, directions;
};

// See mse_grid of grids.py.
inline Grid search(const Groups& groups, Floats top, const Attempts& attempts) {
  const Floats half = top / 2.0f;
  Grid best{spread(attempts.starts[0]), half};
  Floats least = spread(__builtin_inff());
  for (int64_t i = 0; i < attempts.num_starts; ++i)
    compete(groups, top, {spread(attempts.starts[i]), half}, best, least);
  for (int64_t round = 0; round < attempts.rounds; ++round) {
    const Grid from = best;
    least = spread(__builtin_inff());
    for (int64_t i = round * attempts.directions; i < (round + 1) * attempts.directions; ++i) {
      const float factor = attempts.factors[i];
      const Floats zero = (from.zero - half) * factor + half + attempts.shifts[i];
      compete(groups, top, {from.inverse_step * factor, zero}, best, least);
    }
  }
  return best;
}

// Groups of weights, and the scales of their rows.
struct Weights {
  const Floats* weight;  // [size]
  int64_t size, num_bits;
  Floats scale;

  float codes() const { return all_codes(num_bits); }
};

// A grid for each lane as it is stored: its step in scales, its zero point in parts, and the squared error it leaves.
struct Stored {
  Floats steps, parts;
  Doubles error;
};

// The weights of place k in codes, before they are rounded. Divided as in torch: a product with the inverse differs.
inline Floats exact_codes(const Weights& of, const Stored& grid, int64_t k) {
  const Floats zero = zero_point(grid.parts, of.num_bits);
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
    const Floats parts = nearest_parts(zero, of.num_bits);
    Stored grid{candidates[i], parts, Doubles{}};
    grid.error = squared_error(of, grid);
    // The first one, however bad, is better than the NaN before it.
    const Ints better = open & ~__builtin_convertvector(grid.error >= best.error, Ints);
    best.steps = better ? grid.steps : best.steps;
    best.parts = better ? grid.parts : best.parts;
    best.error = __builtin_convertvector(better, decltype(grid.error >= best.error)) ? grid.error : best.error;
  }
}

// See quantize_groups of groups.py: of the grids that can be stored the best one.
inline Stored choose(const Weights& of, const Groups& groups, const Grid& grid) {
  const Floats half = spread((of.codes() - 1) / 2), step = groups.radius / grid.inverse_step;
  Stored best{Floats{}, Floats{}, Doubles{} + __builtin_nan("")};
  compete(of, step, groups.center + (half - grid.zero) * step, ~Ints{}, best);
  // Where the grid is far from all that can be stored, these are not: the range of the group in equal steps, and 0.
  const Floats up = groups.radius + groups.center, down = groups.radius - groups.center;
  const Floats all = reaching_step(larger(up, Floats{}), larger(down, Floats{}), of.codes());
  const Doubles mean = doubles(groups.center + groups.radius * groups.mean);
  const Doubles square = mean * mean + doubles(groups.radius) * doubles(groups.radius) * doubles(groups.variance);
  const Doubles quarter = doubles(all) * doubles(all) / 4.0;
  const Doubles most = static_cast<double>(of.size) * (square < quarter ? square : quarter);
  const Ints far = __builtin_convertvector(best.error > most, Ints);
  bool any = false;
  for (int64_t lane = 0; lane < LANES; ++lane) any |= far[lane] != 0;
  if (any) {
    compete(of, all, groups.center, far, best);
    compete(of, Floats{}, Floats{}, far, best);
  }
  return best;
}

}  // namespace
